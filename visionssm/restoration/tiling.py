"""Restoring large images piece by piece, and eight times turned and mirrored."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ['Tile', 'official_tiles', 'plan_tiles', 'restore_bands', 'restore_official', 'restore_tiled',
           'self_ensemble']

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


def _shares(starts: Sequence[int], length: int, size: int, overlap: int, device: torch.device) -> list[torch.Tensor]:
    """Return how much each piece of one axis counts, pixel by pixel; at every place of the axis they sum to one.

    The outer quarter of an overlap counts nothing: there a network sees the padding of its convolutions. Over the two
    quarters in the middle the share rises, but not at the image's own border.
    """
    margin = overlap // 4
    rise = ((torch.arange(1, length + 1, device=device, dtype=torch.float32) - margin)
            / (overlap - 2 * margin + 1)).clamp(0, 1)
    total = torch.zeros(size, device=device)
    ramps = []
    for start in starts:
        ramp = torch.ones(length, device=device)
        if start > 0:
            ramp = torch.minimum(ramp, rise)
        if start + length < size:
            ramp = torch.minimum(ramp, rise.flip(0))
        total[start:start + length] += ramp
        ramps.append(ramp)
    return [ramp / total[start:start + length] for start, ramp in zip(starts, ramps)]


def restore_bands(
        restore: Restore,
        crop: Callable[[Tile], torch.Tensor],
        height: int,
        width: int,
        scale: int = 1,
        tile: int = 256,
        overlap: int = 32,
        progress: Progress | None = None,
) -> Iterator[torch.Tensor]:
    """Restore an image piece by piece and hand out finished rows, so that no more than a row of pieces is in memory.

    A pixel far from every seam is what its piece gives; where pieces overlap, their shares change linearly, so that no
    edge shows.

    Args:
        restore: Maps (B, C, h, w) to (B, C', scale h, scale w).
        crop: Gives a piece of the image, (B, C, h, w), on the device where the rows shall be.
        height: Of the image.
        width: Of the image.
        scale: How many times `restore` enlarges.
        tile: Side of a piece.
        overlap: Least number of pixels that neighbours share.
        progress: Called with the number of pieces done and of all pieces.

    Yields:
        (B, C', rows, scale width), the finished rows from top to bottom; together scale height of them.
    """
    tiles = plan_tiles(height, width, tile, overlap)
    tops, lefts = (list(dict.fromkeys(places)) for places in zip(*(piece[:2] for piece in tiles)))
    tall, wide = scale * tiles[0].height, scale * tiles[0].width
    total: torch.Tensor | None = None
    for done, piece in enumerate(tiles, 1):
        out = restore(crop(piece))
        if progress is not None:
            progress(done, len(tiles))
        if len(tiles) == 1:
            yield out
            return
        if total is None:
            total = out.new_zeros(*out.shape[:-1], scale * width, dtype=torch.float32)
            rows, columns = (_shares([scale * start for start in starts], length, scale * size, scale * overlap,
                                     out.device)
                             for starts, length, size in ((tops, tall, height), (lefts, wide, width)))
        share = rows[tops.index(piece.top)][:, None] * columns[lefts.index(piece.left)]
        total[..., scale * piece.left:scale * piece.left + wide] += share * out
        if piece.left == lefts[-1]:
            below = tops.index(piece.top) + 1
            keep = scale * ((tops[below] if below < len(tops) else height) - piece.top)
            finished, rest = total.split((keep, tall - keep), dim=-2)
            yield finished.to(out.dtype)
            total = F.pad(rest, (0, 0, 0, keep))


def restore_tiled(
        restore: Restore,
        x: torch.Tensor,
        scale: int = 1,
        tile: int = 256,
        overlap: int = 32,
        device: torch.device | str | None = None,
        progress: Progress | None = None,
) -> torch.Tensor:
    """Restore images piece by piece and blend the pieces, see `restore_bands`.

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
    def run(part: torch.Tensor) -> torch.Tensor:
        return restore(part if device is None else part.to(device)).to(x.device)

    def crop(piece: Tile) -> torch.Tensor:
        return x[..., piece.top:piece.top + piece.height, piece.left:piece.left + piece.width]

    height, width = x.shape[-2:]
    result, top = x.new_empty(0), 0
    for band in restore_bands(run, crop, height, width, scale, tile, overlap, progress):
        if not top:
            result = band.new_empty(*band.shape[:-2], scale * height, scale * width)
        result[..., top:top + band.shape[-2], :] = band
        top += band.shape[-2]
    return result


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
