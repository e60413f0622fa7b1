"""Axial rotary position embedding of a feature map, applied to adjacent channel pairs."""

from typing import Optional

import torch
from timm.layers import register_notrace_function

from .pieces import is_plain_inference

__all__ = ['apply_rotary', 'rotary_table']


@register_notrace_function
def rotary_table(
        height: int,
        width: int,
        dim: int,
        reference: torch.Tensor,
        reference_grid: Optional[float] = 14.0,
        theta: float = 10000.0,
        precise: bool = False,
) -> torch.Tensor:
    """Compute cosines and sines of the rotation of every pixel of a map.

    The first half of the channels turns with the row, the second with the column; position i of n along an axis is
    i / n * reference_grid, so that larger maps are squeezed into the range that was trained; without a grid it is i.

    Args:
        height: Rows H.
        width: Columns W.
        dim: Channels C, a multiple of 4.
        reference: Tensor whose device and dtype the table takes.
        reference_grid: Side of the grid whose positions are 0, 1, 2, ...; those of every grid when None.
        theta: Longest period is 2 pi theta.
        precise: Compute the angles in float64 where `reference` is float64.

    Returns:
        Cosines and sines, (2, H * W, C); angles are computed in float32 otherwise.
    """
    half = dim // 2
    device = reference.device
    dtype = torch.float64 if precise and reference.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, half, 2, dtype=dtype, device=device) / half
    frequencies = 1.0 / theta ** exponents
    rows = torch.arange(height, dtype=dtype, device=device)
    columns = torch.arange(width, dtype=dtype, device=device)
    if reference_grid is not None:
        rows = rows / height * reference_grid
        columns = columns / width * reference_grid
    row_angles = (rows[:, None] * frequencies).repeat_interleave(2, dim=-1)  # (H, C / 2)
    column_angles = (columns[:, None] * frequencies).repeat_interleave(2, dim=-1)  # (W, C / 2)
    angles = torch.cat([
        row_angles[:, None].expand(height, width, half),
        column_angles[None].expand(height, width, half),
    ], dim=-1).reshape(height * width, 2 * half)
    return torch.stack([angles.cos(), angles.sin()]).to(reference.dtype)


@torch.jit.unused
def _turn(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """One product in place of a negation, a copy, two products and a sum."""
    turns = torch.complex(table[0, :, ::2].contiguous(), table[1, :, ::2].contiguous())
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


@torch.jit.unused
def _is_complex(x: torch.Tensor) -> bool:
    """Says whether channel pairs in memory can be read as complex numbers; in graphs and for gradients they are not."""
    if not is_plain_inference(x) or x.dtype not in (torch.float32, torch.float64):
        return False
    return x.stride(-1) == 1 and not any(n % 2 for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))


@register_notrace_function
def apply_rotary(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate the channel pairs (2j, 2j + 1) of every token.

    Args:
        x: Tokens, (B, L, C).
        table: Cosines and sines, (2, L, C).

    Returns:
        (B, L, C) in the promoted dtype of both.
    """
    if not torch.jit.is_scripting():
        if x.dtype == table.dtype and _is_complex(x):
            return _turn(x, table)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * table[0] + turned * table[1]
