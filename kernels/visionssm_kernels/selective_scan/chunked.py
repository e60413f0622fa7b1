"""The selective scan in PyTorch operations alone, for any device: a stretch of positions at a time, in linear memory.

A stretch of S positions is laid out as T steps of S / T blocks, (T, S / T, B, K, D, N). The recurrence runs over the T
steps of all blocks at once, then over the few block ends, then the state at its start is added to each block: about
sqrt(S) small operations where the definition needs S. Stretches follow each other, so memory does not grow with N L.
"""
import math

import torch
from torch.nn import functional as F

from .._dispatch import CHUNK, accumulation_dtype
from .reference import from_route, to_route

_ELEMENTS = 1 << 20
"""States held at once: large enough to hide the cost of calling PyTorch, small enough for the caches."""


def _solve(
        decay: torch.Tensor,
        states: torch.Tensor,
        start: torch.Tensor,
        backwards: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solves s_l = decay_l s_{l-1} + drive_l over a stretch, in place.

    Args:
        decay: (T, S / T, ...).
        states: The drives, overwritten by the states, (T, S / T, ...).
        start: State before the stretch, (...).
        backwards: Runs from the last position to the first.

    Returns:
        The state after the stretch (...), and those before each block (S / T, ...).
    """
    steps, blocks = (range(size) if not backwards else range(size - 1, -1, -1) for size in decay.shape[:2])
    product = decay.clone()
    for previous, step in zip(steps, steps[1:]):
        states[step].addcmul_(decay[step], states[previous])
        product[step].mul_(product[previous])
    last = steps[-1]
    starts = torch.empty_like(states[last])
    for block in blocks:
        starts[block] = start
        start = torch.addcmul(states[last, block], product[last, block], start)
    states.addcmul_(product, starts)
    return start, starts


class _Problem:
    """Inputs in route order, padded to whole chunks and cut into stretches; position leading, (S, B, K, D) and so on.

    Padding has step 0 and input 0, which leaves a state as it is.
    """

    def __init__(
            self,
            u: torch.Tensor,
            delta: torch.Tensor,
            A: torch.Tensor,
            B: torch.Tensor,
            C: torch.Tensor,
            delta_bias: torch.Tensor | None,
            index: torch.Tensor | None,
            delta_softplus: bool,
            reverse: bool,
    ) -> None:
        self.dtype, self.index, self.reverse = accumulation_dtype(u), index, reverse
        self.batch, self.routes, self.dim, self.length = delta.shape
        self.A, self.state = A, A.shape[-1]
        self.x = self.sequence(u)
        self.raw = self.sequence(delta)
        if delta_bias is not None:
            self.raw = self.raw + delta_bias
        self.step = F.softplus(self.raw) if delta_softplus else self.raw
        if delta_bias is not None or delta_softplus:
            self.step[self.length:] = 0
        self.B, self.C = self.matrix(B), self.matrix(C)
        chunks = math.ceil(self.length / CHUNK)
        per_stretch = max(_ELEMENTS // (CHUNK * self.batch * self.routes * self.dim * self.state), 1)
        stretch = CHUNK * min(per_stretch, chunks)
        self.stretches = [slice(i, min(i + stretch, chunks * CHUNK)) for i in range(0, chunks * CHUNK, stretch)]
        self.steps = 8 if stretch <= CHUNK else 16 if stretch <= 8 * CHUNK else 32

    def sequence(self, x: torch.Tensor) -> torch.Tensor:
        """Reads a map along the routes: (B, K or 1, ..., L) -> (whole chunks, B, K or 1, ...)."""
        x = to_route(x.to(self.dtype), self.index, self.reverse)
        x = F.pad(x, (0, -self.length % CHUNK))
        return x.movedim(-1, 0).contiguous()

    def matrix(self, x: torch.Tensor) -> torch.Tensor:
        """B or C as (positions or 1, B, K, D or 1, N)."""
        if x.ndim == 3:
            return x.to(self.dtype)[None, None]
        x = self.sequence(x)
        return x if x.shape[3] == 1 else x.repeat_interleave(self.dim // x.shape[3], dim=3)

    def blocks(self, x: torch.Tensor, stretch: slice) -> torch.Tensor:
        """Cuts a stretch out: (positions, ...) -> (T, S / T, ...); what is constant over time stays so."""
        return x[None] if x.shape[0] == 1 else x[stretch].unflatten(0, (-1, self.steps)).transpose(0, 1)

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `blocks`: (T, S / T, ...) -> (S, ...)."""
        return x.transpose(0, 1).flatten(0, 1)

    def states(self, stretch: slice, start: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns decays, states, the state after the stretch and those before each block."""
        step = self.blocks(self.step, stretch)[..., None]
        decay = torch.exp(step * self.A)
        states = step * self.blocks(self.x, stretch)[..., None] * self.blocks(self.B, stretch)
        end, starts = _solve(decay, states, start, backwards=False)
        return decay, states, end, starts

    def maps(self, sequence: torch.Tensor) -> torch.Tensor:
        """Puts (whole chunks, B, K, ...) back on the pixels: (B, K, ..., L)."""
        return from_route(sequence[:self.length].movedim(0, -1), self.index, self.reverse)

    def sum_to(self, grads: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Gradient of B or C from its stretches, (S, B, K, D or 1, N) each; constant ones are summed already."""
        if like.ndim == 3:
            return torch.stack(grads).sum(0)
        grad = torch.cat(grads)
        grad = grad.unflatten(3, (like.shape[2], -1)).sum(4)
        return self.maps(grad)


def _contract(states: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Sum over states: (T, S / T, B, K, D, N) with (..., D or 1, N) -> (T, S / T, B, K, D)."""
    if matrix.shape[-2] == 1 and matrix.shape[0] > 1:
        return (states @ matrix.transpose(-1, -2))[..., 0]
    return (states * matrix).sum(-1)


def _outer_sum(problem: _Problem, weights: torch.Tensor, states: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gradient of B or C in a stretch: weights (T, S / T, B, K, D) times states, summed as far as the form allows."""
    if like.ndim == 3:
        return torch.einsum('tsbkd,tsbkdn->kdn', weights, states)
    if like.shape[2] == 1:
        return problem.flat(weights[..., None, :] @ states)
    return problem.flat(weights[..., None] * states)


def _dgate(
        y: torch.Tensor,
        x: torch.Tensor,
        D: torch.Tensor | None,
        gate: torch.Tensor,
        dgated: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the gate z of (y + D x) silu(z)."""
    sigmoid = torch.sigmoid(gate)
    return dgated * (y if D is None else y + D * x) * sigmoid * (1 + gate * (1 - sigmoid))


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
    """Runs the scan; see `visionssm_kernels._dispatch`."""
    problem = _Problem(u, delta, A, B, C, delta_bias, index, delta_softplus, reverse)
    state = A.new_zeros(problem.batch, *A.shape)
    ys, checkpoints = [], []
    for stretch in problem.stretches:
        _, states, state, starts = problem.states(stretch, state)
        ys.append(problem.flat(_contract(states, problem.blocks(problem.C, stretch))))
        checkpoints.append(starts[::CHUNK // problem.steps])
    y = torch.cat(ys)
    if D is not None:
        y = y + problem.x * D
    if z is not None:
        y = y * F.silu(problem.sequence(z))
    out = problem.maps(y)
    out = out.sum(1, keepdim=True) if merge else out
    return out.to(u.dtype).contiguous(), state, torch.cat(checkpoints).movedim(0, 3).contiguous()


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
    """Gradients of the scan; see `visionssm_kernels._dispatch`."""
    problem = _Problem(u, delta, A, B, C, delta_bias, index, delta_softplus, reverse)
    dy = problem.sequence(dout.expand(-1, problem.routes, -1, -1))
    gate = None if z is None else problem.sequence(z)
    dgated = dy
    dy = dy if gate is None else dy * F.silu(gate)
    carry = A.new_zeros(problem.batch, *A.shape) if dlast_state is None else dlast_state.to(problem.dtype)
    dA, ys, ddrives, dsteps, dB, dC = torch.zeros_like(A), [], [], [], [], []
    for stretch in reversed(problem.stretches):
        decay, states, _, starts = problem.states(stretch, checkpoints[:, :, :, stretch.start // CHUNK])
        B_l, C_l, dy_l = (problem.blocks(x, stretch) for x in (problem.B, problem.C, dy))
        step, x = problem.blocks(problem.step, stretch), problem.blocks(problem.x, stretch)
        dC.append(_outer_sum(problem, dy_l, states, C))
        if gate is not None:
            ys.append(problem.flat(_contract(states, C_l)))
        # carried_l is what reaches the state before l, decay_l dstate_l, with dstate_l = dy_l C_l + carried_{l+1}
        dstate = dy_l[..., None] * C_l
        carried = decay * dstate
        end = carry
        carry, ends = _solve(decay, carried, carry, backwards=True)
        dstate[:-1] += carried[1:]
        dstate[-1, :-1] += carried[0, 1:]
        dstate[-1, -1] += end
        ddrives.append(problem.flat(_contract(dstate, B_l)))
        dB.append(_outer_sum(problem, step * x, dstate, B))
        carried[1:] *= states[:-1]
        carried[0] *= starts
        dA += torch.einsum('tsbkdn,tsbkd->kdn', carried, step)
        dsteps.append(problem.flat((carried * A).sum(-1)))
    ddrive, dstep = torch.cat(ddrives[::-1]), torch.cat(dsteps[::-1])
    dx = ddrive * problem.step + (0 if D is None else D * dy)
    draw = dstep + ddrive * problem.x
    if delta_softplus:
        # softplus returns its argument beyond the threshold 20, so its slope is exactly 1 there
        draw = draw * torch.where(problem.raw > 20, torch.ones_like(draw), torch.sigmoid(problem.raw))
    draw[problem.length:] = 0
    dz = None if gate is None else problem.maps(_dgate(torch.cat(ys[::-1]), problem.x, D, gate, dgated))
    du = problem.maps(dx)
    return (du.sum(1, keepdim=True) if u.shape[1] < problem.routes else du, problem.maps(draw), dA,
            problem.sum_to(dB[::-1], B), problem.sum_to(dC[::-1], C),
            None if D is None else (dy * problem.x).sum((0, 1)), dz,
            None if delta_bias is None else draw.sum((0, 1)))
