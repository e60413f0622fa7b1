"""`wavefront_scan_2d`: the registered ops, their checks, gradient, FLOP formula and form for export.

`visionssm::wavefront_scan` is the primitive, which also returns the checkpoints of its gradient, or none of them;
`visionssm::wavefront_scan_2d` checks the arguments and calls it.
"""
from typing import Any

import torch

from .. import _dispatch
from .._checks import check_ndim, check_not_empty, check_shape, check_tensors
from .._dispatch import accumulation_dtype
from .._library import (
    define_composite,
    define_op,
    drop_absent,
    fake_gradients,
    lay_out,
    no_second_derivative,
    pack_gradients,
    zero_gradients,
)
from .._native import native_why_not
from . import traceable
from .reference import ROWS

__all__ = ['wavefront_scan_2d']

_OP = 'wavefront_scan_2d'
_dispatch.register_backend(_OP, 'native', f'{__package__}.cpu', native_why_not)
_dispatch.register_backend(_OP, 'chunked', f'{__package__}.chunked')
_dispatch.register_backend(_OP, 'triton', f'{__package__}.triton_impl', _dispatch.triton_why_not)
_dispatch.register_backend(_OP, 'reference', f'{__package__}.reference')

_PARAMETERS = (3, 4, 8, 9, 10)  # A_top, A_left, D and the biases among the tensors


def _empty_checkpoints(u: torch.Tensor, A_top: torch.Tensor, keep: bool) -> torch.Tensor:
    batch, dim, height, width = u.shape
    marks = (height + ROWS - 1) // ROWS if keep else 0
    return u.new_empty(batch, marks, A_top.shape[1], width, dim, dtype=accumulation_dtype(u))


def _canonical(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The eleven tensors, with the parameters contiguous in the accumulation dtype."""
    dtype = accumulation_dtype(tensors[0])
    return [x.to(dtype).contiguous() if i in _PARAMETERS and x is not None else x for i, x in enumerate(tensors)]


def _wavefront_scan(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *tensors, delta_softplus, reverse, keep = args
    u, A_top = tensors[0], tensors[3]
    if u.shape[0] == 0:
        return torch.empty_like(u), _empty_checkpoints(u, A_top, keep)
    backend = _dispatch.select_backend(_OP, u.device)
    inputs = (*_canonical(tensors), delta_softplus, reverse)
    if keep:
        out, checkpoints = backend.forward(*inputs)
        return lay_out(out, u), checkpoints
    out = backend.forward_only(*inputs) if hasattr(backend, 'forward_only') else backend.forward(*inputs)[0]
    return lay_out(out, u), _empty_checkpoints(u, A_top, keep)


def _wavefront_scan_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(args[0]), _empty_checkpoints(args[0], args[3], args[-1])


def _wavefront_scan_backward(dout: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    *tensors, checkpoints, delta_softplus, reverse = args
    u = tensors[0]
    if u.shape[0] == 0:
        return zero_gradients(tensors)
    backend = _dispatch.select_backend(_OP, u.device)
    grads = backend.backward(dout, *_canonical(tensors), checkpoints, delta_softplus, reverse)
    return pack_gradients(tensors, grads)


def _wavefront_scan_backward_fake(dout: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    return fake_gradients(args[:11])


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.keep = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(
        ctx: torch.autograd.function.FunctionCtx,
        dout: torch.Tensor | None,
        _: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    if dout is None:
        return (None,) * 14
    *tensors, checkpoints = ctx.saved_tensors
    if not ctx.keep:
        checkpoints = _primitive(*tensors, ctx.delta_softplus, ctx.reverse, True)[1]
    grads = torch.ops.visionssm.wavefront_scan_backward(dout, *tensors, checkpoints, ctx.delta_softplus, ctx.reverse)
    return (*drop_absent(tensors, grads), None, None, None)


def _flops(*shapes: Any, **kwargs: Any) -> int:
    """Forward FLOPs, a multiply-add as 2: per state 12 (delta A and delta B u twice, state 6, C state), D 2."""
    batch, dim, height, width = shapes[0]
    return batch * dim * height * width * (12 * shapes[3][1] + 2 + (0 if shapes[8] is None else 2))


def _backward_flops(dout: tuple[int, ...], *shapes: Any, **kwargs: Any) -> int:
    """Backward FLOPs: per state 10 to recompute it, 6 for the adjoint and 22 for the products with it."""
    batch, dim, height, width = shapes[0]
    return batch * dim * height * width * (38 * shapes[3][1] + 8 + (0 if shapes[8] is None else 4))


_TENSORS = ('Tensor u, Tensor delta_top, Tensor delta_left, Tensor A_top, Tensor A_left, Tensor B_top, Tensor B_left, '
            'Tensor C, Tensor? D, Tensor? delta_bias_top, Tensor? delta_bias_left')
_FLAGS = 'bool delta_softplus, bool reverse'
_primitive = define_op(
    'wavefront_scan', f'({_TENSORS}, {_FLAGS}, bool keep) -> (Tensor, Tensor)', _wavefront_scan, _wavefront_scan_fake,
    setup_context=_setup_context, backward=_backward, flops=_flops, decomposition=traceable.wavefront_scan)
define_op(
    'wavefront_scan_backward',
    f'(Tensor dout, {_TENSORS}, Tensor checkpoints, {_FLAGS}) -> ({", ".join(["Tensor"] * 11)})',
    _wavefront_scan_backward, _wavefront_scan_backward_fake,
    setup_context=lambda ctx, inputs, output: None, flops=_backward_flops,
    backward=no_second_derivative(
        'wavefront_scan_2d', 'visionssm_kernels.wavefront_scan_2d.reference.forward, which autograd differentiates'))


def _checked_scan(
        u: torch.Tensor,
        delta_top: torch.Tensor,
        delta_left: torch.Tensor,
        A_top: torch.Tensor,
        A_left: torch.Tensor,
        B_top: torch.Tensor,
        B_left: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        delta_bias_top: torch.Tensor | None = None,
        delta_bias_left: torch.Tensor | None = None,
        delta_softplus: bool = False,
        reverse: bool = False,
) -> torch.Tensor:
    vectors = {'D': D, 'delta_bias_top': delta_bias_top, 'delta_bias_left': delta_bias_left}
    matrices = {'B_top': B_top, 'B_left': B_left, 'C': C}
    check_tensors(_OP, u=u, delta_top=delta_top, delta_left=delta_left, A_top=A_top, A_left=A_left, **matrices,
                  **vectors)
    check_ndim(_OP, 'u', u, (4,), '(B, D, H, W)')
    check_ndim(_OP, 'A_top', A_top, (2,), '(D, N)')
    batch, dim, height, width = u.shape
    state = A_top.shape[1]
    check_not_empty(_OP, D=dim, N=state, H=height, W=width)
    for name, x in (('delta_top', delta_top), ('delta_left', delta_left)):
        check_shape(_OP, name, x, (batch, dim, height, width), '(B, D, H, W), the shape of u,')
    for name, x in (('A_top', A_top), ('A_left', A_left)):
        check_shape(_OP, name, x, (dim, state), '(D, N)')
    for name, x in matrices.items():
        check_shape(_OP, name, x, (batch, state, height, width), '(B, N, H, W)')
    for name, x in vectors.items():
        if x is not None:
            check_shape(_OP, name, x, (dim,), '(D,)')
    tensors = (u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, delta_bias_top, delta_bias_left)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _primitive(*tensors, delta_softplus, reverse, keep)[0]


define_composite(
    _OP, '(Tensor u, Tensor delta_top, Tensor delta_left, Tensor A_top, Tensor A_left, Tensor B_top, Tensor B_left, '
    'Tensor C, Tensor? D=None, Tensor? delta_bias_top=None, Tensor? delta_bias_left=None, bool delta_softplus=False, '
    'bool reverse=False) -> Tensor', _checked_scan)


def wavefront_scan_2d(
        u: torch.Tensor,
        delta_top: torch.Tensor,
        delta_left: torch.Tensor,
        A_top: torch.Tensor,
        A_left: torch.Tensor,
        B_top: torch.Tensor,
        B_left: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        delta_bias_top: torch.Tensor | None = None,
        delta_bias_left: torch.Tensor | None = None,
        delta_softplus: bool = False,
        reverse: bool = False,
) -> torch.Tensor:
    """Runs the two-axis scan of Mamba2D over a map, from the top left corner.

    left = exp(delta_left A_left) h[i,j-1] + delta_left B_left u,
    top = exp(delta_top A_top) h[i-1,j] + delta_top B_top u;
    h[i,j] is left in the top row, top in the left column below it, and the mean of both elsewhere; y = C . h + D u.
    Steps are softplus(delta + bias) if asked for. A scripted module calls `torch.ops.visionssm.wavefront_scan_2d`,
    with the same arguments.

    Args:
        u: Input, (B, D, H, W).
        delta_top: Step sizes of the update from above, (B, D, H, W).
        delta_left: Step sizes of the update from the left, (B, D, H, W).
        A_top: Decay rates of the update from above, (D, N); negative in a stable system.
        A_left: Decay rates of the update from the left, (D, N).
        B_top: Input matrix of the update from above, (B, N, H, W).
        B_left: Input matrix of the update from the left, (B, N, H, W).
        C: Output matrix, (B, N, H, W).
        D: Skip weights, (D,).
        delta_bias_top: Added to delta_top, (D,).
        delta_bias_left: Added to delta_left, (D,).
        delta_softplus: Applies softplus to the steps (after the biases).
        reverse: Scans from the bottom right corner, without copies; equals rotating every map by 180 degrees before
            and after.

    Returns:
        The output (B, D, H, W) in the dtype of u, laid out as `torch.empty_like(u)`.

    Note:
        Inputs may be float32, bfloat16 and float16 in any mixture, or all float64. States and sums are float32
        (float64) always, under autocast too, and the output is rounded once. Every input has a gradient; there is no
        second derivative. The official kernel keeps its states in the dtype of u, so under bfloat16 it differs from
        this one by its own rounding.
    """
    return torch.ops.visionssm.wavefront_scan_2d(
        u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, delta_bias_top, delta_bias_left, delta_softplus,
        reverse)
