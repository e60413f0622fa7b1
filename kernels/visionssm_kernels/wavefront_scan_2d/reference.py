"""The wavefront scan as written down: pixel by pixel, in any floating dtype.

    h[i,j] = cl (exp(dl Al) h[i,j-1] + dl Bl u) + ct (exp(dt At) h[i-1,j] + dt Bt u)        y = <C, h> + D u

with every step, B, C and u taken at the pixel (i, j) itself and zero states outside the map. (cl, ct) is (1, 0) in the
top row, (0, 1) in the left column below it, and (1/2, 1/2) elsewhere (Mamba2D, arXiv 2412.16146).

Every backend of `wavefront_scan_2d` exposes the two functions of this module, called underneath autograd. Inputs:

    u, delta_top, delta_left     (B, D, H, W), any floating dtype each, any strides
    A_top, A_left                (D, N), in the accumulation dtype, contiguous
    B_top, B_left, C             (B, N, H, W), any floating dtype each, any strides
    D, bias_top, bias_left       (D,) or None, in the accumulation dtype, contiguous
    delta_softplus               the steps are softplus(delta + bias), else delta + bias
    reverse                      the scan starts in the bottom right corner: that of the map rotated by 180 degrees

B, D, N, H, W >= 1. `forward` returns out (B, D, H, W) in the dtype of u, and the checkpoints
(B, ceil(H / ROWS), N, W, D), contiguous, in the accumulation dtype: the states of the row before row j * ROWS in the
order of the scan, zeros for j = 0. Checkpoints written by one backend are read by another. `backward` returns the
gradients of the eleven tensors in their shapes, in any floating dtype, None where the input is None. `out` and the
gradients may have any layout: the op wants that of `torch.empty_like` of u and of each input, and copies the others.
"""
import torch
from torch.nn import functional as F

from .._dispatch import accumulation_dtype

ROWS = 8
"""Rows between two state checkpoints; memory of a scan is O(B D H W (1 + N / ROWS))."""


def turn(x: torch.Tensor | None, reverse: bool) -> torch.Tensor | None:
    """Puts a map (..., H, W) into the order of the scan, or back."""
    return x.flip(-2, -1) if reverse and x is not None else x


def mean_weights(height: int, width: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights of the step from the left and of the step from above, each (H, W)."""
    left = like.new_full((height, width), 0.5)
    left[:, 0] = 0
    left[0] = 1
    return left, 1 - left


def finish_steps(
        delta: torch.Tensor,
        bias: torch.Tensor | None,
        delta_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns steps (B, D, H, W) and their slopes by delta."""
    raw = delta if bias is None else delta + bias[:, None, None]
    if not delta_softplus:
        return raw, torch.ones_like(raw)
    # softplus returns its argument beyond the threshold 20, so its slope is exactly 1 there
    return F.softplus(raw), torch.where(raw > 20, torch.ones_like(raw), torch.sigmoid(raw))


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
    """Runs the scan; see the module. Differentiable by autograd when called directly."""
    dtype = accumulation_dtype(u)
    u_, delta_top, delta_left, B_top, B_left, C = (
        turn(x.to(dtype), reverse) for x in (u, delta_top, delta_left, B_top, B_left, C))
    step_top, step_left = (finish_steps(delta, bias, delta_softplus)[0]
                           for delta, bias in ((delta_top, bias_top), (delta_left, bias_left)))
    height, width = u.shape[2:]
    left_weight, top_weight = mean_weights(height, width, u_)
    above = [u_.new_zeros(u.shape[0], *A_top.shape)] * width
    rows, checkpoints = [], []
    for i in range(height):
        if i % ROWS == 0:
            checkpoints.append(torch.stack(above, 1).movedim(3, 1))
        state, row, ys = torch.zeros_like(above[0]), [], []
        for j in range(width):
            x, step_t, step_l = (m[:, :, i, j, None] for m in (u_, step_top, step_left))
            from_left = torch.exp(step_l * A_left) * state + step_l * B_left[:, None, :, i, j] * x
            from_top = torch.exp(step_t * A_top) * above[j] + step_t * B_top[:, None, :, i, j] * x
            state = left_weight[i, j] * from_left + top_weight[i, j] * from_top
            ys.append((state * C[:, None, :, i, j]).sum(-1))
            row.append(state)
        above = row
        rows.append(torch.stack(ys, -1))
    out = torch.stack(rows, -2)
    if D is not None:
        out = out + D[:, None, None] * u_
    return turn(out, reverse).to(u.dtype).contiguous(), torch.stack(checkpoints, 1).contiguous()


def _states(
        decay_top: torch.Tensor,
        decay_left: torch.Tensor,
        drive: torch.Tensor,
) -> torch.Tensor:
    """All states from weighted decays and drives, each (H, W, B, D, N)."""
    states = torch.zeros_like(drive)
    for i in range(drive.shape[0]):
        for j in range(drive.shape[1]):
            state = drive[i, j]
            if j > 0:
                state = state + decay_left[i, j] * states[i, j - 1]
            if i > 0:
                state = state + decay_top[i, j] * states[i - 1, j]
            states[i, j] = state
    return states


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
    """Gradients by the adjoint recurrence from the last pixel to the first; see the module."""
    dtype = accumulation_dtype(u)
    x, dy, B_top, B_left, C = (turn(m.to(dtype), reverse).permute(2, 3, 0, 1) for m in (u, dout, B_top, B_left, C))
    height, width = x.shape[:2]
    sides = []
    for delta, bias, A, B, weight in zip(
            (delta_left, delta_top), (bias_left, bias_top), (A_left, A_top), (B_left, B_top),
            mean_weights(height, width, x)):
        step, slope = (m.permute(2, 3, 0, 1)
                       for m in finish_steps(turn(delta.to(dtype), reverse), bias, delta_softplus))
        weight = weight[..., None, None, None]
        sides.append((step, slope, A, B[..., None, :], weight, weight * torch.exp(step[..., None] * A)))
    left, top = sides
    drive = sum(weight * step[..., None] * B * x[..., None] for step, _, _, B, weight, _ in sides)
    states = _states(top[5], left[5], drive)
    # the adjoint runs through the same recurrence from the other corner, with the decays of the next pixels
    shifted = [F.pad(decay, (*[0] * (2 * (4 - axis)), -1, 1), value=0.) for axis, decay in ((0, top[5]), (1, left[5]))]
    source = dy[..., None] * C[..., None, :]
    dstate = _states(*(m.flip(0, 1) for m in (*shifted, source))).flip(0, 1)

    du = torch.zeros_like(dy) if D is None else D * dy
    grads = []
    for axis, (step, slope, A, B, weight, decay) in zip((1, 0), sides):
        before = F.pad(states, (*[0] * (2 * (4 - axis)), 1, -1))
        dlog_decay = dstate * decay * before
        ddrive = (weight * dstate * B).sum(-1)
        du = du + ddrive * step
        ddelta = ((dlog_decay * A).sum(-1) + ddrive * x) * slope
        dB = (weight * dstate * (step * x)[..., None]).sum(3)
        grads.append((ddelta, (dlog_decay * step[..., None]).sum((0, 1, 2)), dB, ddelta.sum((0, 1, 2))))
    (ddelta_l, dA_l, dB_l, dbias_l), (ddelta_t, dA_t, dB_t, dbias_t) = grads
    dC = (dy[..., None] * states).sum(3)
    du, ddelta_t, ddelta_l, dB_t, dB_l, dC = (
        turn(m.permute(2, 3, 0, 1), reverse) for m in (du, ddelta_t, ddelta_l, dB_t, dB_l, dC))
    return (du, ddelta_t, ddelta_l, dA_t, dA_l, dB_t, dB_l, dC, None if D is None else (dy * x).sum((0, 1, 2)),
            None if bias_top is None else dbias_t, None if bias_left is None else dbias_l)
