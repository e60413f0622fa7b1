"""`ssd`: the registered ops, their checks, gradient, FLOP formula and form for export.

`visionssm::ssd_scan` is the primitive, which also returns the chunk states of its gradient; `visionssm::ssd` and
`visionssm::ssd_with_state` check the arguments and call it.
"""
import math
from collections.abc import Sequence
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
    zero_gradients,
)
from . import traceable

__all__ = ['ssd']

_OP = 'ssd'
_dispatch.register_backend(_OP, 'chunked', f'{__package__}.chunked')
_dispatch.register_backend(_OP, 'triton', f'{__package__}.triton_impl', _dispatch.triton_why_not)
_dispatch.register_backend(_OP, 'reference', f'{__package__}.reference')

_TENSORS = 9
_PARAMETERS = (2, 5, 7, 8)  # A, D, dt_bias and initial_states among the tensors


def _outputs(x: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Makes the empty outputs of the primitive."""
    batch, length, heads, width = x.shape
    state, dtype = B.shape[-1], accumulation_dtype(x)
    chunks = (length + _dispatch.CHUNK - 1) // _dispatch.CHUNK
    return (x.new_empty(x.shape), x.new_empty(batch, heads, width, state, dtype=dtype),
            x.new_empty(batch, heads, chunks, width, state, dtype=dtype))


def _canonical(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The nine tensors, with the parameters contiguous in the accumulation dtype."""
    dtype = accumulation_dtype(tensors[0])
    return [x.to(dtype).contiguous() if i in _PARAMETERS and x is not None else x for i, x in enumerate(tensors)]


def _ssd_scan(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors, flags = list(args[:_TENSORS]), args[_TENSORS:]
    if tensors[0].shape[0] == 0:
        return _outputs(tensors[0], tensors[3])
    return _dispatch.select_backend(_OP, tensors[0].device).forward(*_canonical(tensors), *flags)


def _ssd_scan_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(args[0], args[3])


def _ssd_scan_backward(dout: torch.Tensor, dfinal_states: torch.Tensor | None, *args: Any) -> tuple[torch.Tensor, ...]:
    tensors, starts, flags = list(args[:_TENSORS]), args[_TENSORS], args[_TENSORS + 1:]
    x = tensors[0]
    if x.shape[0] == 0:
        return zero_gradients(tensors)
    backend = _dispatch.select_backend(_OP, x.device)
    grads = backend.backward(dout, dfinal_states, *_canonical(tensors), starts, *flags)
    return pack_gradients(tensors, grads)


def _ssd_scan_backward_fake(
        dout: torch.Tensor,
        dfinal_states: torch.Tensor | None,
        *args: Any,
) -> tuple[torch.Tensor, ...]:
    return fake_gradients(args[:_TENSORS])


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], output[2])
    ctx.flags = inputs[_TENSORS:]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(
        ctx: torch.autograd.function.FunctionCtx,
        dout: torch.Tensor | None,
        dfinal_states: torch.Tensor | None,
        _: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    *tensors, starts = ctx.saved_tensors
    if dout is None and dfinal_states is None:
        return (None,) * (_TENSORS + len(ctx.flags))
    dout = tensors[0].new_zeros(tensors[0].shape) if dout is None else dout
    grads = torch.ops.visionssm.ssd_scan_backward(dout, dfinal_states, *tensors, starts, *ctx.flags)
    return (*drop_absent(tensors, grads), *(None for _ in ctx.flags))


def _flops(x: tuple[int, ...], *shapes: Any, **kwargs: Any) -> int:
    """Forward FLOPs of the recurrence, a multiply-add as 2: per state 5 (state 3, C state 2), per input 1, D 2."""
    batch, length, heads, width = x
    return batch * length * heads * width * (5 * shapes[2][-1] + 1 + (0 if shapes[4] is None else 2))


def _backward_flops(dout: tuple[int, ...], dfinal_states: tuple[int, ...] | None, *shapes: Any, **kwargs: Any) -> int:
    """Backward FLOPs: per state 3 to recompute it, 3 for the adjoint and 9 for the products with it."""
    batch, length, heads, width = shapes[0]
    return batch * length * heads * width * (15 * shapes[3][-1] + 3 + (0 if shapes[5] is None else 4))


_SCAN_ARGS = ('Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, '
              'Tensor? initial_states')
_SCAN_FLAGS = 'bool dt_softplus, float dt_min, float dt_max, bool reverse'
_primitive = define_op(
    'ssd_scan', f'({_SCAN_ARGS}, {_SCAN_FLAGS}) -> (Tensor, Tensor, Tensor)', _ssd_scan, _ssd_scan_fake,
    setup_context=_setup_context, backward=_backward, flops=_flops, decomposition=traceable.ssd_scan)
define_op(
    'ssd_scan_backward',
    f'(Tensor dout, Tensor? dfinal_states, {_SCAN_ARGS}, Tensor starts, {_SCAN_FLAGS}) -> '
    f'({", ".join(["Tensor"] * _TENSORS)})',
    _ssd_scan_backward, _ssd_scan_backward_fake,
    setup_context=lambda ctx, inputs, output: None, flops=_backward_flops,
    backward=no_second_derivative(
        'ssd', 'visionssm_kernels.ssd.reference.forward, which autograd differentiates'))


def check_dt_limit(op: str, dt_limit: Sequence[float] | None) -> tuple[float, float]:
    """Returns the bounds of the steps; (0, inf) for None."""
    low, high = (0.0, math.inf) if dt_limit is None else dt_limit
    if not low <= high:
        raise ValueError(f'{op}: dt_limit must be (smallest, largest step), got ({low}, {high})')
    return low, high


def _ssd_with_state(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: Sequence[float] | None = None,
        initial_states: torch.Tensor | None = None,
        reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_tensors(_OP, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states)
    check_ndim(_OP, 'x', x, (4,), '(B, L, M, P)')
    check_ndim(_OP, 'B', B, (4,), '(B, L, G, N)')
    batch, length, heads, width = x.shape
    groups, state = B.shape[2:]
    check_not_empty(_OP, L=length, M=heads, P=width, G=groups, N=state)
    if heads % groups:
        raise ValueError(f'{_OP}: the {groups} groups of B and C must divide the {heads} heads of x')
    check_shape(_OP, 'dt', dt, (batch, length, heads), '(B, L, M)')
    check_shape(_OP, 'A', A, (heads,), '(M,)')
    for name, t in (('B', B), ('C', C)):
        check_shape(_OP, name, t, (batch, length, groups, state), '(B, L, G, N)')
    if z is not None:
        check_shape(_OP, 'z', z, (batch, length, heads, width), '(B, L, M, P), the shape of x,')
    if dt_bias is not None:
        check_shape(_OP, 'dt_bias', dt_bias, (heads,), '(M,)')
    if initial_states is not None:
        check_shape(_OP, 'initial_states', initial_states, (batch, heads, width, state), '(B, M, P, N)')
    if D is not None:
        check_ndim(_OP, 'D', D, (1, 2), '(M,) or (M, P)')
        check_shape(_OP, 'D', D, (heads, width)[:D.ndim], '(M,)' if D.ndim == 1 else '(M, P)')
        D = D[:, None].expand(heads, width) if D.ndim == 1 else D
    out, final_states, _ = _primitive(
        x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, *check_dt_limit(_OP, dt_limit), reverse)
    return out, final_states


def _ssd(*args: Any, **kwargs: Any) -> torch.Tensor:
    return _ssd_with_state(*args, **kwargs)[0]


_PUBLIC_ARGS = ('(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, '
                'Tensor? dt_bias=None, bool dt_softplus=False, float[]? dt_limit=None, Tensor? initial_states=None, '
                'bool reverse=False)')
define_composite('ssd', f'{_PUBLIC_ARGS} -> Tensor', _ssd)
define_composite('ssd_with_state', f'{_PUBLIC_ARGS} -> (Tensor, Tensor)', _ssd_with_state)


def ssd(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        initial_states: torch.Tensor | None = None,
        return_final_states: bool = False,
        reverse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Runs the scan of Mamba-2 along the sequence: one scalar decay a head, one state (P, N) a head.

    step = clamp(softplus(dt + dt_bias), dt_limit), softplus and bias where asked for;
    s_l = exp(step_l A) s_{l-1} + step_l x_l (x) B_l,  y_l = s_l C_l + D x_l,  out = y silu(z).
    A scripted module calls `torch.ops.visionssm.ssd` (same arguments without `return_final_states`), which returns the
    output alone.

    Args:
        x: Input, (B, L, M, P).
        dt: Step sizes, (B, L, M).
        A: Decay rates, (M,); negative in a stable system.
        B: Input matrix, (B, L, G, N); head m uses group m // (M / G).
        C: Output matrix, (B, L, G, N).
        D: Skip weights, (M,) or (M, P).
        z: Gate, (B, L, M, P).
        dt_bias: Added to dt, (M,).
        dt_softplus: Applies softplus to dt (after the bias).
        dt_limit: Smallest and largest step (after softplus); steps beyond are clamped and pass no gradient.
        initial_states: State before the first step, (B, M, P, N); zero if None.
        return_final_states: Also returns the state after the last step.
        reverse: Scans from the last position to the first; equals flipping every sequence before and after.

    Returns:
        The output (B, L, M, P) in the dtype of x; with `return_final_states` also the states (B, M, P, N) in float32
        (float64 for float64 inputs).

    Note:
        Inputs may be float32, bfloat16 and float16 in any mixture, or all float64. States and sums are float32
        (float64) always, under autocast too, and the output is rounded once. Every input has a gradient, through the
        final states as well; there is no second derivative. The result does not depend on how the sequence is cut into
        chunks, except that a NaN also reaches the positions before it in its chunk.
    """
    op = torch.ops.visionssm.ssd_with_state if return_final_states else torch.ops.visionssm.ssd
    return op(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_states, reverse)
