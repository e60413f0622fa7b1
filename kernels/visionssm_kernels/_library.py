"""Registration of ops with torch.library: schema, kernel, fake, autograd, FLOPs and decomposition in one call."""
import functools
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ._dispatch import forced_backend, use_backend

NAMESPACE = 'visionssm'
_LIBRARY = torch.library.Library(NAMESPACE, 'FRAGMENT')
_decompositions: dict[torch._ops.OpOverload, Callable] = {}


def overload(name: str) -> torch._ops.OpOverload:
    """Returns the registered op `visionssm::<name>`."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _as_written(name: str, kernel: Callable) -> Callable:
    """Runs a kernel as it is written: under autocast the products of a PyTorch backend would drop to half precision.

    Refuses to run where a derivative in forward mode is being taken: `torch.func.jvp` hands an op without one the bare
    values and would take its derivative to be zero.
    """

    @functools.wraps(kernel)
    def run(*args: object) -> object:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f'{name} has no derivative in forward mode (torch.func.jvp, jacfwd, forward_ad); use reverse mode: '
                f'torch.autograd.grad or backward')
        if not torch._C._is_any_autocast_enabled():
            return kernel(*args)  # the guard below is not free
        with torch._C._DisableAutocast():
            return kernel(*args)

    return run


def _note_backend(setup_context: Callable) -> Callable:
    """Keeps with what the gradient needs the backend that `use_backend` named for the forward pass."""

    @functools.wraps(setup_context)
    def run(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor | tuple) -> None:
        ctx.backend = forced_backend()
        setup_context(ctx, inputs, output)

    return run


def _with_noted_backend(backward: Callable) -> Callable:
    """Computes a gradient by the backend of its forward pass, unless another one is named where it is computed.

    Gradients of an accelerator are computed in threads of PyTorch's own, where no `use_backend` of the caller counts.
    """

    @functools.wraps(backward)
    def run(ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor | None) -> object:
        if ctx.backend is None or forced_backend() is not None:
            return backward(ctx, *gradients)
        with use_backend(ctx.backend):
            return backward(ctx, *gradients)

    return run


def define_op(
        name: str,
        signature: str,
        kernel: Callable,
        fake: Callable,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
        flops: Callable | None = None,
        decomposition: Callable | None = None,
) -> torch._ops.OpOverload:
    """Registers a primitive op for every device; the kernel chooses its backend by itself.

    Args:
        name: Name without the namespace.
        signature: Schema without the name, '(Tensor x) -> Tensor'.
        kernel: Computes the op on real tensors, underneath autograd.
        fake: Computes empty outputs of the right shape, dtype and strides.
        setup_context: Saves what `backward` needs (torch.library.register_autograd).
        backward: Gradient formula built of other ops.
        flops: FLOP formula: shapes of the tensor arguments, `out_shape` by keyword -> number of FLOPs.
        decomposition: Traceable function of the same signature made of ATen ops only, for export.
    """
    qualified = f'{NAMESPACE}::{name}'
    torch.library.define(qualified, signature, lib=_LIBRARY, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, 'CompositeExplicitAutograd', _as_written(name, kernel), lib=_LIBRARY)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            qualified, _with_noted_backend(backward), setup_context=_note_backend(setup_context), lib=_LIBRARY)
    op = overload(name)
    if flops is not None:
        register_flop_formula(op.overloadpacket)(flops)
    if decomposition is not None:
        _decompositions[op] = decomposition
    return op


Tensors = Sequence[torch.Tensor | None]


def lay_out(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns a tensor laid out as `torch.empty_like` of another of its shape: itself, or a copy.

    Fakes promise this layout. It is looked up without taking memory.
    """
    strides = x.stride()
    # the look at a tensor without values takes longer, and says the same of one without gaps
    if strides == (like.stride() if like.is_contiguous() else torch.empty_like(like, device='meta').stride()):
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def to_parameters(dtype: torch.dtype, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Returns what backends take for parameters: contiguous, in the accumulation dtype; None stays None."""
    return tuple(x if x is None or (x.dtype == dtype and x.is_contiguous()) else x.to(dtype).contiguous()
                 for x in tensors)


def pack_gradients(inputs: Tensors, gradients: Tensors) -> tuple[torch.Tensor, ...]:
    """Returns what a backward op puts out: each gradient in the dtype of its input and laid out in its order.

    An op of fixed arity has no place for None: absent inputs get an empty tensor, which `drop_absent` takes away.
    """
    return tuple(inputs[0].new_empty(0) if x is None else lay_out(gradient.to(x.dtype), x)
                 for x, gradient in zip(inputs, gradients))


def zero_gradients(inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """Returns what a backward op puts out for an empty batch."""
    return tuple(inputs[0].new_empty(0) if x is None else torch.zeros_like(x) for x in inputs)


def fake_gradients(inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """Returns the empty tensors that stand for what a backward op puts out."""
    return tuple(inputs[0].new_empty(0) if x is None else torch.empty_like(x) for x in inputs)


def drop_absent(inputs: Tensors, gradients: Tensors) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients as autograd wants them: None where the input is None."""
    return tuple(None if x is None else gradient for x, gradient in zip(inputs, gradients))


def no_second_derivative(op: str, instead: str) -> Callable:
    """Returns the gradient formula of a backward op that has none: it raises and says what to call instead."""

    def refuse(ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor) -> None:
        raise NotImplementedError(f'{op} has no second derivative; where one is needed, call {instead}')

    return refuse


def define_composite(name: str, signature: str, function: Callable) -> torch._ops.OpOverload:
    """Registers an op that is a Python function of other ops; autograd, fakes and export look through it.

    As a registered op it can be called in scripted and FX-traced modules, where a Python function with checks cannot.

    Args:
        name: Name without the namespace.
        signature: Schema without the name.
        function: The function.
    """
    qualified = f'{NAMESPACE}::{name}'
    torch.library.define(qualified, signature, lib=_LIBRARY, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, 'CompositeImplicitAutograd', function, lib=_LIBRARY)
    _decompositions[overload(name)] = function
    return overload(name)


def export_decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """Returns {op: traceable function of ATen ops} for `ExportedProgram.run_decompositions`."""
    return dict(_decompositions)
