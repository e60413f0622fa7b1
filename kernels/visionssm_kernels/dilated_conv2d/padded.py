"""Sum of dilated depth-wise convolutions by PyTorch's own, for any device: the map is padded once for each dilation.

Convolutions that pad with zeros by themselves are slow where they are dilated, and cutting the maps of the smaller
dilations out of one padded map is a copy too, of more.
"""
import functools
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

__all__ = ['backward', 'convolve', 'forward']


def _padded(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int]) -> Iterator[tuple]:
    """For each dilation: itself, what it pads on every side, the padded map, and the filters (D, 1, S, S)."""
    # Depth-wise convolutions are quickest on channels-last memory.
    x = x.contiguous(memory_format=torch.channels_last)
    for i, dilation in enumerate(dilations):
        pad = [dilation * (weight.shape[3] // 2)] * 4
        yield dilation, pad, F.pad(x, pad, mode='replicate'), weight[i].unsqueeze(1)


def convolve(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yields the convolution of each dilation; arguments as in `reference`."""
    for dilation, _, padded, filters in _padded(x, weight, dilations):
        yield F.conv2d(padded, filters, dilation=dilation, groups=filters.shape[0])


def forward(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """Sum of depth-wise convolutions, a filter for each dilation; arguments and result as in `reference`."""
    return functools.reduce(torch.Tensor.add_, convolve(x, weight, dilations))


def backward(
        dout: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        dilations: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `forward`; arguments and results as in `reference`."""
    dout = dout.contiguous(memory_format=torch.channels_last)
    dx, dweight = None, torch.empty_like(weight)
    for i, (dilation, pad, padded, filters) in enumerate(_padded(x, weight, dilations)):
        dpadded, dfilters, _ = torch.ops.aten.convolution_backward(
            dout, padded, filters, None, [1, 1], [0, 0], [dilation] * 2, False, [0, 0], filters.shape[0],
            [True, True, False])
        part = torch.ops.aten.replication_pad2d_backward(dpadded, x, pad)
        dx = part if dx is None else dx.add_(part)
        dweight[i] = dfilters[:, 0]
    return dx, dweight
