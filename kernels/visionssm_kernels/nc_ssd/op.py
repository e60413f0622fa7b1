"""`nc_ssd`: the registered ops, their checks, gradient, FLOP formula and form for export.

`visionssm::nc_ssd_with_state` is the primitive, which also returns the sum over all positions that its gradient needs;
`visionssm::nc_ssd` checks the arguments and calls it.
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
    no_second_derivative,
    pack_gradients,
    to_parameters,
    zero_gradients,
)
from .._native import native_why_not
from . import chunked

__all__ = ['nc_ssd']

_OP = 'nc_ssd'
_dispatch.register_backend(_OP, 'native', f'{__package__}.cpu', native_why_not)
_dispatch.register_backend(_OP, 'chunked', f'{__package__}.chunked')
_dispatch.register_backend(_OP, 'triton', f'{__package__}.triton_impl', _dispatch.triton_why_not)
_dispatch.register_backend(_OP, 'reference', f'{__package__}.reference')


def _outputs(x: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes the empty outputs of the primitive."""
    batch, _, heads, size = x.shape
    groups, state = B.shape[2:]
    return x.new_empty(x.shape), x.new_empty(batch, groups, state, heads // groups * size, dtype=accumulation_dtype(x))


def _nc_ssd(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        positive: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.shape[0] == 0:
        return _outputs(x, B)
    backend = _dispatch.select_backend(_OP, x.device)
    A, D = to_parameters(accumulation_dtype(x), A, D)
    return backend.forward(x, dt, A, B, C, D, positive)


def _nc_ssd_fake(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        *args: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(x, B)


def _nc_ssd_backward(
        dout: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        state: torch.Tensor,
        positive: bool,
) -> tuple[torch.Tensor, ...]:
    inputs = (x, dt, A, B, C, D)
    if x.shape[0] == 0:
        return zero_gradients(inputs)
    backend = _dispatch.select_backend(_OP, x.device)
    A, D = to_parameters(accumulation_dtype(x), A, D)
    grads = backend.backward(dout, x, dt, A, B, C, D, state, positive)
    return pack_gradients(inputs, grads)


def _nc_ssd_backward_fake(dout: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    return fake_gradients(args[:6])


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.positive = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(
        ctx: torch.autograd.function.FunctionCtx,
        dout: torch.Tensor | None,
        _: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    *tensors, state = ctx.saved_tensors
    grads = torch.ops.visionssm.nc_ssd_backward(dout, *tensors, state, ctx.positive)
    return (*drop_absent(tensors, grads), None)


def _flops(*shapes: Any, **kwargs: Any) -> int:
    """Forward FLOPs, a multiply-add as 2: per state 4 (into the sum and out of it), per value 1 for the weight, D 2."""
    batch, length, heads, size = shapes[0]
    skip = 0 if shapes[5] is None else 2 * size
    return batch * length * heads * (4 * shapes[3][3] * size + size + 1 + skip)


def _backward_flops(dout: tuple[int, ...], *shapes: Any, **kwargs: Any) -> int:
    """Backward FLOPs: per state 8 for four products, per value 4 for the weights and their gradients, D 4."""
    batch, length, heads, size = shapes[0]
    skip = 0 if shapes[5] is None else 4 * size
    return batch * length * heads * (8 * shapes[3][3] * size + 4 * size + 4 + skip)


_TENSORS = 'Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D'
_primitive = define_op(
    'nc_ssd_with_state', f'({_TENSORS}, bool positive) -> (Tensor, Tensor)', _nc_ssd, _nc_ssd_fake,
    setup_context=_setup_context, backward=_backward, flops=_flops, decomposition=chunked.forward)
define_op(
    'nc_ssd_backward', f'(Tensor dout, {_TENSORS}, Tensor state, bool positive) -> ({", ".join(["Tensor"] * 6)})',
    _nc_ssd_backward, _nc_ssd_backward_fake,
    setup_context=lambda ctx, inputs, output: None, flops=_backward_flops,
    backward=no_second_derivative(
        'nc_ssd', 'visionssm_kernels.nc_ssd.reference.forward, which autograd differentiates'))


def _shapes_fit(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
) -> bool:
    """Says at a glance whether `_check_shapes` would pass, which takes several times as long."""
    values, matrix = x.shape, B.shape
    return (len(values) == 4 and len(matrix) == 4 and 0 not in values[1:] and 0 not in matrix
            and matrix[:2] == values[:2] and C.shape == matrix and dt.shape == values[:3]
            and A.shape == values[2:3] and (D is None or D.shape == values[2:3]) and values[2] % matrix[2] == 0)


def _check_shapes(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
) -> None:
    """Raises and says which shape is wrong."""
    check_ndim(_OP, 'x', x, (4,), '(B, L, M, P)')
    check_ndim(_OP, 'B', B, (4,), '(B, L, G, N)')
    batch, length, heads, size = x.shape
    groups, state = B.shape[2:]
    check_not_empty(_OP, L=length, M=heads, P=size, G=groups, N=state)
    check_shape(_OP, 'dt', dt, (batch, length, heads), '(B, L, M)')
    check_shape(_OP, 'A', A, (heads,), '(M,)')
    for name, matrix in (('B', B), ('C', C)):
        check_shape(_OP, name, matrix, (batch, length, groups, state), '(B, L, G, N)')
    if heads % groups:
        raise ValueError(f'{_OP}: the {groups} groups of B and C must divide the {heads} heads of x')
    if D is not None:
        check_shape(_OP, 'D', D, (heads,), '(M,)')


def _checked_nc_ssd(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        positive: bool = True,
) -> torch.Tensor:
    check_tensors(_OP, x=x, dt=dt, A=A, B=B, C=C, D=D)
    if not _shapes_fit(x, dt, A, B, C, D):
        _check_shapes(x, dt, A, B, C, D)
    return _primitive(x, dt, A, B, C, D, positive)[0]


define_composite(
    _OP, '(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, bool positive=True) -> Tensor',
    _checked_nc_ssd)


def nc_ssd(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        positive: bool = True,
) -> torch.Tensor:
    """Mixes all positions without an order, as VSSD does: linear attention with the queries C and the keys B.

    S = sum_l w_l B_l x_l^T over all positions l, y_l = C_l^T S + D x_l, with the weights w_l = -dt_l A of each head.
    Head m uses the group m % G of B and C (in `ssd`, the causal form, it is m // (M / G)). A scripted module calls
    `torch.ops.visionssm.nc_ssd`, with the same arguments.

    Args:
        x: Input, (B, L, M, P).
        dt: Finished step sizes, (B, L, M): after bias and softplus.
        A: Rates of the heads, (M,); negative.
        B: Input matrix, (B, L, G, N).
        C: Output matrix, (B, L, G, N).
        D: Skip weights, (M,).
        positive: The weights are -dt A, which is positive for a negative A; else dt A.

    Returns:
        The output (B, L, M, P) in the dtype of x, contiguous.

    Note:
        Inputs may be float32, bfloat16 and float16 in any mixture, or all float64. Products and sums are float32
        (float64) always, under autocast too, and the output is rounded once. Every input has a gradient; there is no
        second derivative.
    """
    return torch.ops.visionssm.nc_ssd(x, dt, A, B, C, D, positive)
