"""Depth-wise causal convolution by the native library: see kernels/csrc/causal_conv1d.h.

SiLU stays with PyTorch, whose vector code for it is as fast as ours would be.
"""
import ctypes

import torch
from torch.nn import functional as F

from .._native import instruction_set, native_library

__all__ = ['backward', 'forward']

# Below this many numbers a thread, waking threads costs more than they save; PyTorch's own loops use the same.
_GRAIN = 32768


class ConvArgs(ctypes.Structure):
    """Mirror of `conv_args` in kernels/csrc/causal_conv1d.h."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in ('batch', 'dim', 'length', 'width', 'reverse', 'threads')),
        *((name, ctypes.c_void_p) for name in ('x', 'weight', 'bias', 'dout')),
        *((name, ctypes.c_int64 * 3) for name in ('x_stride', 'dout_stride')),
        *((name, ctypes.c_void_p) for name in ('out', 'dx', 'dweight', 'dbias')),
    ]


def _run(x: torch.Tensor, weight: torch.Tensor, reverse: bool, **tensors: torch.Tensor | None) -> None:
    """Fill the outputs among `tensors`, all of them contiguous except `dout`."""
    threads = min(torch.get_num_threads(), 1 + x.numel() // _GRAIN)
    args = ConvArgs(*x.shape, weight.shape[1], reverse, threads)
    for name, tensor in {'x': x, 'weight': weight, **tensors}.items():
        if tensor is not None:
            setattr(args, name, tensor.data_ptr())
    args.x_stride = x.stride()
    dout = tensors.get('dout')
    if dout is not None:
        args.dout_stride = dout.stride()
    failed = native_library().visionssm_causal_conv1d(
        ctypes.byref(args), x.dtype == torch.float64, dout is not None, instruction_set())
    if failed:
        raise MemoryError(f'causal_conv1d: no memory to read x {tuple(x.shape)}; pass it with a stride of 1 along L')


def _pre_activation(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        reverse: bool,
) -> torch.Tensor:
    """The sums before the activation, (B, D, L)."""
    out = x.new_empty(x.shape)
    _run(x, weight, reverse, bias=bias, out=out)
    return out


def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        silu: bool,
        reverse: bool,
) -> torch.Tensor:
    """Causal convolution of every channel with its own filter; arguments and result as in `reference`."""
    out = _pre_activation(x, weight, bias, reverse)
    return F.silu(out, inplace=True) if silu else out


def backward(
        dout: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        silu: bool,
        reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`; arguments and results as in `reference`."""
    if silu:
        dout = torch.ops.aten.silu_backward(dout, _pre_activation(x, weight, bias, reverse))
    dx, dweight, dbias = x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0])
    _run(x, weight, reverse, dout=dout, dx=dx, dweight=dweight, dbias=dbias)
    return dx, dweight, dbias
