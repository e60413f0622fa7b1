"""Class tokens anywhere in a sequence, and position embeddings that follow the size of the image.

The row of a class token in the position embedding stands where the token stands in the sequence. Its kinds:
`none`; `head`, before all patches; `middle`, before patch M // 2 of M; `double`, one before and one after all patches.
"""

from typing import List, Optional

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function

__all__ = [
    'class_token_index',
    'drop_class_tokens',
    'insert_class_tokens',
    'resize_pos_embed',
    'resize_pos_embed_leading',
]


def class_token_index(kind: str, num_patches: int) -> int:
    """Return the index of the (first) class token in a sequence of `num_patches` patches and class tokens.

    Args:
        kind: 'head', 'middle' or 'double'.
        num_patches: Number of patches M.

    Returns:
        0, or M // 2 for 'middle'.
    """
    return num_patches // 2 if kind == 'middle' else 0


def insert_class_tokens(
        x: torch.Tensor,
        kind: str,
        token: Optional[torch.Tensor],
        tail: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Put class tokens into a sequence of patches.

    Args:
        x: Patches, (B, M, C).
        kind: 'none', 'head', 'middle' or 'double'.
        token: Class token, (1, 1, C); the first one for 'double'.
        tail: Second class token of 'double', (1, 1, C).

    Returns:
        (B, M, C), (B, M + 1, C) or (B, M + 2, C).
    """
    if kind == 'none' or token is None:
        return x
    token = token.expand(x.shape[0], -1, -1)
    if kind == 'middle':
        index = class_token_index(kind, x.shape[1])
        return torch.cat([x[:, :index], token, x[:, index:]], dim=1)
    if kind == 'double' and tail is not None:
        return torch.cat([token, x, tail.expand(x.shape[0], -1, -1)], dim=1)
    return torch.cat([token, x], dim=1)


def drop_class_tokens(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the patches alone: the inverse of `insert_class_tokens`.

    Args:
        x: Sequence with its class tokens, (B, L, C).
        kind: 'none', 'head', 'middle' or 'double'.

    Returns:
        Patches, (B, M, C).
    """
    if kind == 'none':
        return x
    if kind == 'middle':
        index = class_token_index(kind, x.shape[1] - 1)
        return torch.cat([x[:, :index], x[:, index + 1:]], dim=1)
    return x[:, 1:-1] if kind == 'double' else x[:, 1:]


@register_notrace_function
def resize_pos_embed(
        pos_embed: torch.Tensor,
        old_size: List[int],
        new_size: List[int],
        kind: str = 'none',
        antialias: bool = True,
) -> torch.Tensor:
    """Resample a position embedding to another grid; rows of class tokens are taken out and put where they belong.

    Args:
        pos_embed: Rows of all tokens, (1, L, C).
        old_size: Grid (H, W) that the rows stand for.
        new_size: Grid (H, W) that is wanted.
        kind: 'none', 'head', 'middle' or 'double'.
        antialias: Low-pass before shrinking.

    Returns:
        (1, L', C) in the dtype of `pos_embed`; computed in at least float32.
    """
    if old_size[0] == new_size[0] and old_size[1] == new_size[1]:
        return pos_embed
    grid = _resize_grid(drop_class_tokens(pos_embed, kind), old_size, new_size, antialias)
    if kind == 'none':
        return grid
    index = class_token_index(kind, pos_embed.shape[1] - 1)
    tail = pos_embed[:, -1:] if kind == 'double' else None
    return insert_class_tokens(grid, kind, pos_embed[:, index:index + 1], tail)


def resize_pos_embed_leading(pos_embed: torch.Tensor, new_grid: int, num_extra_tokens: int) -> torch.Tensor:
    """Resample a square position embedding as the official Vim code does.

    The first rows are kept as class tokens whatever the place of the token, so a middle class token is resampled like
    a patch. Use it to repeat the official fine-tuning only; `resize_pos_embed` is the sound way.

    Args:
        pos_embed: Rows of all tokens, (1, num_extra_tokens + G * G, C).
        new_grid: Side of the new grid.
        num_extra_tokens: Number of leading rows that stay as they are.

    Returns:
        (1, num_extra_tokens + new_grid * new_grid, C).
    """
    extra, grid = pos_embed[:, :num_extra_tokens], pos_embed[:, num_extra_tokens:]
    side = round(grid.shape[1] ** 0.5)
    if side * side != grid.shape[1]:
        raise ValueError(
            f'A square grid is needed: {pos_embed.shape[1]} rows without {num_extra_tokens} leading ones are '
            f'{grid.shape[1]}. Use resize_pos_embed with the grid that they stand for.')
    if side == new_grid:
        return pos_embed
    return torch.cat([extra, _resize_grid(grid, [side, side], [new_grid, new_grid], False)], dim=1)


def _resize_grid(grid: torch.Tensor, old_size: List[int], new_size: List[int], antialias: bool) -> torch.Tensor:
    dtype = grid.dtype
    if dtype != torch.float64:
        grid = grid.float()
    grid = grid.reshape(1, old_size[0], old_size[1], -1).permute(0, 3, 1, 2)  # (1, H * W, C) -> (1, C, H, W)
    grid = F.interpolate(grid, size=new_size, mode='bicubic', align_corners=False, antialias=antialias)
    return grid.flatten(2).transpose(1, 2).to(dtype)
