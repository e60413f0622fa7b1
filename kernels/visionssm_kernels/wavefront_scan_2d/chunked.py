"""The wavefront scan in PyTorch operations alone, for any device: a band of rows at a time, in linear memory.

Pixels of one anti-diagonal do not depend on each other. A band of R rows is skewed, row r moved r places to the right,
so that its W + R - 1 anti-diagonals are the leading axis of every tensor, (K, R, B, D, N): two small operations an
anti-diagonal solve the recurrence, and everything else works on the whole band. Bands follow each other, so memory does
not grow with N H W.
"""
import torch
from torch.nn import functional as F

from .._dispatch import accumulation_dtype
from .reference import ROWS, finish_steps, mean_weights, turn

_ELEMENTS = 1 << 20
"""States held at once: large enough to hide the cost of calling PyTorch, small enough for the caches."""


def _skew(x: torch.Tensor) -> torch.Tensor:
    """Moves row r of (R, W, ...) by r places, zeros elsewhere: (W + R - 1, R, ...), anti-diagonals leading."""
    rows, width = x.shape[:2]
    padded = torch.cat([x, x.new_zeros(rows, rows, *x.shape[2:])], 1).flatten(0, 1)
    return padded[:-rows].unflatten(0, (rows, width + rows - 1)).transpose(0, 1).contiguous()


def _straighten(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `_skew`: (W + R - 1, R, ...) -> (R, W, ...)."""
    diagonals, rows = x.shape[:2]
    flat = x.transpose(0, 1).flatten(0, 1)
    padded = torch.cat([flat, flat.new_zeros(rows, *x.shape[2:])])
    return padded.unflatten(0, (rows, diagonals + 1))[:, :diagonals + 1 - rows]


class _Problem:
    """Inputs in the order of the scan, pixels leading: (H, W, B, D) and (H, W, B, N); and the bands of rows."""

    def __init__(
            self,
            u: torch.Tensor,
            delta_top: torch.Tensor,
            delta_left: torch.Tensor,
            A_top: torch.Tensor,
            A_left: torch.Tensor,
            B_top: torch.Tensor,
            B_left: torch.Tensor,
            C: torch.Tensor,
            bias_top: torch.Tensor | None,
            bias_left: torch.Tensor | None,
            delta_softplus: bool,
            reverse: bool,
    ) -> None:
        self.dtype, self.reverse = accumulation_dtype(u), reverse
        self.batch, self.dim, self.height, self.width = u.shape
        self.state = A_top.shape[1]
        self.x, self.C = self.pixels(u), self.pixels(C)
        self.A, self.B = (A_left, A_top), (self.pixels(B_left), self.pixels(B_top))
        self.steps, self.slopes = zip(*(
            (self.pixels(step), self.pixels(slope)) for step, slope in (
                finish_steps(delta.to(self.dtype), bias, delta_softplus)
                for delta, bias in ((delta_left, bias_left), (delta_top, bias_top)))))
        self.weights = tuple(weight[..., None, None] for weight in mean_weights(self.height, self.width, self.x))
        per_rows = ROWS * self.width * self.batch * self.dim * self.state
        band = ROWS * max(_ELEMENTS // per_rows, 1)
        self.bands = [slice(i, min(i + band, self.height)) for i in range(0, self.height, band)]

    def pixels(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ..., H, W) -> (H, W, B, ...) in the order of the scan."""
        return turn(x.to(self.dtype), self.reverse).permute(2, 3, 0, 1)

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `pixels`."""
        return turn(x.permute(2, 3, 0, 1), self.reverse)

    def solve(self, band: slice, above: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the states of a band and the weighted decays from the left and from above, each (K, R, B, D, N).

        Args:
            band: Rows of the band.
            above: States of the row above it, (W, B, D, N).
        """
        x = _skew(self.x[band])[..., None]
        decays, states = [], None
        for A, B, steps, weights in zip(self.A, self.B, self.steps, self.weights):
            step, weight = _skew(steps[band])[..., None], _skew(weights[band])[..., None]
            decays.append(torch.exp(step * A).mul_(weight))
            drive = (weight * step * x) * _skew(B[band])[..., None, :]
            states = drive if states is None else states.add_(drive)
        from_left, from_top = decays
        states[:self.width, 0].addcmul_(from_top[:self.width, 0], above)
        for k in range(1, states.shape[0]):
            states[k].addcmul_(from_left[k], states[k - 1])
            states[k, 1:].addcmul_(from_top[k, 1:], states[k - 1, :-1])
        return states, decays


def forward(
        u: torch.Tensor,
        delta_top: torch.Tensor,
        delta_left: torch.Tensor,
        A_top: torch.Tensor,
        A_left: torch.Tensor,
        B_top: torch.Tensor,
        B_left: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        bias_top: torch.Tensor | None,
        bias_left: torch.Tensor | None,
        delta_softplus: bool,
        reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the scan; see `reference`."""
    problem = _Problem(u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, bias_top, bias_left, delta_softplus,
                       reverse)
    width = problem.width
    above = A_top.new_zeros(width, problem.batch, *A_top.shape)
    ys, checkpoints = [], [above]
    for band in problem.bands:
        states, _ = problem.solve(band, above)
        ys.append(_straighten((states @ _skew(problem.C[band])[..., None])[..., 0]))
        rows = states.shape[1]
        ends = [states[r:r + width, r] for r in (*range(ROWS - 1, rows - 1, ROWS), rows - 1)]
        checkpoints += [end.clone() for end in ends]
        above = checkpoints[-1]
    y = torch.cat(ys)
    if D is not None:
        y = y + problem.x * D
    kept = torch.stack(checkpoints[:(problem.height + ROWS - 1) // ROWS])  # (J, W, B, D, N)
    return problem.maps(y).to(u.dtype).contiguous(), kept.permute(2, 0, 4, 1, 3).contiguous()


def _side_gradients(
        problem: _Problem,
        band: slice,
        side: int,
        dstate: torch.Tensor,
        carried: torch.Tensor,
        before: torch.Tensor,
        x: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of a band through the step from one side.

    Args:
        problem: The problem.
        band: Rows of the band.
        side: 0 for left, 1 for top.
        dstate: Adjoint states, (K, R, B, D, N).
        carried: Adjoint states times decays; overwritten.
        before: States that the step started from.
        x: The input, (K, R, B, D).

    Returns:
        Of the step and of u (R, W, B, D), of B (R, W, B, N), and of A (D, N).
    """
    step, weight = _skew(problem.steps[side][band]), _skew(problem.weights[side][band])
    carried.mul_(before)
    ddrive = weight * (dstate @ _skew(problem.B[side][band])[..., None])[..., 0]
    dstep = (carried * problem.A[side]).sum(-1) + ddrive * x
    dB = ((weight * step * x)[..., None, :] @ dstate)[..., 0, :]
    return (_straighten(dstep), _straighten(ddrive * step), _straighten(dB),
            torch.einsum('krbdn,krbd->dn', carried, step))


def backward(
        dout: torch.Tensor,
        u: torch.Tensor,
        delta_top: torch.Tensor,
        delta_left: torch.Tensor,
        A_top: torch.Tensor,
        A_left: torch.Tensor,
        B_top: torch.Tensor,
        B_left: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        bias_top: torch.Tensor | None,
        bias_left: torch.Tensor | None,
        checkpoints: torch.Tensor,
        delta_softplus: bool,
        reverse: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the scan; see `reference`."""
    problem = _Problem(u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, bias_top, bias_left, delta_softplus,
                       reverse)
    width = problem.width
    dy = problem.pixels(dout)
    carry = A_top.new_zeros(width, problem.batch, *A_top.shape)
    dCs: list[torch.Tensor] = []
    sides: tuple[list[tuple[torch.Tensor, ...]], ...] = ([], [])
    for band in reversed(problem.bands):
        above = checkpoints[:, band.start // ROWS].permute(2, 0, 3, 1)  # (B, N, W, D) -> (W, B, D, N)
        states, decays = problem.solve(band, above)
        x, dy_k, C_k = (_skew(m[band]) for m in (problem.x, dy, problem.C))
        dCs.append(_straighten((dy_k[..., None, :] @ states)[..., 0, :]))
        dstate = dy_k[..., None] * C_k[..., None, :]
        rows = dstate.shape[1]
        dstate[rows - 1:, rows - 1] += carry
        from_left, from_top = decays
        for k in range(dstate.shape[0] - 2, -1, -1):
            dstate[k].addcmul_(from_left[k + 1], dstate[k + 1])
            dstate[k, :-1].addcmul_(from_top[k + 1, 1:], dstate[k + 1, 1:])
        carried_left, carried_top = from_left.mul_(dstate), from_top.mul_(dstate)
        carry = carried_top[:width, 0].clone()
        before = F.pad(states[:-1], (0, 0, 0, 0, 0, 0, 0, 0, 1, 0))
        sides[0].append(_side_gradients(problem, band, 0, dstate, carried_left, before, x))
        before[:, 1:] = before[:, :-1].clone()
        before[:, 0] = 0
        before[:width, 0] = above
        sides[1].append(_side_gradients(problem, band, 1, dstate, carried_top, before, x))
    return _collect(problem, dy, D, dCs, sides, (bias_left, bias_top))


def _collect(
        problem: _Problem,
        dy: torch.Tensor,
        D: torch.Tensor | None,
        dCs: list[torch.Tensor],
        sides: tuple[list[tuple[torch.Tensor, ...]], ...],
        biases: tuple[torch.Tensor | None, torch.Tensor | None],
) -> tuple[torch.Tensor | None, ...]:
    """Puts the gradients of the bands, last band first, together in the order of `backward`."""
    du = 0 if D is None else D * dy
    ddelta, dA, dB, dbias = [], [], [], []
    for parts, slope, bias in zip(sides, problem.slopes, biases):
        dsteps, dus, dBs, dAs = zip(*parts)
        du = du + torch.cat(dus[::-1])
        draw = torch.cat(dsteps[::-1]) * slope
        ddelta.append(problem.maps(draw))
        dbias.append(None if bias is None else draw.sum((0, 1, 2)))
        dA.append(torch.stack(dAs).sum(0))
        dB.append(problem.maps(torch.cat(dBs[::-1])))
    dC = problem.maps(torch.cat(dCs[::-1]))
    return (problem.maps(du), ddelta[1], ddelta[0], dA[1], dA[0], dB[1], dB[0], dC,
            None if D is None else (dy * problem.x).sum((0, 1, 2)), dbias[1], dbias[0])
