"""The recurrences of the kernels as two loop ops that an exporter turns into a loop of the target format.

`export_decompositions` of the kernels makes graphs without loops, whose memory and work grow with the state and the
logarithm of the length. A runtime that knows loops, such as ONNX's `Scan`, does better with one step after the other:
what a step touches stays in the cache. Here the ops of the kernels become what is before and after the loop in ATen
operations, and the loop itself one op, `visionssm_export::time_loop` or `visionssm_export::diagonal_loop`.
"""
from collections.abc import Callable

import torch
from torch.nn import functional as F

from visionssm_kernels import export_decompositions

__all__ = ['DIAGONAL_LOOP', 'TIME_LOOP', 'loop_decompositions']


@torch.library.custom_op('visionssm_export::time_loop', mutates_args=())
def _time_loop(
        A: torch.Tensor,
        step: torch.Tensor,
        drive: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h <- exp(step A) h + drive B, y = sum over N of h C, along the first dimension.

    Channels come last, where runtimes vectorise; the state, with few values, before them.

    Args:
        A: Decay rates, (..., N, D), broadcast against the rest.
        step: (L, ..., 1, D).
        drive: (L, ..., 1, D).
        B: (L, ..., N, 1), or (L, ..., N, D).
        C: Like B.

    Returns:
        The last state (..., N, D), and y (L, ..., 1, D).
    """
    state = torch.zeros_like(step[0] * A * B[0])
    ys = []
    for step_l, drive_l, B_l, C_l in zip(step, drive, B, C, strict=True):
        state = torch.exp(step_l * A) * state + drive_l * B_l
        ys.append((state * C_l).sum(-2, keepdim=True))
    return state, torch.stack(ys)


@_time_loop.register_fake
def _(A: torch.Tensor, step: torch.Tensor, drive: torch.Tensor, B: torch.Tensor,
      C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(step[0] * A * B[0]), torch.empty_like(step * C[..., :1, :])


@torch.library.custom_op('visionssm_export::diagonal_loop', mutates_args=())
def _diagonal_loop(
        A_top: torch.Tensor,
        A_left: torch.Tensor,
        step_top: torch.Tensor,
        step_left: torch.Tensor,
        weight_top: torch.Tensor,
        weight_left: torch.Tensor,
        u: torch.Tensor,
        B_top: torch.Tensor,
        B_left: torch.Tensor,
        C: torch.Tensor,
) -> torch.Tensor:
    """The wavefront scan over diagonals: position i of diagonal d is the pixel (i, d - i).

    Args:
        A_top: (N, D, 1).
        A_left: (N, D, 1).
        step_top: (T, B, 1, D, H) for T = H + W - 1 diagonals; zero outside the map.
        step_left: Like `step_top`.
        weight_top: (T, H), the shares of the two neighbours.
        weight_left: (T, H).
        u: (T, B, 1, D, H); zero outside the map.
        B_top: (T, B, N, 1, H).
        B_left: (T, B, N, 1, H).
        C: (T, B, N, 1, H).

    Returns:
        (T, B, 1, D, H).
    """
    state = torch.zeros_like(step_top[0] * A_top)
    ys = []
    for at in range(len(u)):
        above = F.pad(state[..., :-1], (1, 0))
        state = (weight_top[at] * (torch.exp(step_top[at] * A_top) * above + step_top[at] * u[at] * B_top[at])
                 + weight_left[at] * (torch.exp(step_left[at] * A_left) * state + step_left[at] * u[at] * B_left[at]))
        ys.append((state * C[at]).sum(1, keepdim=True))
    return torch.stack(ys)


@_diagonal_loop.register_fake
def _(A_top: torch.Tensor, A_left: torch.Tensor, step_top: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(step_top)


TIME_LOOP = torch.ops.visionssm_export.time_loop.default
DIAGONAL_LOOP = torch.ops.visionssm_export.diagonal_loop.default


def _gather(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Read rows (L, K or 1, ...) in the order of each route, (K, L), in one gather -> (L, K, ...)."""
    routes = len(index)
    places = index.T if rows.shape[1] == 1 else index.T * routes + torch.arange(routes, device=index.device)
    return rows.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, (-1, routes))


def _read(x: torch.Tensor, index: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """Read maps (B, K or 1, ..., L) along the routes -> (L, K, B, ...)."""
    rows = x.movedim((-1, 1), (0, 1))
    if index is None:
        return rows.flip(0) if reverse else rows
    return _gather(rows, index)


def _write(rows: torch.Tensor, index: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """Put sequences (L, K, B, D) back on their pixels -> (B, K, D, L)."""
    if index is not None:
        order = torch.arange(index.shape[-1], device=index.device).expand_as(index)
        rows = _gather(rows, torch.zeros_like(order).scatter(-1, index.long(), order))
    elif reverse:
        rows = rows.flip(0)
    return rows.movedim((0, 1), (-1, 1))


def _routed_scan(
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
    """`visionssm::routed_scan` around a loop over its positions; without checkpoints, which gradients alone need."""
    _, _, dim, length = delta.shape
    groups = max(x.shape[2] if x.ndim == 5 else 1 for x in (B, C))
    state = A.shape[-1]

    def matrix(x: torch.Tensor) -> torch.Tensor:
        """(L, K, B or 1, G, N, D / G or 1)."""
        if x.ndim == 3:
            return grouped(x).expand(length, -1, -1, -1, -1, -1)
        rows = _read(x.float(), index, reverse)
        return (rows if rows.shape[3] == groups else rows.repeat_interleave(groups, 3))[..., None]

    def grouped(x: torch.Tensor) -> torch.Tensor:
        """(K, D, N) -> (K, 1, G, N, D / G)."""
        return x.float().unflatten(1, (groups, -1)).mT[:, None]

    x = _read(u.float(), index, reverse)
    step = _read(delta.float(), index, reverse)
    step = step if delta_bias is None else step + delta_bias.float()[:, None]
    step = F.softplus(step) if delta_softplus else step
    last, y = TIME_LOOP(grouped(A), step.unflatten(3, (groups, -1))[..., None, :],
                        (step * x).unflatten(3, (groups, -1))[..., None, :], matrix(B), matrix(C))
    y = y.flatten(3)
    y = y if D is None else y + D.float()[:, None] * x
    y = _write(y, index, reverse)
    y = y if z is None else y * F.silu(z.float())
    out = y.sum(1, keepdim=True) if merge else y
    return out.to(u.dtype), last.transpose(0, 1).mT.flatten(2, 3), last.new_empty(*delta.shape[:3], 0, state)


def _skew(x: torch.Tensor) -> torch.Tensor:
    """Diagonals of maps (..., H, W) -> (H + W - 1, ..., H): position i of diagonal d is (i, d - i), zero outside."""
    height, width = x.shape[-2:]
    # each row is one longer than the diagonals are many, so that what is cut from the end shifts it by one
    rows = F.pad(x, (0, height)).flatten(-2)[..., :height * (height + width - 1)]
    return rows.unflatten(-1, (height, height + width - 1)).movedim(-1, 0)


def _straighten(x: torch.Tensor, width: int | torch.SymInt) -> torch.Tensor:
    """Undo `_skew`."""
    height = x.shape[-1]
    rows = F.pad(x.movedim(0, -1).flatten(-2), (0, height))
    return rows.unflatten(-1, (height, height + width))[..., :width]


def _wavefront_scan(
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
        keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`visionssm::wavefront_scan` around a loop over its diagonals; without checkpoints."""
    batch, _, height, width = u.shape

    def turn(x: torch.Tensor) -> torch.Tensor:
        return x.float().flip(-2, -1) if reverse else x.float()

    def steps(delta: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raw = turn(delta)
        raw = raw if bias is None else raw + bias.float()[:, None, None]
        return _skew(F.softplus(raw) if delta_softplus else raw)[:, :, None]

    row = torch.arange(height, device=u.device)[:, None]
    column = torch.arange(width, device=u.device)
    left = torch.where(row == 0, 1., torch.where(column == 0, 0., 0.5)).float()
    x = turn(u)
    y = DIAGONAL_LOOP(
        A_top.float().mT[..., None], A_left.float().mT[..., None], steps(delta_top, bias_top),
        steps(delta_left, bias_left), _skew(1 - left), _skew(left), _skew(x)[:, :, None],
        *(_skew(turn(matrix))[:, :, :, None] for matrix in (B_top, B_left, C)))
    out = _straighten(y[:, :, 0], width)
    out = out if D is None else out + D.float()[:, None, None] * x
    out = out.flip(-2, -1) if reverse else out
    return out.to(u.dtype), out.new_empty(batch, 0, A_top.shape[1], width, A_top.shape[0])


def loop_decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """Return what `ExportedProgram.run_decompositions` needs for graphs of ATen operations and the two loops."""
    return {**export_decompositions(), torch.ops.visionssm.routed_scan.default: _routed_scan,
            torch.ops.visionssm.wavefront_scan.default: _wavefront_scan}
