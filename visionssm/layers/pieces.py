"""Inference on a CPU piece by piece: the system takes long to provide memory for what does not fit into a cache."""

from collections.abc import Callable

import torch
from torch import nn

from visionssm_kernels.selective_scan_2d.routes import is_traced

__all__ = ['count_pieces', 'in_pieces', 'is_plain_inference']


def is_plain_inference(x: torch.Tensor) -> bool:
    """Say whether no graph is made of what happens to x, and no gradient is wanted."""
    return not (is_traced(x) or torch.jit.is_tracing() or torch.is_grad_enabled())


def count_pieces(x: torch.Tensor, numbers: int, most: int, module: nn.Module) -> int:
    """Say in how many pieces something should be done to x.

    Args:
        x: What is to be cut along its first axis, (n, ...), or all but its last, (..., n).
        numbers: Size of what is made of all of x and needed for a moment only.
        most: Numbers of it that a piece may have.
        module: What is applied to x. A hook in it wants to see all of x.

    Returns:
        1 where a graph is made, where gradients are needed, in training and on other devices than a CPU.
    """
    # First, as a graph has no answers to what comes behind it, or takes sizes for constants.
    if not is_plain_inference(x) or not x.is_cpu:
        return 1
    pieces = numbers // most
    if pieces < 2:
        return 1
    if any(m.training or m is not module and (m._forward_hooks or m._forward_pre_hooks) for m in module.modules()):
        return 1
    return pieces


def in_pieces(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, pieces: int) -> torch.Tensor:
    """Apply a function to `pieces` parts of x, (n, ...), that are as equal as can be; n values, laid out as its own."""
    parts = x.tensor_split(pieces)
    first = function(parts[0])
    innermost = first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        (len(x), *first.shape[1:]), dtype=first.dtype, device=first.device,
        memory_format=torch.channels_last if innermost else torch.contiguous_format)
    out[:len(first)] = first
    del first
    start = len(parts[0])
    for part in parts[1:]:
        out[start:start + len(part)] = function(part)
        start += len(part)
    return out
