"""Depth-wise causal convolution by the native library: see kernels/csrc/causal_conv1d.h."""
import torch

from .._library import lay_out
from .._native import Arguments, run_native, threads_for

__all__ = ['backward', 'forward', 'forward_into']

ARGUMENTS = Arguments(
    ('batch', 'dim', 'length', 'width', 'silu', 'reverse', 'threads'), ('x', 'weight', 'bias', 'dout'),
    {name: (name, 3) for name in ('x', 'dout', 'out', 'dx')}, ('out', 'dx', 'dweight', 'dbias'))
"""`conv_args` in kernels/csrc/causal_conv1d.h."""


def _like(x: torch.Tensor) -> torch.Tensor:
    """An output in the order of x if that is channels or positions innermost, else contiguous."""
    out = torch.empty_like(x)
    return out if 1 in out.stride()[1:] else torch.empty_like(x, memory_format=torch.contiguous_format)


def _run(x: torch.Tensor, weight: torch.Tensor, silu: bool, reverse: bool, **tensors: torch.Tensor | None) -> None:
    """Fill the outputs among `tensors`, which are contiguous but for `out` and `dx` (see `_like`)."""
    result = tensors.get('out', tensors.get('dx'))
    if result.stride(2) != 1 and x.stride(1) != 1:  # the library reads in the order that it writes in
        x = torch.empty_like(result).copy_(x)
    sizes = (*x.shape, weight.shape[1], silu, reverse, threads_for(x.numel()))
    if run_native('visionssm_causal_conv1d', ARGUMENTS.pack(sizes, {'x': x, 'weight': weight, **tensors}),
                  x.dtype == torch.float64, 'dout' in tensors):
        raise MemoryError(f'causal_conv1d: no memory to read x {tuple(x.shape)}; pass it with a stride of 1 along L')


def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        silu: bool,
        reverse: bool,
) -> torch.Tensor:
    """Causal convolution of every channel with its own filter; arguments and result as in `reference`."""
    out = _like(x)
    forward_into(out, x, weight, bias, silu, reverse)
    return out


def forward_into(
        out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        silu: bool,
        reverse: bool,
) -> None:
    """`forward` into a given output, which has a stride of 1 along channels or positions."""
    _run(x, weight, silu, reverse, bias=bias, out=out)


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
        dout = torch.ops.aten.silu_backward(dout, forward(x, weight, bias, False, reverse))
    dx, dweight, dbias = _like(x), torch.empty_like(weight), weight.new_empty(weight.shape[0])
    _run(x, weight, False, reverse, dout=lay_out(dout, dx), dx=dx, dweight=dweight, dbias=dbias)
    return dx, dweight, dbias
