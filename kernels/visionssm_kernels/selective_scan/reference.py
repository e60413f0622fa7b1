"""The selective scan as written down: one step after the other, in order, in any floating dtype.

    state_l = exp(delta_l A) state_{l-1} + delta_l B_l u_l        y_l = <C_l, state_l> + D u_l        out = y silu(z)

with delta <- softplus(delta + delta_bias) where asked for (Gu and Dao, arXiv 2312.00752, equations 2 and 4 with the
simplified discretisation of B). The meaning of arguments and results stands in `visionssm_kernels._dispatch`.
"""
import torch
from torch.nn import functional as F

from .._dispatch import CHUNK, accumulation_dtype


def to_route(x: torch.Tensor, index: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """Reads maps (B, K or 1, ..., L) along the routes -> (B, K, ..., L)."""
    if index is None:
        return x.flip(-1) if reverse else x
    order = index.long().view(1, index.shape[0], *[1] * (x.ndim - 3), index.shape[1])
    x = x.expand(-1, index.shape[0], *x.shape[2:])
    return x.gather(-1, order.expand_as(x))


def from_route(x: torch.Tensor, index: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """Puts sequences (B, K, ..., L) back on their pixels: the inverse of `to_route`."""
    return to_route(x, None if index is None else index.long().argsort(-1), reverse)


def _per_channel(x: torch.Tensor, dim: int) -> torch.Tensor:
    """B or C: grouped (B, K, G, N, L) or constant (K, D, N) -> (B, K, D, N, L)."""
    return x[None, ..., None] if x.ndim == 3 else x.repeat_interleave(dim // x.shape[2], dim=2)


def _prepare(
        u: torch.Tensor,
        delta: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        index: torch.Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        dtype: torch.dtype,
) -> tuple[torch.Tensor | None, ...]:
    """Casts the maps, reads them in route order, and finishes delta; B and C per channel."""
    maps = [None if x is None else x.to(dtype) if x.ndim == 3 else to_route(x.to(dtype), index, reverse)
            for x in (u, delta, B, C, z)]
    raw = maps[1] if delta_bias is None else maps[1] + delta_bias[..., None]
    step = F.softplus(raw) if delta_softplus else raw
    dim = delta.shape[2]
    return maps[0], raw, step, _per_channel(maps[2], dim), _per_channel(maps[3], dim), maps[4]


def forward(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        index: torch.Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        merge: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the scan; see `visionssm_kernels._dispatch`. Differentiable by autograd when called directly."""
    dtype = accumulation_dtype(u)
    length = delta.shape[-1]
    x, _, step, B_l, C_l, gate = _prepare(u, delta, B, C, z, delta_bias, index, delta_softplus, reverse, dtype)
    drive = (step * x)[..., None, :] * B_l
    C_l = C_l.expand_as(drive)
    state = drive.new_zeros(drive.shape[:-1])
    checkpoints, ys = [], []
    for l in range(length):
        if l % CHUNK == 0:
            checkpoints.append(state)
        state = torch.exp(step[..., l, None] * A) * state + drive[..., l]
        ys.append((state * C_l[..., l]).sum(-1))
    y = torch.stack(ys, -1)
    if D is not None:
        y = y + D[..., None] * x
    if gate is not None:
        y = y * F.silu(gate)
    y = from_route(y, index, reverse)
    out = y.sum(1, keepdim=True) if merge else y
    return out.to(u.dtype), state, torch.stack(checkpoints, 3)


def _sum_to(grad: torch.Tensor, like: torch.Tensor, index: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """Gradient of B or C from its per-channel form (B, K, D, N, L): constants sum over time, groups over channels."""
    if like.ndim == 3:
        return grad.sum((0, -1))
    batch, routes, groups, state, length = like.shape
    return from_route(grad.view(batch, routes, groups, -1, state, length).sum(3), index, reverse)


def backward(
        dout: torch.Tensor,
        dlast_state: torch.Tensor | None,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        index: torch.Tensor | None,
        checkpoints: torch.Tensor,
        delta_softplus: bool,
        reverse: bool,
        merge: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the scan by the adjoint recurrence; see `visionssm_kernels._dispatch`."""
    dtype = accumulation_dtype(u)
    length = delta.shape[-1]
    x, raw, step, B_l, C_l, gate = _prepare(u, delta, B, C, z, delta_bias, index, delta_softplus, reverse, dtype)
    shape = (*delta.shape[:3], A.shape[-1], length)
    B_l, C_l = B_l.expand(shape), C_l.expand(shape)
    dy = to_route(dout.to(dtype).expand(-1, delta.shape[1], -1, -1), index, reverse)

    decay = torch.exp(step[..., None, :] * A[..., None])
    states = [torch.zeros_like(decay[..., 0])]
    for l in range(length):
        states.append(decay[..., l] * states[-1] + step[..., None, l] * B_l[..., l] * x[..., None, l])

    dz = None
    if z is not None:
        y = (torch.stack(states[1:], -1) * C_l).sum(3) + (0 if D is None else D[..., None] * x)
        sigmoid = torch.sigmoid(gate)
        dz = from_route(dy * y * sigmoid * (1 + gate * (1 - sigmoid)), index, reverse)
        dy = dy * F.silu(gate)

    dC = torch.stack(states[1:], -1) * dy[..., None, :]
    adjoints = []
    carry = torch.zeros_like(states[0]) if dlast_state is None else dlast_state.to(dtype)
    for l in reversed(range(length)):
        adjoint = carry + dy[..., None, l] * C_l[..., l]
        adjoints.append(adjoint)
        carry = decay[..., l] * adjoint
    dstate = torch.stack(adjoints[::-1], -1)
    dlog_decay = dstate * decay * torch.stack(states[:-1], -1)
    dA = (dlog_decay * step[..., None, :]).sum((0, -1))
    ddrive = (dstate * B_l).sum(3)
    dx = ddrive * step + (0 if D is None else D[..., None] * dy)
    dstep = (dlog_decay * A[..., None]).sum(3) + ddrive * x
    # softplus returns its argument beyond the threshold 20, so its slope is exactly 1 there
    draw = dstep * torch.where(raw > 20, torch.ones_like(raw), torch.sigmoid(raw)) if delta_softplus else dstep
    du = from_route(dx, index, reverse)
    return (du.sum(1, keepdim=True) if u.shape[1] < delta.shape[1] else du, from_route(draw, index, reverse), dA,
            _sum_to(dstate * (step * x)[..., None, :], B, index, reverse), _sum_to(dC, C, index, reverse),
            None if D is None else (dy * x).sum((0, -1)), dz,
            None if delta_bias is None else draw.sum((0, -1)))
