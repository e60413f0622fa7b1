"""Parameters and operations of a model, counted without memory and without running it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..export.inputs import example_inputs
from ._passes import evaluation_mode, meta_tensors

__all__ = ['count_flops']


def count_flops(model: nn.Module, input_size: Sequence[int] = (3, 224, 224), batch_size: int = 1) -> dict[str, Any]:
    """Count the multiply-adds of a forward pass.

    The pass runs on the meta device, on shapes alone, so the largest models cost neither memory nor time; the model
    itself, which may hold weights or be on the meta device, is left as it is.

    A multiply-add is one MAC: the number is half of what PyTorch's `FlopCounterMode` counts. Counted are matrix
    products (linear layers, attention), convolutions, and the operators of `visionssm_kernels` by their own formulas:
    a selective scan costs per state and step 3 MACs (decay, drive, update and output; exponentials are not counted),
    its skip 1. Not counted are normalisations, activations, gates and residual sums, pooling, resampling, and the
    moving of data. Published numbers may follow other rules, above all for scans.

    Args:
        model: A model that takes a batch of images; one of diffusion also gets its time steps and classes.
        input_size: (channels, height, width) of an image.
        batch_size: Number of images.

    Returns:
        `params`, the number of parameters; `macs`, the total; and the total by parts, `by_op`, name of the operator
        to MACs, and `by_module`, class of the innermost module around the operator to MACs, both from the largest.
    """
    size = tuple(input_size)
    if len(size) != 3 or min(*size, batch_size) < 1:
        raise ValueError(
            f'input_size is {size} and batch_size {batch_size}; needed are positive (channels, height, width), such '
            f'as (3, 224, 224), and at least one image.')
    tensors = meta_tensors(model)
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    images = torch.empty(batch_size, *size, dtype=dtype, device='meta')
    others = [tensor.to('meta') for tensor in example_inputs(model, size[1:], batch_size).tensors[1:]]
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), torch.no_grad(), counter:
        torch.func.functional_call(model, tensors, (images, *others))
    flops = counter.get_flop_counts()
    return {
        'params': sum(parameter.numel() for parameter in model.parameters()),
        'macs': counter.get_total_flops() // 2,
        'by_op': _sorted({str(op): count // 2 for op, count in flops['Global'].items()}),
        'by_module': _sorted(_by_module(model, {path: sum(ops.values()) // 2 for path, ops in flops.items()})),
    }


def _by_module(model: nn.Module, totals: Mapping[str, int]) -> Counter[str]:
    """Take from every module's total what the modules inside it have, and add up by class."""
    root = type(model).__name__
    own = Counter({path: total for path, total in totals.items() if path != 'Global'})
    for path in list(own):
        parent = path.rpartition('.')[0]
        while parent and parent not in totals:  # a list of modules is never called itself
            parent = parent.rpartition('.')[0]
        if parent:
            own[parent] -= totals[path]
    classes: Counter[str] = Counter()
    for path, count in own.items():
        classes[type(model.get_submodule(path[len(root) + 1:])).__name__] += count
    return classes


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count}
