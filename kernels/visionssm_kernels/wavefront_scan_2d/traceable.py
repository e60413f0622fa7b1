"""The wavefront scan as a graph of ATen operations, for torch.export and ONNX: row by row, each a log-depth scan.

The rows are unrolled, so the height must be a number; the width may be symbolic. Needs memory O(B D H W N).
"""
import torch
from torch.nn import functional as F

from .._dispatch import accumulation_dtype
from ..selective_scan.traceable import count_doublings
from .reference import finish_steps, turn


def _fixed_height(height: int | torch.SymInt) -> int:
    if isinstance(height, torch.SymInt):
        raise ValueError(
            'wavefront_scan_2d: the height H of the exported graph is symbolic, but its rows are unrolled: export with '
            'a fixed height (the batch and the width may be dynamic), or keep the op in the graph by leaving out '
            'export_decompositions()')
    return height


def wavefront_scan(
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
    """Computes `visionssm::wavefront_scan` without its checkpoints; see `reference`."""
    dtype = accumulation_dtype(u)
    batch, _, height, width = u.shape
    height = _fixed_height(height)
    x, C_ = turn(u.to(dtype), reverse), turn(C.to(dtype), reverse)
    column = torch.arange(width, device=u.device)
    row = torch.arange(height, device=u.device)[:, None]
    left_weight = torch.where(row == 0, 1., torch.where(column == 0, 0., 0.5)).to(dtype)
    decays, drive = [], torch.zeros((), dtype=dtype, device=u.device)
    for delta, bias, A, B, weight in ((delta_left, bias_left, A_left, B_left, left_weight),
                                      (delta_top, bias_top, A_top, B_top, 1 - left_weight)):
        bias = None if bias is None else bias.to(dtype)
        step, _ = finish_steps(turn(delta.to(dtype), reverse), bias, delta_softplus)
        decays.append(weight * torch.exp(step[:, :, None] * A.to(dtype)[..., None, None]))
        drive = drive + weight * (step * x)[:, :, None] * turn(B.to(dtype), reverse)[:, None]
    from_left, from_top = decays  # (B, D, N, H, W)
    # entry j holds the products of 2^j neighbouring decays, which every row needs
    products = [from_left]
    doublings = count_doublings(width)
    for j in range(doublings - 1):
        products.append(products[-1] * F.pad(products[-1], (1 << j, 0), value=1.)[..., :width])
    states = drive[..., 0, :]
    rows = []
    for i in range(height):
        if i > 0:
            states = drive[..., i, :] + from_top[..., i, :] * states
        for j in range(doublings):
            states = states + products[j][..., i, :] * F.pad(states, (1 << j, 0))[..., :width]
        rows.append((states * C_[:, None, :, i]).sum(2))
    out = torch.stack(rows, 2)
    if D is not None:
        out = out + D.to(dtype)[:, None, None] * x
    # checkpoints serve the gradient alone, which exported graphs do not have
    return turn(out, reverse).to(u.dtype), out.new_empty(batch, 0, *A_top.shape[1:], width, A_top.shape[0])
