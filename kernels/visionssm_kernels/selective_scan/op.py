"""The selective scan as torch.library ops.

`visionssm::routed_scan` is the primitive that the 1-D scan and the scans over 2-D routes share: it has the kernel, the
fake kernel, the gradient and the FLOP formula. `visionssm::selective_scan` and `visionssm::selective_scan_with_state`
check the arguments of the 1-D scan and call it.
"""
import torch
from torch.utils.weak import WeakIdKeyDictionary

from .. import _dispatch
from .._checks import check_ndim, check_not_empty, check_shape, check_tensors
from .._dispatch import CHUNK, accumulation_dtype, empty_map, follows_map
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
from . import traceable

_PACKAGE = __name__.rpartition('.')[0]
_dispatch.register_backend('selective_scan', 'native', f'{_PACKAGE}.cpu', native_why_not)
_dispatch.register_backend('selective_scan', 'chunked', f'{_PACKAGE}.chunked')
_dispatch.register_backend('selective_scan', 'triton', f'{_PACKAGE}.triton_impl', _dispatch.triton_why_not)
_dispatch.register_backend('selective_scan', 'reference', f'{_PACKAGE}.reference')

_SCAN_ARGS = ('Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, '
              'Tensor? index')
_SCAN_FLAGS = 'bool delta_softplus, bool reverse, bool merge'


def _outputs(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        merge: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Makes the empty outputs of the primitive."""
    batch, routes, dim, length = delta.shape
    dtype = accumulation_dtype(u)
    chunks = (length + CHUNK - 1) // CHUNK
    return (empty_map(u, 1 if merge else routes),
            u.new_empty(batch, routes, dim, A.shape[-1], dtype=dtype),
            u.new_empty(batch, routes, dim, chunks, A.shape[-1], dtype=dtype))


_checked_tables = WeakIdKeyDictionary()


def mark_checked(table: torch.Tensor) -> torch.Tensor:
    """Returns a table of routes that is known to be right, so that no scan looks at it before it is written to."""
    _checked_tables[table] = table._version
    return table


def _check_index(index: torch.Tensor, length: int) -> None:
    """Raises unless every row visits each pixel once: kernels write where the table says. Looks once at each table."""
    version = None if index.is_inference() else index._version
    if version is not None and _checked_tables.get(index) == version:
        return
    low, high = index.aminmax()
    inside = low.item() >= 0 and high.item() < length
    if not inside or not torch.zeros_like(index, dtype=torch.bool).scatter_(1, index.long(), True).all():
        raise ValueError(f'selective_scan: every row of the table of routes must hold each of the numbers '
                         f'0..{length - 1} once; this one holds numbers from {low.item()} to {high.item()}')
    if version is not None:
        mark_checked(index)


def _routed_scan(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        index: torch.Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        merge: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if delta.shape[0] == 0:
        return _outputs(u, delta, A, merge)
    if index is not None and index.device.type == 'cpu':  # elsewhere the look would wait for the device
        _check_index(index, delta.shape[-1])
    dtype = accumulation_dtype(u)
    A, D, delta_bias = to_parameters(dtype, A, D, delta_bias)
    backend = _dispatch.select_backend('selective_scan', u.device)
    out, *states = backend.forward(u, delta, A, B, C, D, z, delta_bias, index, delta_softplus, reverse, merge)
    if not follows_map(out, u):
        out = empty_map(u, out.shape[1]).copy_(out)
    return out, *states


def _routed_scan_fake(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        *args: torch.Tensor | bool | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(u, delta, A, args[-1])


def _routed_scan_backward(
        dout: torch.Tensor,
        dlast_state: torch.Tensor | None,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        index: torch.Tensor | None,
        checkpoints: torch.Tensor,
        delta_softplus: bool,
        reverse: bool,
        merge: bool,
) -> tuple[torch.Tensor, ...]:
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if delta.shape[0] == 0:
        return zero_gradients(inputs)
    dtype = accumulation_dtype(u)
    A, D, delta_bias = to_parameters(dtype, A, D, delta_bias)
    backend = _dispatch.select_backend('selective_scan', u.device)
    grads = backend.backward(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, index, checkpoints,
                             delta_softplus, reverse, merge)
    return pack_gradients(inputs, grads)


def _routed_scan_backward_fake(
        dout: torch.Tensor,
        dlast_state: torch.Tensor | None,
        u: torch.Tensor,
        *args: torch.Tensor | bool | None,
) -> tuple[torch.Tensor, ...]:
    return fake_gradients((u, *args[:7]))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.merge = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(
        ctx: torch.autograd.function.FunctionCtx,
        dout: torch.Tensor | None,
        dlast_state: torch.Tensor | None,
        _: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    *tensors, index, checkpoints = ctx.saved_tensors
    u, delta = tensors[:2]
    if dout is None:
        if dlast_state is None:
            return (None,) * 12
        dout = u.new_zeros(delta.shape[0], 1 if ctx.merge else delta.shape[1], *delta.shape[2:])
    grads = torch.ops.visionssm.routed_scan_backward(
        dout, dlast_state, *tensors, index, checkpoints, ctx.delta_softplus, ctx.reverse, ctx.merge)
    return (*drop_absent(tensors, grads), None, None, None, None)


def _scan_flops(
        u: tuple[int, ...],
        delta: tuple[int, ...],
        A: tuple[int, ...],
        B: tuple[int, ...],
        C: tuple[int, ...],
        D: tuple[int, ...] | None,
        *args: object,
        **kwargs: object,
) -> int:
    """Forward FLOPs, a multiply-add as 2: per state 6 (delta A, delta B u, state, C state), per position 1, D 2."""
    batch, routes, dim, length = delta
    return batch * routes * dim * length * (6 * A[-1] + 1 + (0 if D is None else 2))


def _scan_backward_flops(
        dout: tuple[int, ...],
        dlast_state: tuple[int, ...] | None,
        u: tuple[int, ...],
        delta: tuple[int, ...],
        A: tuple[int, ...],
        B: tuple[int, ...],
        C: tuple[int, ...],
        D: tuple[int, ...] | None,
        *args: object,
        **kwargs: object,
) -> int:
    """Backward FLOPs: per state 4 to recompute it and 14 for the adjoint and the six products with it."""
    batch, routes, dim, length = delta
    return batch * routes * dim * length * (18 * A[-1] + 3 + (0 if D is None else 4))


routed_scan = define_op(
    'routed_scan', f'({_SCAN_ARGS}, {_SCAN_FLAGS}) -> (Tensor, Tensor, Tensor)', _routed_scan, _routed_scan_fake,
    setup_context=_setup_context, backward=_backward, flops=_scan_flops, decomposition=traceable.routed_scan)
define_op(
    'routed_scan_backward',
    f'(Tensor dout, Tensor? dlast_state, {_SCAN_ARGS}, Tensor checkpoints, {_SCAN_FLAGS}) -> '
    '(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    _routed_scan_backward, _routed_scan_backward_fake,
    setup_context=lambda ctx, inputs, output: None, flops=_scan_backward_flops,
    backward=no_second_derivative(
        'selective_scan', 'visionssm_kernels.selective_scan.reference.forward, which autograd differentiates'))


def _check_matrix(name: str, x: torch.Tensor, batch: int, dim: int, state: int, length: int) -> torch.Tensor:
    """Checks B or C of the 1-D scan and returns its canonical form."""
    op = 'selective_scan'
    check_ndim(op, name, x, (2, 3, 4), '(D, N), (B, N, L) or (B, G, N, L)')
    if x.ndim == 2:
        check_shape(op, name, x, (dim, state), '(D, N)')
        return x[None]
    if x.ndim == 3:
        check_shape(op, name, x, (batch, state, length), '(B, N, L)')
        return x.unsqueeze(1).unsqueeze(1)
    check_shape(op, name, x, (batch, x.shape[1], state, length), '(B, G, N, L)')
    if x.shape[1] == 0 or dim % x.shape[1]:
        raise ValueError(f'{op}: the {x.shape[1]} groups of {name} must divide the {dim} channels of u')
    return x[:, None]


def _selective_scan_with_state(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    op = 'selective_scan'
    check_tensors(op, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    check_ndim(op, 'u', u, (3,), '(B, D, L)')
    check_ndim(op, 'A', A, (2,), '(D, N)')
    batch, dim, length = u.shape
    state = A.shape[1]
    check_not_empty(op, D=dim, N=state, L=length)
    check_shape(op, 'delta', delta, (batch, dim, length), '(B, D, L), the shape of u,')
    check_shape(op, 'A', A, (dim, state), '(D, N)')
    for name, x in (('D', D), ('delta_bias', delta_bias)):
        if x is not None:
            check_shape(op, name, x, (dim,), '(D,)')
    if z is not None:
        check_shape(op, 'z', z, (batch, dim, length), '(B, D, L), the shape of u,')
    B = _check_matrix('B', B, batch, dim, state, length)
    C = _check_matrix('C', C, batch, dim, state, length)
    # unsqueeze and select, because indexing with None takes several times as long
    out, last_state, _ = routed_scan(
        u.unsqueeze(1), delta.unsqueeze(1), A.unsqueeze(0), B, C, None if D is None else D.unsqueeze(0),
        None if z is None else z.unsqueeze(1), None if delta_bias is None else delta_bias.unsqueeze(0), None,
        delta_softplus, reverse, False)
    return out.select(1, 0), last_state.select(1, 0)


def _selective_scan(*args: torch.Tensor | bool | None, **kwargs: torch.Tensor | bool | None) -> torch.Tensor:
    return _selective_scan_with_state(*args, **kwargs)[0]


_PUBLIC_ARGS = ('(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, '
                'Tensor? delta_bias=None, bool delta_softplus=False, bool reverse=False)')
define_composite('selective_scan', f'{_PUBLIC_ARGS} -> Tensor', _selective_scan)
define_composite('selective_scan_with_state', f'{_PUBLIC_ARGS} -> (Tensor, Tensor)', _selective_scan_with_state)


def selective_scan(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        reverse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Runs the selective scan of Mamba along the last dimension.

    state_l = exp(delta_l A) state_{l-1} + delta_l B_l u_l,  y_l = C_l . state_l + D u_l,  out = y silu(z), with
    delta <- softplus(delta + delta_bias) first if asked for. A scripted module calls
    `torch.ops.visionssm.selective_scan` (same arguments without `return_last_state`), which returns the output alone.

    Args:
        u: Input, (B, D, L).
        delta: Step sizes, (B, D, L).
        A: Decay rates, (D, N); negative in a stable system.
        B: Input matrix: (B, N, L), grouped (B, G, N, L) with group d // (D / G) for channel d, or constant (D, N).
        C: Output matrix, any of the forms of B.
        D: Skip weights, (D,).
        z: Gate, (B, D, L).
        delta_bias: Added to delta, (D,).
        delta_softplus: Applies softplus to delta (after the bias).
        return_last_state: Also returns the state after the last step.
        reverse: Scans from the last position to the first, without copies; equals flipping every map before and after.

    Returns:
        The output (B, D, L) in the dtype of u; with `return_last_state` also the state (B, D, N) in float32 (float64
        for float64 inputs).

    Note:
        Inputs may be float32, bfloat16 and float16 in any mixture, or all float64. States and sums are float32
        (float64) always, under autocast too, and the output is rounded once. Every input has a gradient, through the
        last state as well; there is no second derivative.
    """
    op = torch.ops.visionssm.selective_scan_with_state if return_last_state else torch.ops.visionssm.selective_scan
    return op(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
