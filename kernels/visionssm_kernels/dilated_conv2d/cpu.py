"""Sum of dilated depth-wise convolutions by the native library: see kernels/csrc/dilated_conv2d_kernels.h."""
import functools
from collections.abc import Sequence

import torch

from .._native import Arguments, run_native, threads_for

__all__ = ['backward', 'forward']

ARGUMENTS = Arguments(
    ('batch', 'dim', 'height', 'width', 'filters', 'side', 'radius', 'threads'), ('x', 'weight', 'dilations', 'dout'),
    {name: (name, 4) for name in ('x', 'dout', 'out', 'dx')}, ('out', 'dx', 'dweight'))
"""`dilated_args` in kernels/csrc/dilated_conv2d.h."""


@functools.cache
def _table(dilations: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(dilations, dtype=torch.int64)


def _run(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int], **tensors: torch.Tensor) -> None:
    """Fill the outputs among `tensors`; maps have their channels innermost."""
    side = weight.shape[3]
    threads = threads_for(x.numel() * weight[:, 0].numel())
    sizes = (*x.shape, len(dilations), side, max(dilations) * (side // 2), threads)
    tensors |= {'x': x, 'weight': weight, 'dilations': _table(tuple(dilations))}
    if run_native('visionssm_dilated_conv2d', ARGUMENTS.pack(sizes, tensors), x.dtype == torch.float64,
                  'dout' in tensors):
        raise MemoryError(f'dilated_conv2d: no memory to copy rows of x {tuple(x.shape)}')


def _innermost(x: torch.Tensor) -> torch.Tensor:
    """A map with its channels innermost: itself, or a copy."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def forward(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """Sum of depth-wise convolutions, a filter for each dilation; arguments and result as in `reference`."""
    out = torch.empty_like(x, memory_format=torch.channels_last)
    _run(_innermost(x), weight, dilations, out=out)
    return out


def backward(
        dout: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        dilations: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `forward`; arguments and results as in `reference`."""
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dweight = torch.empty_like(weight)
    _run(_innermost(x), weight, dilations, dout=_innermost(dout), dx=dx, dweight=dweight)
    return dx, dweight
