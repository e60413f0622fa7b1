"""`dilated_conv2d`: the registered op, its checks, its gradient and its form for export."""
import functools
from collections.abc import Sequence
from typing import Any

import torch

from .._checks import check_ndim, check_not_empty, check_shape, check_tensors
from .._dispatch import accumulation_dtype, register_backend, select_backend
from .._library import define_op, fake_gradients, no_second_derivative, pack_gradients, zero_gradients
from .._native import native_why_not
from . import padded

__all__ = ['dilated_conv2d']

_OP = 'dilated_conv2d'


def _check(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int]) -> None:
    """Raise where the arguments do not fit together."""
    check_ndim(_OP, 'x', x, (4,), '(B, D, H, W)')
    check_ndim(_OP, 'weight', weight, (4,), '(M, D, S, S)')
    check_tensors(_OP, x=x, weight=weight)
    dim, side = x.shape[1], weight.shape[3]
    check_not_empty(_OP, D=dim, H=x.shape[2], W=x.shape[3])
    if not dilations or min(dilations) < 1:
        raise ValueError(f'{_OP}: dilations are {list(dilations)}; give at least one, each at least 1')
    check_shape(_OP, 'weight', weight, (len(dilations), dim, side, side),
                '(M, D, S, S) with M dilations and D channels as in x (B, D, H, W)')
    if side % 2 == 0:
        raise ValueError(f'{_OP}: the filters have {side} taps a side; only an odd number has a middle')


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _canonical(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the accumulation dtype, the weight contiguous."""
    dtype = accumulation_dtype(x)
    return x.to(dtype), weight.to(dtype).contiguous()


def _within(x: torch.Tensor, dilations: Sequence[int]) -> list[int]:
    """Dilations that do the same and reach no further than the map is large: from there on taps read its edges."""
    reach = max(x.shape[2:])
    return [min(dilation, reach) for dilation in dilations]


def _kernel(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    _check(x, weight, dilations)
    if x.numel() == 0:
        return _empty(x)
    out = select_backend(_OP, x.device).forward(*_canonical(x, weight), _within(x, dilations))
    _, dim, height, width = x.shape
    # also along axes of size one, where views may have others: graphs trust what the fake promises
    promised = out.dtype == x.dtype and out.stride() == (dim * height * width, 1, dim * width, dim)
    return out if promised else _empty(x).copy_(out)


def _fake(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    _check(x, weight, dilations)
    return _empty(x)


def _backward_kernel(
        dout: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        dilations: Sequence[int],
) -> tuple[torch.Tensor, ...]:
    inputs = (x, weight)
    if x.numel() == 0:
        return zero_gradients(inputs)
    canonical = _canonical(x, weight)
    backend = select_backend(_OP, x.device)
    return pack_gradients(
        inputs, backend.backward(dout.to(canonical[0].dtype), *canonical, _within(x, dilations)))


def _backward_fake(dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    return fake_gradients((x, weight))


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, ctx.dilations = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*_backward_op(dout, *ctx.saved_tensors, ctx.dilations), None)


def _decomposition(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """The op as PyTorch's own padded convolutions, which every exporter knows."""
    # graphs may not add in place
    return functools.reduce(torch.add, padded.convolve(*_canonical(x, weight), dilations)).to(x.dtype)


def _forward_flops(x: tuple, weight: tuple, *args: Any, out_shape: tuple, **kwargs: Any) -> int:
    batch, _, height, width = x
    filters, dim, side, _ = weight
    return 2 * batch * dim * height * width * filters * side * side


def _backward_flops(dout: tuple, x: tuple, weight: tuple, *args: Any, out_shape: tuple, **kwargs: Any) -> int:
    return 2 * _forward_flops(x, weight, out_shape=x)


_backward_op = define_op(
    'dilated_conv2d_backward', '(Tensor dout, Tensor x, Tensor weight, int[] dilations) -> (Tensor, Tensor)',
    _backward_kernel, _backward_fake,
    setup_context=lambda ctx, inputs, output: None, flops=_backward_flops,
    backward=no_second_derivative(
        _OP, 'torch.nn.functional.conv2d with groups=D on inputs padded with mode replicate'))
_forward_op = define_op(
    _OP, '(Tensor x, Tensor weight, int[] dilations) -> Tensor', _kernel, _fake, setup_context=_setup_context,
    backward=_autograd, flops=_forward_flops, decomposition=_decomposition)

register_backend(_OP, 'native', f'{__package__}.cpu', native_why_not)
register_backend(_OP, 'chunked', f'{__package__}.padded')
register_backend(_OP, 'reference', f'{__package__}.reference')


def dilated_conv2d(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """Convolve every channel with filters of several dilations and add the results; the edges of the map repeat.

    `y[i, j] = sum_m sum_uv weight[m, u, v] x[i + (u - S // 2) d_m, j + (v - S // 2) d_m]`, where an index outside the
    map stands for the nearest one inside. A scripted module calls `torch.ops.visionssm.dilated_conv2d`.

    Args:
        x: (B, D, H, W), any strides.
        weight: (M, D, S, S), a filter of odd side S for each dilation and channel.
        dilations: M distances between neighbouring taps.

    Returns:
        (B, D, H, W) in the dtype of `x`, in channels-last memory.

    Note:
        Sums are float32, or float64 for float64 inputs; other dtypes may be mixed, as they are under autocast. Both
        tensors have gradients; the gradients themselves have none.
    """
    return torch.ops.visionssm.dilated_conv2d(x, weight, dilations)
