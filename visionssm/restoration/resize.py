"""Bicubic resizing as MATLAB's imresize does it, which made the small images of the field's benchmarks."""

import math

import torch

__all__ = ['imresize']


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Return Keys' cubic kernel with a = -0.5."""
    x = x.abs()
    inner = 1.5 * x ** 3 - 2.5 * x ** 2 + 1
    outer = -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2
    return torch.where(x <= 1, inner, torch.where(x <= 2, outer, 0.))


def _taps(size: int, scale: float, antialias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which pixels a resized pixel is made of and their weights, both (new size, taps)."""
    shrink = scale if antialias and scale < 1 else 1.
    width = 4 / shrink
    new = torch.arange(1, math.ceil(size * scale) + 1, dtype=torch.float64)
    center = new / scale + 0.5 * (1 - 1 / scale)
    at = (center - width / 2).floor()[:, None] + torch.arange(math.ceil(width) + 2)
    weights = shrink * _cubic(shrink * (center[:, None] - at))
    weights = weights / weights.sum(1, keepdim=True)
    # beyond the border the image is mirrored, edge pixel included
    at = (at.long() - 1) % (2 * size)
    at = torch.minimum(at, 2 * size - 1 - at)
    used = weights.abs().amax(0) > 0
    return at[:, used], weights[:, used]


def imresize(x: torch.Tensor, scale: float, antialias: bool = True) -> torch.Tensor:
    """Resize images.

    Args:
        x: Images, (..., H, W), floating.
        scale: New size over old size; 1/2, 1/3 and 1/4 make the benchmarks' small images.
        antialias: Widen the kernel where images shrink.

    Returns:
        (..., ceil(scale H), ceil(scale W)), neither clamped nor rounded; first the columns are resized, then the rows.
    """
    if not x.is_floating_point():
        raise TypeError(f'imresize takes floating images, got {x.dtype}; divide bytes by 255 first.')
    if not scale > 0 or x.dim() < 2 or min(x.shape[-2:]) < 1:
        raise ValueError(f'imresize takes images (..., H, W) and a scale above 0, got {tuple(x.shape)} and {scale}.')
    for axis in (-2, -1):
        at, weights = _taps(x.shape[axis], scale, antialias)
        shape = (-1, 1) if axis == -2 else (-1,)
        # tap by tap: a matrix of all pairs of pixels would not fit for photographs
        out = None
        for index, weight in zip(at.T.to(x.device), weights.T.to(x)):
            part = x.index_select(axis, index) * weight.view(shape)
            out = part if out is None else out + part
        x = out
    return x
