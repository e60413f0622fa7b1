"""Argument checks shared by the ops: every message names the argument, what it got and what is allowed."""
import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_shape(op: str, name: str, tensor: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless `tensor` has the expected shape.

    Args:
        op: Name of the op, for the message.
        name: Name of the argument.
        tensor: The argument.
        expected: The shape it must have.
        meaning: The shape in symbols, for example '(B, D, L)'.
    """
    if tensor.shape != expected:
        raise ValueError(f'{op}: {name} must be {meaning} = {_shape(expected)}, got {_shape(tensor.shape)}')


def check_ndim(op: str, name: str, tensor: torch.Tensor, allowed: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless the number of dimensions of `tensor` is among `allowed`."""
    if tensor.ndim not in allowed:
        raise ValueError(f'{op}: {name} must be {meaning}, got {_shape(tensor.shape)}')


def check_not_empty(op: str, **sizes: int) -> None:
    """Raises ValueError where one of the named sizes is zero."""
    for name, size in sizes.items():
        if size == 0:
            raise ValueError(f'{op}: {name} is 0; a scan needs at least one channel, one state and one position')


def check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    """Checks devices and dtypes: one device; all floating; float64 for all or for none.

    Args:
        op: Name of the op, for the message.
        tensors: Arguments by name, the leading one (whose device and dtype rule) first; None is skipped.
    """
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values() if tensor is not None}
    if len(kinds) == 1 and next(iter(kinds))[0] in FLOATING:
        return  # as models pass them; the loop below takes as long as the scan of a small map
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    leader, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.dtype not in FLOATING:
            raise TypeError(f'{op}: {name} must be floating point ({", ".join(_dtype(d) for d in FLOATING)}), '
                            f'got {_dtype(tensor.dtype)}; convert it with {name}.float()')
        if tensor.device != first.device:
            raise ValueError(f'{op}: {name} is on {tensor.device}, but {leader} is on {first.device}; '
                             f'move it with {name}.to({leader}.device)')
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(f'{op}: {name} is {_dtype(tensor.dtype)}, but {leader} is {_dtype(first.dtype)}; float64 '
                            f'cannot be mixed with other dtypes: convert with {name}.to({leader}.dtype)')


def _shape(shape: tuple[int, ...]) -> str:
    return '(' + ', '.join(str(size) for size in shape) + ')'


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
