"""`causal_conv1d`: the registered op, its checks, its gradient and its form for export."""
from typing import Any

import torch
from torch.nn import functional as F

from .._checks import check_ndim, check_not_empty, check_shape, check_tensors
from .._dispatch import accumulation_dtype, register_backend, select_backend
from .._library import define_op, lay_out, no_second_derivative
from .._native import native_why_not

__all__ = ['causal_conv1d']

OP = 'causal_conv1d'
_ACTIVATIONS = (None, 'silu', 'swish')


def check(
        op: str,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
        suffix: str = '',
) -> None:
    """Raise where the arguments do not fit together; `op` and `suffix` (of the filters) name them."""
    check_ndim(op, 'x', x, (3,), '(B, D, L)')
    check_ndim(op, f'weight{suffix}', weight, (2, 3), '(D, W), or (D, 1, W) as nn.Conv1d with groups=D keeps it')
    check_tensors(op, **{'x': x, f'weight{suffix}': weight, f'bias{suffix}': bias})
    dim, width = x.shape[1], weight.shape[-1]
    check_not_empty(op, D=dim, L=x.shape[2], W=width)
    if weight.dim() == 2:
        check_shape(op, f'weight{suffix}', weight, (dim, width), '(D, W) with D channels as in x (B, D, L)')
    else:
        check_shape(op, f'weight{suffix}', weight, (dim, 1, width), '(D, 1, W) with D channels as in x (B, D, L)')
    if bias is not None:
        check_shape(op, f'bias{suffix}', bias, (dim,), '(D,)')
    if activation not in _ACTIVATIONS:
        raise ValueError(f'{op}: activation must be one of {_ACTIVATIONS}, got {activation!r}')


def canonical(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The three tensors in the accumulation dtype; the weight as (D, W), it and the bias contiguous."""
    dtype = accumulation_dtype(x)
    if weight.dim() == 3:
        weight = weight.flatten(1)
    if x.dtype != dtype or weight.dtype != dtype or not weight.is_contiguous():
        x, weight = x.to(dtype), weight.to(dtype).contiguous()
    return x, weight, None if bias is None else bias.to(dtype).contiguous()


def _kernel(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        reverse: bool = False,
) -> torch.Tensor:
    check(OP, x, weight, bias, activation)
    if x.numel() == 0:
        return torch.empty_like(x)
    backend = select_backend(OP, x.device)
    out = backend.forward(*canonical(x, weight, bias), activation is not None, reverse)
    return lay_out(out.to(x.dtype), x)


def _fake(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        reverse: bool = False,
) -> torch.Tensor:
    check(OP, x, weight, bias, activation)
    return torch.empty_like(x)


def _backward_kernel(
        dout: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
        reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    like_bias = weight[:, 0].flatten() if bias is None else bias
    if x.numel() == 0:
        return torch.empty_like(x), weight.new_zeros(weight.shape), like_bias.new_zeros(like_bias.shape)
    backend = select_backend(OP, x.device)
    tensors = canonical(x, weight, bias)
    dx, dweight, dbias = backend.backward(dout.to(tensors[0].dtype), *tensors, activation is not None, reverse)
    dx = lay_out(dx.to(x.dtype), x)
    return dx, dweight.view(weight.shape).to(weight.dtype), dbias.to(like_bias.dtype)


def _backward_fake(
        dout: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
        reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    like_bias = weight if bias is None else bias
    return torch.empty_like(x), weight.new_empty(weight.shape), like_bias.new_empty(weight.shape[:1])


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, bias, ctx.activation, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, bias)


def _autograd(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward_op(dout, x, weight, bias, ctx.activation, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None, None


def decomposition(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        reverse: bool = False,
) -> torch.Tensor:
    """The op as PyTorch's own padded convolution, which every exporter knows."""
    dtype = x.dtype
    x, weight, bias = canonical(x, weight, bias)
    history = weight.shape[1] - 1
    x = F.pad(x, (0, history) if reverse else (history, 0))
    out = F.conv1d(x, (weight.flip(1) if reverse else weight).unsqueeze(1), bias, groups=weight.shape[0])
    return (out if activation is None else F.silu(out)).to(dtype)


def forward_flops(x: tuple, weight: tuple, *args: Any, out_shape: tuple, **kwargs: Any) -> int:
    batch, dim, length = x
    return 2 * batch * dim * length * weight[-1]


def _backward_flops(dout: tuple, x: tuple, weight: tuple, *args: Any, out_shape: tuple, **kwargs: Any) -> int:
    return 2 * forward_flops(x, weight, out_shape=x)


_backward_op = define_op(
    'causal_conv1d_backward',
    '(Tensor dout, Tensor x, Tensor weight, Tensor? bias, str? activation, bool reverse) -> (Tensor, Tensor, Tensor)',
    _backward_kernel, _backward_fake,
    setup_context=lambda ctx, inputs, output: None, flops=_backward_flops,
    backward=no_second_derivative(
        OP, 'torch.nn.functional.conv1d with groups=D on the padded input'))
_forward_op = define_op(
    OP, '(Tensor x, Tensor weight, Tensor? bias=None, str? activation=None, bool reverse=False) -> Tensor',
    _kernel, _fake, setup_context=_setup_context, backward=_autograd, flops=forward_flops,
    decomposition=decomposition)

register_backend(OP, 'native', f'{__package__}.cpu', native_why_not)
register_backend(OP, 'chunked', f'{__package__}.shifted')
register_backend(OP, 'reference', f'{__package__}.reference')


def causal_conv1d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        reverse: bool = False,
) -> torch.Tensor:
    """Convolve every channel with its own filter, looking only back (with `reverse`: only ahead).

    `p[t] = bias + sum_k weight[k] * x[t - (W - 1 - k)]` with zeros before the start, then `y = p` or `y = silu(p)`.
    `reverse` gives `flip(causal_conv1d(flip(x)))` without the two copies.

    Args:
        x: (B, D, L), any strides.
        weight: (D, W), or (D, 1, W) as `nn.Conv1d` with `groups=D` keeps it; the last tap meets the current position.
        bias: (D,).
        activation: None, 'silu' or 'swish' (the same).
        reverse: Whether position t reads t, t + 1, ... instead of t, t - 1, ...

    Returns:
        (B, D, L) in the dtype of `x`, contiguous.

    Note:
        Sums are float32, or float64 for float64 inputs; other dtypes may be mixed, as they are under autocast. All
        three tensors have gradients; the gradients themselves have none.
    """
    return torch.ops.visionssm.causal_conv1d(x, weight, bias, activation, reverse)
