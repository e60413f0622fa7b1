"""Pooling of regions. A region is a row (image index, x1, y1, x2, y2) in pixels of the input image."""
from collections.abc import Iterator

import torch
import torchvision  # noqa: F401 - registers torch.ops.torchvision
from torch import Tensor

from .precision import widened

__all__ = ['roi_align_backward', 'roi_align_forward', 'roi_pool_backward', 'roi_pool_forward']

MAXIMUM = 0


def _largest_samples(features: Tensor, regions: Tensor, size: tuple[int, int], spatial_scale: float,
                     sampling_ratio: int, aligned: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Regions that share a grid of samples, the largest sample of each of their bins, and its places y and x."""
    bounds = regions[:, 1:] * spatial_scale - (0.5 if aligned else 0)
    start, extent = bounds[:, [1, 0]], bounds[:, [3, 2]] - bounds[:, [1, 0]]
    bins = (extent if aligned else extent.clamp(min=1)) / extent.new_tensor(size)
    grids = bins.ceil().clamp(min=1) if sampling_ratio <= 0 else torch.full_like(bins, sampling_ratio)
    for grid in grids.unique(dim=0):
        members = torch.nonzero((grids == grid).all(dim=1))[:, 0]
        rows, columns = map(int, grid)
        # One sample in each of rows x columns smaller bins is the same as that grid of samples in one bin.
        samples = torch.ops.torchvision.roi_align(features, regions[members], spatial_scale, size[0] * rows,
                                                  size[1] * columns, 1, aligned)
        samples = samples.unflatten(3, (size[1], columns)).unflatten(2, (size[0], rows)).transpose(3, 4)
        values, taken = samples.flatten(4).max(dim=-1)
        row, column = (taken // columns).to(values.dtype), (taken % columns).to(values.dtype)
        y = torch.arange(size[0], device=row.device)[:, None] + (row + 0.5) / rows
        x = torch.arange(size[1], device=row.device) + (column + 0.5) / columns
        (y0, x0), (bin_height, bin_width) = start[members].T, bins[members].T
        yield (members, values, y * bin_height[:, None, None, None] + y0[:, None, None, None],
               x * bin_width[:, None, None, None] + x0[:, None, None, None])


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor,
                      aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                      pool_mode: int, aligned: bool) -> None:
    """Average, or take the largest of, bilinear samples in each bin of each region; torchvision's operator.

    Args:
        input: Feature maps (B, C, H, W).
        rois: Regions (K, 5).
        output: Receives (K, C, height, width).
        argmax_y: Receives the places of the largest samples (K, C, height, width); empty where samples are averaged.
        argmax_x: The same along the other side.
        aligned_height: Bins in a column.
        aligned_width: Bins in a row.
        spatial_scale: Size of the feature map by that of the image.
        sampling_ratio: Samples along each side of a bin; 0 takes one a pixel.
        pool_mode: 0 takes the largest, 1 averages.
        aligned: Whether coordinates are shifted by half a pixel.
    """
    features, regions = widened(input, rois)
    regions = regions.to(features.dtype)
    if pool_mode != MAXIMUM:
        output.copy_(torch.ops.torchvision.roi_align(
            features, regions, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned))
        return
    size = (aligned_height, aligned_width)
    for members, *results in _largest_samples(features, regions, size, spatial_scale, sampling_ratio, aligned):
        for target, result in zip((output, argmax_y, argmax_x), results):
            target[members] = result.to(target.dtype)


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
                       aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                       pool_mode: int, aligned: bool) -> None:
    """Gradient of `roi_align_forward` by its input, added to `grad_input` (B, C, H, W).

    Args:
        grad_output: Gradient (K, C, height, width) of the output.
        rois: Regions (K, 5).
        argmax_y: Places of the largest samples.
        argmax_x: The same along the other side.
        grad_input: Receives the gradient.
        aligned_height: Bins in a column.
        aligned_width: Bins in a row.
        spatial_scale: Size of the feature map by that of the image.
        sampling_ratio: Samples along each side of a bin.
        pool_mode: 0 takes the largest, 1 averages.
        aligned: Whether coordinates are shifted by half a pixel.
    """
    grad, regions, y, x = widened(grad_output, rois, argmax_y, argmax_x)
    regions = regions.to(grad.dtype)
    if pool_mode != MAXIMUM:
        grad_input += torch.ops.torchvision._roi_align_backward(
            grad, regions, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned)
        return
    # Each largest sample is a region of no extent in a map of one channel.
    batch, channels, height, width = grad_input.shape
    maps = regions[:, 0, None, None, None] * channels + torch.arange(channels, device=grad.device)[:, None, None]
    points = torch.stack([maps.expand_as(grad), x + 0.5, y + 0.5, x + 0.5, y + 0.5], dim=-1).reshape(-1, 5)
    grad_input += torch.ops.torchvision._roi_align_backward(
        grad.reshape(-1, 1, 1, 1), points, 1.0, 1, 1, batch * channels, 1, height, width, 1, True).view_as(grad_input)


def _bins(start: Tensor, stop: Tensor, count: int, size: int) -> list[list[tuple[int, int]]]:
    """First and last + 1 pixel of each bin along one side, for each region (K,)."""
    edges = torch.arange(count + 1, device=start.device) * ((stop - start) / count)[:, None] + start[:, None]
    lows, highs = edges[:, :-1].floor().clamp(0, size), edges[:, 1:].ceil().clamp(0, size)
    return torch.stack([lows, highs], dim=-1).int().tolist()


def roi_pool_forward(input: Tensor, rois: Tensor, output: Tensor, argmax: Tensor, pooled_height: int,
                     pooled_width: int, spatial_scale: float) -> None:
    """Take the largest pixel in each bin of each region, 0 in empty bins.

    Torchvision's operator rounds regions to whole pixels first, mmcv's does not, so this is plain PyTorch.

    Args:
        input: Feature maps (B, C, H, W).
        rois: Regions (K, 5).
        output: Receives (K, C, height, width).
        argmax: Receives the flat index of each pixel taken, -1 in empty bins.
        pooled_height: Bins in a column.
        pooled_width: Bins in a row.
        spatial_scale: Size of the feature map by that of the image.
    """
    height, width = input.shape[2:]
    regions, = widened(rois)
    low, high = regions[:, 1:3] * spatial_scale, (regions[:, 3:5] + 1) * spatial_scale
    columns, rows = (_bins(low[:, side], high[:, side], count, size)
                     for side, (count, size) in enumerate([(pooled_width, width), (pooled_height, height)]))
    output.zero_()
    argmax.fill_(-1)
    for k, (image, solid) in enumerate(zip(rois[:, 0].int().tolist(), (low < high).all(dim=1).tolist())):
        for j, (x_low, x_high) in enumerate(columns[k] if solid else []):
            if x_low >= x_high:
                continue
            # Of equal pixels the first in reading order: the first in each row, then the first row.
            in_rows, where = input[image, :, :, x_low:x_high].max(dim=2)
            for i, (y_low, y_high) in enumerate(rows[k]):
                if y_low < y_high:
                    output[k, :, i, j], row = in_rows[:, y_low:y_high].max(dim=1)
                    column = where[:, y_low:y_high].gather(1, row[:, None])[:, 0]
                    argmax[k, :, i, j] = ((row + y_low) * width + column + x_low).to(argmax.dtype)


def roi_pool_backward(grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor, pooled_height: int,
                      pooled_width: int, spatial_scale: float) -> None:
    """Gradient of `roi_pool_forward` by its input, added to `grad_input` (B, C, H, W).

    Args:
        grad_output: Gradient (K, C, height, width) of the output.
        rois: Regions (K, 5).
        argmax: The pixels that were taken.
        grad_input: Receives the gradient.
        pooled_height: Bins in a column; not used.
        pooled_width: Bins in a row; not used.
        spatial_scale: Size of the feature map by that of the image; not used.
    """
    taken = argmax >= 0
    region, channel = torch.nonzero(taken, as_tuple=True)[:2]
    pixels = argmax[taken].long()
    grad_input.flatten(2).index_put_((rois[region, 0].long(), channel, pixels), grad_output[taken], accumulate=True)
