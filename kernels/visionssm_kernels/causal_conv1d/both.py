"""`causal_conv1d_both`: the convolution of a sequence in both directions, each with filters of its own, in one call."""
from typing import Any

import torch

from .._dispatch import select_backend
from .._library import define_op
from . import op as one

__all__ = ['causal_conv1d_both']

_OP = 'causal_conv1d_both'


def _empty(x: torch.Tensor) -> torch.Tensor:
    """Output (B, 2, D, L), direction slowest in memory and in it channels or positions innermost, as in x.

    So each direction is a matrix of pixels by channels, which a batched product takes as it is.
    """
    batch, dim, length = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(2, batch, length, dim).permute(1, 0, 3, 2)
    return x.new_empty(2, batch, dim, length).transpose(0, 1)


def _check(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_back: torch.Tensor,
        bias_back: torch.Tensor | None,
        activation: str | None = None,
) -> None:
    one.check(_OP, x, weight, bias, activation)
    one.check(_OP, x, weight_back, bias_back, activation, '_back')


def _kernel(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_back: torch.Tensor,
        bias_back: torch.Tensor | None,
        activation: str | None = None,
) -> torch.Tensor:
    _check(x, weight, bias, weight_back, bias_back, activation)
    out = _empty(x)
    if x.numel() == 0:
        return out
    backend = select_backend(one.OP, x.device)
    for reverse, filters in enumerate(((weight, bias), (weight_back, bias_back))):
        arguments = (*one.canonical(x, *filters), activation is not None, bool(reverse))
        if hasattr(backend, 'forward_into') and x.dtype == arguments[0].dtype:
            backend.forward_into(out.select(1, reverse), *arguments)
        else:
            out.select(1, reverse).copy_(backend.forward(*arguments))
    return out


def _fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    _check(x, *args)
    return _empty(x)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, *filters = ctx.saved_tensors
    back = torch.ops.visionssm.causal_conv1d_backward
    gradients = [
        back(dout.select(1, reverse), x, weight, bias, ctx.activation, bool(reverse))
        for reverse, (weight, bias) in enumerate((filters[:2], filters[2:]))]
    (dx, dweight, dbias), (dx_back, dweight_back, dbias_back) = gradients
    return (dx + dx_back, dweight, None if filters[1] is None else dbias, dweight_back,
            None if filters[3] is None else dbias_back, None)


def _decomposition(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_back: torch.Tensor,
        bias_back: torch.Tensor | None,
        activation: str | None = None,
) -> torch.Tensor:
    return torch.stack([one.decomposition(x, weight, bias, activation),
                        one.decomposition(x, weight_back, bias_back, activation, True)], dim=1)


def _flops(x: tuple, weight: tuple, *args: Any, out_shape: tuple, **kwargs: Any) -> int:
    return 2 * one.forward_flops(x, weight, out_shape=x)


define_op(
    _OP,
    '(Tensor x, Tensor weight, Tensor? bias, Tensor weight_back, Tensor? bias_back, str? activation=None) -> Tensor',
    _kernel, _fake, setup_context=_setup_context, backward=_autograd, flops=_flops, decomposition=_decomposition)


def causal_conv1d_both(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_back: torch.Tensor,
        bias_back: torch.Tensor | None,
        activation: str | None = None,
) -> torch.Tensor:
    """Convolve every channel once looking back and once looking ahead, each time with filters of its own.

    The same as `causal_conv1d` with the first filters and with the second ones and `reverse`, in one call.

    Args:
        x: (B, D, L), any strides.
        weight: Filters that look back, (D, W) or (D, 1, W).
        bias: (D,), or None.
        weight_back: Filters that look ahead, in the forms of `weight`; the width may differ.
        bias_back: (D,), or None.
        activation: None, 'silu' or 'swish' (the same).

    Returns:
        (B, 2, D, L) in the dtype of `x`: what looks back, and what looks ahead. Direction is the slowest dimension in
        memory, and channels are innermost where they are in `x`.

    Note:
        Precision and gradients as for `causal_conv1d`.
    """
    return torch.ops.visionssm.causal_conv1d_both(x, weight, bias, weight_back, bias_back, activation)
