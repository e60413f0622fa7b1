"""The scan of Mamba-2 as written down: one step after the other, in order, in any floating dtype.

    step_l = clamp(softplus(dt_l + dt_bias), dt_min, dt_max)
    s_l = exp(step_l A) s_{l-1} + step_l x_l (x) B_l        y_l = s_l C_l + D x_l        out = y silu(z)

with one scalar decay A a head, s_l a matrix (P, N) a head, softplus and bias where asked for (Dao and Gu, arXiv
2405.21060, sections 2 and 6). Every backend module of `ssd` has these two functions:

    forward(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, reverse)
        -> (out, final_states, starts)
    backward(dout, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, starts,
             dt_softplus, dt_min, dt_max, reverse)
        -> gradients of the nine tensors

x, z (B, L, M, P), dt (B, L, M), A (M,), B, C (B, L, G, N) with group m // (M / G) for head m, D (M, P), dt_bias (M,),
initial_states (B, M, P, N); D, z, dt_bias and initial_states may be None; B, L, M, P, N >= 1. x, dt, B, C, z have any
floating dtype and strides, the others are contiguous in the accumulation dtype. `out` has the dtype of x;
`final_states` (B, M, P, N) and `starts` (B, M, chunks, P, N), the state before each chunk of `chunk_length` positions,
have the accumulation dtype. `dfinal_states` may be None. `backward` returns gradients in the shapes of the inputs and
any floating dtype, None where the input is None.
"""
import torch
from torch.nn import functional as F

from .._dispatch import CHUNK, accumulation_dtype


def chunk_length(length: int) -> int:
    """Positions of a chunk: at most `CHUNK`, and such that the last chunk is nearly as long as the others."""
    chunks = (length + CHUNK - 1) // CHUNK
    return (length + chunks - 1) // chunks


def steps(
        dt: torch.Tensor,
        dt_bias: torch.Tensor | None,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the steps (B, L, M), and their derivatives by dt."""
    raw = dt if dt_bias is None else dt + dt_bias
    free = F.softplus(raw) if dt_softplus else raw
    # softplus returns its argument beyond the threshold 20, so its slope is exactly 1 there
    slope = torch.where(raw > 20, torch.ones_like(raw), torch.sigmoid(raw)) if dt_softplus else torch.ones_like(raw)
    return free.clamp(dt_min, dt_max), torch.where((free >= dt_min) & (free <= dt_max), slope, torch.zeros_like(raw))


def _in_order(x: torch.Tensor | None, dtype: torch.dtype, reverse: bool) -> torch.Tensor | None:
    """A map (B, L, ...) in scan order and the accumulation dtype; its own inverse."""
    if x is None:
        return None
    return x.to(dtype).flip(1) if reverse else x.to(dtype)


def forward(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        initial_states: torch.Tensor | None,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
        reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the scan. Differentiable by autograd when called directly."""
    dtype, length = accumulation_dtype(x), x.shape[1]
    per_group = x.shape[2] // B.shape[2]
    u, dt, B, C, gate = (_in_order(t, dtype, reverse) for t in (x, dt, B, C, z))
    B, C = (t.repeat_interleave(per_group, 2) for t in (B, C))
    step, _ = steps(dt, dt_bias, dt_softplus, dt_min, dt_max)
    state = u.new_zeros(u.shape[0], *u.shape[2:], B.shape[3]) if initial_states is None else initial_states
    starts, ys = [], []
    for l in range(length):
        if l % chunk_length(length) == 0:
            starts.append(state)
        decay = torch.exp(step[:, l] * A)[..., None, None]
        state = decay * state + (step[:, l, :, None] * u[:, l])[..., None] * B[:, l, :, None]
        ys.append((state * C[:, l, :, None]).sum(-1))
    y = torch.stack(ys, 1)
    y = y if D is None else y + D * u
    y = y if gate is None else y * F.silu(gate)
    return _in_order(y, x.dtype, reverse), state, torch.stack(starts, 2)


def backward(
        dout: torch.Tensor,
        dfinal_states: torch.Tensor | None,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        initial_states: torch.Tensor | None,
        starts: torch.Tensor,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
        reverse: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the scan by the adjoint recurrence."""
    dtype, length = accumulation_dtype(x), x.shape[1]
    groups = B.shape[2]
    u, dt, B, C, gate, dy = (_in_order(t, dtype, reverse) for t in (x, dt, B, C, z, dout))
    B, C = (t.repeat_interleave(u.shape[2] // groups, 2) for t in (B, C))
    step, slope = steps(dt, dt_bias, dt_softplus, dt_min, dt_max)
    decay = torch.exp(step * A)
    states = [starts[:, :, 0]]
    for l in range(length):
        drive = (step[:, l, :, None] * u[:, l])[..., None] * B[:, l, :, None]
        states.append(decay[:, l, :, None, None] * states[-1] + drive)
    dz = None
    if gate is not None:
        y = (torch.stack(states[1:], 1) * C[..., None, :]).sum(-1) + (0 if D is None else D * u)
        sigmoid = torch.sigmoid(gate)
        dz = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
        dy = dy * F.silu(gate)
    adjoints = []
    carry = torch.zeros_like(states[0]) if dfinal_states is None else dfinal_states.to(dtype)
    for l in reversed(range(length)):
        adjoints.append(carry + dy[:, l, ..., None] * C[:, l, :, None])
        carry = decay[:, l, :, None, None] * adjoints[-1]
    dstate = torch.stack(adjoints[::-1], 1)
    dlog_decay = decay * (dstate * torch.stack(states[:-1], 1)).sum((-1, -2))
    ddrive = (dstate * B[..., None, :]).sum(-1)
    ddt = (dlog_decay * A + (ddrive * u).sum(-1)) * slope
    dB = (dstate * (step[..., None] * u)[..., None]).sum(3).unflatten(2, (groups, -1)).sum(3)
    dC = (torch.stack(states[1:], 1) * dy[..., None]).sum(3).unflatten(2, (groups, -1)).sum(3)
    dx = ddrive * step[..., None] + (0 if D is None else D * dy)
    dx, draw, dB, dC, dz = (_in_order(t, dtype, reverse) for t in (dx, ddt, dB, dC, dz))
    return (dx, draw, (dlog_decay * step).sum((0, 1)), dB, dC, None if D is None else (dy * u).sum((0, 1)), dz,
            None if dt_bias is None else ddt.sum((0, 1)), None if initial_states is None else carry)
