"""Restoring large images piece by piece, and eight times turned and mirrored."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ['Tile', 'official_tiles', 'plan_tiles', 'restore_official', 'restore_tiled', 'self_ensemble']

Restore = Callable[[torch.Tensor], torch.Tensor]
Progress = Callable[[int, int], None]


class Tile(NamedTuple):
    """A piece of an image: its first row and column, and its size."""

    top: int
    left: int
    height: int
    width: int


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return where pieces of one axis start: as even as they can be, each overlapping the next by `overlap` or more."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def plan_tiles(height: int, width: int, tile: int, overlap: int) -> list[Tile]:
    """Cut an image into overlapping pieces, row by row.

    Args:
        height: Of the image.
        width: Of the image.
        tile: Side of a piece; smaller only where the image is.
        overlap: Least number of pixels that neighbours share, below `tile`.

    Returns:
        The pieces; together they cover every pixel.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f'overlap is {overlap} and tile {tile}; 0 <= overlap < tile is needed.')
    return [Tile(top, left, min(tile, height), min(tile, width))
            for top in _starts(height, tile, overlap) for left in _starts(width, tile, overlap)]


def _ramp(start: int, length: int, size: int, overlap: int, device: torch.device) -> torch.Tensor:
    """Return the weights of a piece along one axis: they rise over the overlap, but not at the image's own border."""
    at = torch.arange(1, length + 1, device=device, dtype=torch.float32)
    weight = torch.ones(length, device=device)
    if start > 0:
        weight = torch.minimum(weight, at / (overlap + 1))
    if start + length < size:
        weight = torch.minimum(weight, at.flip(0) / (overlap + 1))
    return weight


def restore_tiled(
        restore: Restore,
        x: torch.Tensor,
        scale: int = 1,
        tile: int = 256,
        overlap: int = 32,
        device: torch.device | str | None = None,
        progress: Progress | None = None,
) -> torch.Tensor:
    """Restore images piece by piece and blend the pieces, so that memory follows the piece, not the image.

    A pixel far from every seam is what its piece gives; where pieces overlap, their weights change linearly, so that
    no edge shows.

    Args:
        restore: Maps (B, C, h, w) to (B, C', scale h, scale w).
        x: Images, (B, C, H, W), on the device where the result shall be.
        scale: How many times `restore` enlarges.
        tile: Side of a piece.
        overlap: Least number of pixels that neighbours share.
        device: Where `restore` computes; that of `x` when None.
        progress: Called with the number of pieces done and of all pieces.

    Returns:
        (B, C', scale H, scale W).
    """
    height, width = x.shape[-2:]
    tiles = plan_tiles(height, width, tile, overlap)
    if len(tiles) == 1:
        out = restore(x.to(device) if device is not None else x).to(x.device)
        if progress is not None:
            progress(1, 1)
        return out
    total: torch.Tensor | None = None
    weight_sum = x.new_zeros(scale * height, scale * width, dtype=torch.float32)
    for done, piece in enumerate(tiles, 1):
        crop = x[..., piece.top:piece.top + piece.height, piece.left:piece.left + piece.width]
        out = restore(crop.to(device) if device is not None else crop).to(x.device)
        if total is None:
            total = out.new_zeros(*out.shape[:-2], scale * height, scale * width, dtype=torch.float32)
        weight = _ramp(scale * piece.top, out.shape[-2], scale * height, scale * overlap, x.device)[:, None] * _ramp(
            scale * piece.left, out.shape[-1], scale * width, scale * overlap, x.device)
        rows = slice(scale * piece.top, scale * piece.top + out.shape[-2])
        columns = slice(scale * piece.left, scale * piece.left + out.shape[-1])
        total[..., rows, columns] += weight * out
        weight_sum[rows, columns] += weight
        if progress is not None:
            progress(done, len(tiles))
    return (total / weight_sum).to(out.dtype)


def official_tiles(height: int, width: int, side: int = 200) -> Iterator[tuple[Tile, Tile]]:
    """Yield the pieces of the official evaluation, row by row: what is restored, and which core of it is kept.

    Args:
        height: Of the image.
        width: Of the image.
        side: An axis is cut into `length // side + 1` pieces.

    Yields:
        Two pieces in coordinates of the image, which is padded so that the number of pieces divides its sides.
    """
    def axis(length: int) -> list[tuple[int, int, int, int]]:
        count = length // side + 1
        split = -(-length // count)
        shave = split // 10
        return [(i * split - shave * (i > 0), split + shave * ((i > 0) + (i < count - 1)), i * split, split)
                for i in range(count)]

    for top, tall, core_top, core_tall in axis(height):
        for left, wide, core_left, core_wide in axis(width):
            yield Tile(top, left, tall, wide), Tile(core_top, core_left, core_tall, core_wide)


def restore_official(restore: Restore, x: torch.Tensor, scale: int = 1, side: int = 200) -> torch.Tensor:
    """Restore images in the pieces of the official evaluation, which keeps cores with hard seams.

    Args:
        restore: Maps (B, C, h, w) to (B, C', scale h, scale w).
        x: Images, (B, C, H, W).
        scale: How many times `restore` enlarges.
        side: See `official_tiles`.

    Returns:
        (B, C', scale H, scale W).
    """
    height, width = x.shape[-2:]
    plan = list(official_tiles(height, width, side))
    bottom, right = plan[-1][1].top + plan[-1][1].height, plan[-1][1].left + plan[-1][1].width
    padded = F.pad(x, (0, right - width, 0, bottom - height), mode='reflect')
    out = padded.new_empty(0)
    for piece, core in plan:
        part = restore(padded[..., piece.top:piece.top + piece.height, piece.left:piece.left + piece.width])
        if not out.numel():
            out = part.new_empty(*part.shape[:-2], scale * bottom, scale * right)
        top, left = scale * (core.top - piece.top), scale * (core.left - piece.left)
        out[..., scale * core.top:scale * (core.top + core.height),
            scale * core.left:scale * (core.left + core.width)] = part[
                ..., top:top + scale * core.height, left:left + scale * core.width]
    return out[..., :scale * height, :scale * width]


def self_ensemble(restore: Restore, x: torch.Tensor) -> torch.Tensor:
    """Average over the eight turned and mirrored forms of images ("+" in the papers' tables).

    Args:
        restore: Maps (B, C, h, w) to (B, C', s h, s w).
        x: Images, (B, C, H, W).

    Returns:
        (B, C', s H, s W).
    """
    outs = []
    for mirrored in (False, True):
        for turns in range(4):
            form = torch.rot90(x.flip(-1) if mirrored else x, turns, (-2, -1))
            back = torch.rot90(restore(form), -turns, (-2, -1))
            outs.append(back.flip(-1) if mirrored else back)
    return torch.stack(outs).mean(0)
