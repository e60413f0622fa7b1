"""Forward passes that leave a model as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ['evaluation_mode', 'meta_tensors']


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation while the context lasts, because training writes statistics and draws numbers.

    Every module gets its own mode back, also after an error.
    """
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def meta_tensors(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Return parameters and buffers without values, for `torch.func.functional_call` on shapes alone."""
    return {name: torch.empty_like(tensor, device='meta')
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
