"""What a model of each task is fed with."""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

__all__ = ['Inputs', 'example_inputs']


class Inputs(NamedTuple):
    """Names and example tensors of a model's inputs, batch first."""

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]


def _side(model: nn.Module) -> tuple[int, int]:
    """Height and width that the model was built for, else those of its configuration."""
    side = getattr(model, 'img_size', None) or getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    side = side or (getattr(model, 'pretrained_cfg', None) or {}).get('input_size', (64, 64))[-2:]
    return (side, side) if isinstance(side, int) else tuple(side)


def _channels(model: nn.Module) -> int:
    for key in ('in_chans', 'in_channels'):
        if getattr(model, key, None):
            return int(getattr(model, key))
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    return first.in_channels if first is not None else int(cfg.get('input_size', (3,))[0])


def example_inputs(
        model: nn.Module,
        size: int | Sequence[int] | None = None,
        batch: int = 1,
        seed: int = 0,
) -> Inputs:
    """Draw inputs of the right kind for a model.

    Args:
        model: Any model of the package.
        size: Height and width, or one number for both; None takes the model's own.
        batch: How many pictures.
        seed: Of the random numbers.

    Returns:
        Their names and tensors, which are pictures (B, C, H, W) and for diffusion time steps (B,) and classes (B,).

    Raises:
        ValueError: The size is no one or two whole numbers above 0.
    """
    sides = _side(model) if size is None else (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f'size is {size!r}; give one whole number above 0, or a height and a width')
    if batch < 1:
        raise ValueError(f'batch is {batch}; it must be at least 1')
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(batch, _channels(model), *sides, generator=generator)
    if not hasattr(model, 'learn_sigma'):
        return Inputs(('input',), (pictures,))
    steps = torch.randint(0, 1000, (batch,), generator=generator).float()
    if not getattr(model, 'num_classes', 0):
        return Inputs(('input', 'timesteps'), (pictures, steps))
    classes = torch.randint(0, model.num_classes, (batch,), generator=generator)
    return Inputs(('input', 'timesteps', 'class_labels'), (pictures, steps, classes))
