"""The scan of Mamba-2 in matrix products, for any device: chunk by chunk, in linear memory.

Within a chunk of Q positions the output is a masked quadratic form, y_i = sum_{j <= i} <C_i, B_j> W_ij step_j x_j with
W_ij = exp(sum_{j < k <= i} step_k A); from chunk to chunk a state (P, N) a head is passed. The sums are taken over the
segments themselves, not as differences of running sums: those cancel where one step is large, and would have to be
exponentiated with the wrong sign above the diagonal. Stretches of chunks follow each other, so W is never whole.

Axes: chunks, batch, groups G, positions Q, heads of a group R, channels P; a chunk of B and C is (.., G, Q, N).
"""
import math

import torch
from torch.nn import functional as F

from .._dispatch import accumulation_dtype
from .reference import chunk_length, steps

_ELEMENTS = 1 << 20
"""Elements of W held at once: large enough to hide the cost of calling PyTorch, small enough for the caches."""


def segment_decays(log_decay: torch.Tensor) -> torch.Tensor:
    """Returns W (..., Q, Q) of log decays (..., Q): exp of the sum over j < k <= i at [i, j], 0 above the diagonal."""
    position = torch.arange(log_decay.shape[-1], device=log_decay.device)
    later, earlier = position[:, None] > position, position[:, None] < position
    # masked before the sum, so that an infinite step cannot meet itself, and after it, so that exp sees no wrong sign
    sums = torch.where(later, log_decay[..., None], torch.zeros_like(log_decay[..., None])).cumsum(-2)
    return torch.exp(sums.masked_fill(earlier, -math.inf))


class _Problem:
    """Inputs in scan order, padded to whole chunks. Padding has step 0 and input 0, which leaves a state as it is."""

    def __init__(
            self,
            x: torch.Tensor,
            dt: torch.Tensor,
            A: torch.Tensor,
            B: torch.Tensor,
            C: torch.Tensor,
            dt_bias: torch.Tensor | None,
            step_options: tuple[bool, float, float],
            reverse: bool,
            chunk: int | None,
    ) -> None:
        self.dtype, self.reverse = accumulation_dtype(x), reverse
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups, self.state = B.shape[2:]
        self.chunk = chunk or chunk_length(self.length)
        self.chunks = math.ceil(self.length / self.chunk)
        self.A = A.view(self.groups, 1, -1)
        self.x = self.by_head(x)
        step, slope = steps(dt.to(self.dtype), dt_bias, *step_options)
        self.step, self.slope = self.cut(step), self.cut(slope)  # (chunks, B, G, Q, R)
        self.B, self.C = self.cut(B)[..., 0, :], self.cut(C)[..., 0, :]
        per_stretch = max(_ELEMENTS // (self.batch * self.heads * self.chunk ** 2), 1)
        self.stretches = [slice(i, i + per_stretch) for i in range(0, self.chunks, per_stretch)]

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, M or G, ...) -> (chunks, B, G, Q, R, ...) of the heads, or with R = 1 of the groups."""
        x = x.to(self.dtype)
        x = x.flip(1) if self.reverse else x
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.chunks * self.chunk - self.length))
        x = x.unflatten(2, (self.groups, -1)).unflatten(1, (self.chunks, self.chunk))
        return x.movedim((1, 3), (0, 2)).contiguous()

    def by_head(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """(B, L, M, P) -> (chunks, B, G, Q, R, P)."""
        return None if x is None else self.cut(x)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `cut`: (chunks, B, G, Q, R, ...) -> (B, L, G * R, ...)."""
        x = x.movedim((0, 2), (1, 3)).flatten(3, 4).flatten(1, 2)[:, :self.length]
        return x.flip(1) if self.reverse else x

    def by_group(self, states: torch.Tensor) -> torch.Tensor:
        """(..., M, P, N) -> (..., G, R, P, N)."""
        return states.unflatten(-3, (self.groups, -1))

    def decays(self, stretch: slice) -> tuple[torch.Tensor, ...]:
        """Decays of a stretch: from the start of each chunk (.., G, Q, R, 1), W (.., G, R, Q, Q), to its end (.., G, Q,
        R, 1), and over all of it (.., G, R, 1, 1)."""
        log_decay = (self.step[stretch] * self.A).mT
        since_start = torch.exp(log_decay.cumsum(-1))
        within = segment_decays(log_decay)
        to_end = within[..., -1, :].mT[..., None].clone()  # callers overwrite W
        return since_start.mT[..., None], within, to_end, since_start[..., -1:, None]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(.., Q, R, P) -> (.., Q, R P)."""
    return x.flatten(-2)


def _pass_on(whole: torch.Tensor, local: torch.Tensor, carry: torch.Tensor, backwards: bool) -> torch.Tensor:
    """Overwrites what each chunk adds to the state, (chunks, ...), by the state it meets; returns the one left over."""
    order = range(len(local) - 1, -1, -1) if backwards else range(len(local))
    for chunk in order:
        met, carry = carry, torch.addcmul(local[chunk], whole[chunk], carry)
        local[chunk] = met
    return carry


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
        chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the scan; see `reference`. `chunk` replaces the chunk length, for tests."""
    p = _Problem(x, dt, A, B, C, dt_bias, (dt_softplus, dt_min, dt_max), reverse, chunk)
    if initial_states is None:
        initial_states = A.new_zeros(p.batch, p.heads, p.width, p.state)
    carry, ys, starts = p.by_group(initial_states), [], []
    for stretch in p.stretches:
        since_start, within, to_end, whole = p.decays(stretch)
        B_l, C_l, drive = p.B[stretch], p.C[stretch], p.step[stretch][..., None] * p.x[stretch]
        states = (_rows(drive * to_end).mT @ B_l).unflatten(-2, (-1, p.width))
        carry = _pass_on(whole, states, carry, backwards=False)
        within *= (C_l @ B_l.mT)[:, :, :, None]
        y = (C_l @ states.flatten(3, 4).mT).view_as(drive) * since_start
        ys.append(y.add_((within @ drive.transpose(3, 4)).transpose(3, 4)))
        starts.append(states)
    y = torch.cat(ys)
    if D is not None:
        y.addcmul_(p.x, D.view(p.groups, 1, -1, p.width))
    if z is not None:
        y.mul_(F.silu(p.by_head(z)))
    return (p.join(y).to(x.dtype).contiguous(), carry.flatten(1, 2).contiguous(),
            torch.cat(starts).flatten(2, 3).movedim(0, 2).contiguous())


def _dlog_decay(
        dsegments: torch.Tensor,
        dsince_start: torch.Tensor,
        dto_end: torch.Tensor,
        dwhole: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the log decays: position k gets that of every segment it lies in.

    Args:
        dsegments: By log W, (.., R, Q, Q).
        dsince_start: By the log decay from the start of the chunk to a position, (.., R, Q).
        dto_end: By the one from a position to the end, (.., R, Q).
        dwhole: By the one over the chunk, (.., R, 1).

    Returns:
        (.., R, Q).
    """
    until = (dsegments.flip(-2).cumsum(-2).flip(-2) + dto_end[..., None, :]).tril(-1).sum(-1)
    return until + dsince_start.flip(-1).cumsum(-1).flip(-1) + dwhole


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
        chunk: int | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the scan; see `reference`. `chunk` must be that of the forward pass."""
    p = _Problem(x, dt, A, B, C, dt_bias, (dt_softplus, dt_min, dt_max), reverse, chunk)
    dy, gate = p.by_head(dout), p.by_head(z)
    dgated = dy
    dy = dy if gate is None else dy * F.silu(gate)
    carry = torch.zeros_like(starts[:, :, 0]) if dfinal_states is None else dfinal_states.to(p.dtype)
    carry, parts = p.by_group(carry), []
    starts = p.by_group(starts.movedim(2, 0))
    for stretch in reversed(p.stretches):
        carry, part = _chunk_gradients(p, stretch, starts[stretch], carry, dy[stretch], gate is not None)
        parts.append(part)
    ddrive, dlog_decay, dB, dC, y = (None if t[0] is None else torch.cat(t[::-1]) for t in zip(*parts))
    ddt = (dlog_decay * p.A + (ddrive * p.x).sum(-1)) * p.slope
    dx = ddrive * p.step[..., None]
    D_l = None if D is None else D.view(p.groups, 1, -1, p.width)
    dx = dx if D is None else dx.addcmul_(dy, D_l)
    dz = None
    if gate is not None:
        y = y if D is None else y.addcmul_(p.x, D_l)
        sigmoid = torch.sigmoid(gate)
        dz = p.join(dgated * y * sigmoid * (1 + gate * (1 - sigmoid)))
    over_positions = (0, 1, 3)
    return (p.join(dx), p.join(ddt), (dlog_decay * p.step).sum(over_positions).flatten(),
            p.join(dB[..., None, :]), p.join(dC[..., None, :]),
            None if D is None else (dy * p.x).sum(over_positions).flatten(0, 1), dz,
            None if dt_bias is None else ddt.sum(over_positions).flatten(),
            None if initial_states is None else carry.flatten(1, 2))


def _chunk_gradients(
        p: _Problem,
        stretch: slice,
        starts: torch.Tensor,
        carry: torch.Tensor,
        dy: torch.Tensor,
        wants_y: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Gradients within a stretch.

    Args:
        p: The problem.
        stretch: Its chunks.
        starts: States before them, (.., G, R, P, N).
        carry: Gradient of the state after the last one, (B, G, R, P, N).
        dy: Gradient of the output before the gate, (.., G, Q, R, P).
        wants_y: Recomputes that output, without D.

    Returns:
        The gradient of the state before the first chunk, and the gradients of step x (.., G, Q, R, P), of the log decay
        (.., G, Q, R), of B and of C (.., G, Q, N), and y (.., G, Q, R, P) or None.
    """
    since_start, within, to_end, whole = p.decays(stretch)
    B, C, drive = p.B[stretch], p.C[stretch], p.step[stretch][..., None] * p.x[stretch]
    entering, leaving = _rows(dy * since_start), _rows(drive * to_end)
    ends = (entering.mT @ C).unflatten(-2, (-1, p.width))
    carry = _pass_on(whole, ends, carry, backwards=True)
    by_head, dy_by_head = drive.transpose(3, 4), dy.transpose(3, 4).contiguous()
    scores = (C @ B.mT)[:, :, :, None]
    dweights = (dy_by_head @ by_head.mT).mul_(within)  # by <C_i, B_j>
    within *= scores
    ddrive = (B @ ends.flatten(3, 4).mT).view_as(drive) * to_end
    dto_end = (ddrive * drive).sum(-1).mT
    ddrive.add_((within.mT @ dy_by_head).transpose(3, 4))
    y = (C @ starts.flatten(3, 4).mT).view_as(drive) * since_start
    dsince_start = (y * dy).sum(-1).mT
    if wants_y:
        y.add_((within @ by_head).transpose(3, 4))
    dscores = dweights.sum(3)
    dC = dscores @ B + entering @ starts.flatten(3, 4)
    dB = dscores.mT @ C + leaving @ ends.flatten(3, 4)
    dwhole = (whole * starts * ends).sum((-1, -2))[..., None]
    dlog_decay = _dlog_decay(dweights.mul_(scores), dsince_start, dto_end, dwhole)
    return carry, (ddrive, dlog_decay.mT, dB, dC, y if wants_y else None)
