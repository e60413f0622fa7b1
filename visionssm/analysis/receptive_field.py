"""The effective receptive field: which pixels of an image the middle of a feature map depends on, and how much.

Luo et al., `Understanding the Effective Receptive Field in Deep Convolutional Neural Networks`, NeurIPS 2016,
arXiv 1701.04128; the shares are those of RepLKNet, arXiv 2203.06717, table 10.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..export.inputs import example_inputs
from ._passes import evaluation_mode

__all__ = ['ReceptiveField', 'effective_receptive_field']

SHARES = (0.2, 0.5, 0.99)


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """How strongly the middle of a feature map depends on every pixel of an image."""
    gradient: torch.Tensor
    """Mean over images of the absolute gradient, summed over the channels of the image, float64, (H, W)."""
    centre: tuple[float, float]
    """Row and column that halve the gradient, in pixels of the image: its middle, wherever the paddings of strided
    convolutions have moved it."""
    feature_size: tuple[int, int]
    """Height and width of the feature map."""
    images: int
    """Number of images."""

    def sides(self, shares: Sequence[float] = SHARES) -> dict[float, int]:
        """Return the side in pixels of the smallest square around the centre that holds each share of the gradient.

        Args:
            shares: Shares, above 0 and at most 1.

        Returns:
            Share to side; squares may reach beyond the image.
        """
        wrong = [share for share in shares if not 0 < share <= 1]
        if wrong:
            raise ValueError(f'shares are {list(shares)}; {wrong[0]} is not above 0 and at most 1')
        height, width = self.gradient.shape
        rows = (torch.arange(height) + 0.5 - self.centre[0]).abs()
        columns = (torch.arange(width) + 0.5 - self.centre[1]).abs()
        distance, order = torch.maximum(rows[:, None], columns).flatten().sort()
        held = self.gradient.flatten()[order].cumsum(0)
        at = [int((held >= share * held[-1] * (1 - 1e-12)).nonzero()[0]) for share in shares]
        return {share: round(2 * float(distance[i]) + 1) for share, i in zip(shares, at)}


def effective_receptive_field(
        model: nn.Module,
        images: torch.Tensor | None = None,
        stage: int = -1,
        size: int | Sequence[int] | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> ReceptiveField:
    """Measure the effective receptive field of the middle pixel of a feature map.

    The channels of that pixel are added up with random signs, the same for all images: behind a LayerNorm, a plain sum
    hardly depends on anything. A backbone gives the map of a stage before the final normalisation; other models, such
    as restoration networks, what they put out; a detector the map of its backbone.

    Args:
        model: A backbone with `forward_intermediates` (of the package, or of timm), or a model that puts out a map
            (B, C, H, W) or a list of maps, of which the last one is taken.
        images: Images as the model takes them, normalised, (B, C, H, W); 8 of Gaussian noise when None.
        stage: Number of the map, from the end if negative.
        size: Height and width of the noise, or one number for both; the model's own when None.
        progress: Wraps the loop over images, for a progress bar.

    Returns:
        The field.

    Raises:
        ValueError: The model puts out no map, or has no such stage.
    """
    if images is not None and (images.ndim != 4 or not len(images)):
        raise ValueError(f'images are {tuple(images.shape)}; needed is (B, C, H, W) with at least one image')
    given = example_inputs(model, size if images is None else tuple(images.shape[2:]), 8 if images is None
                           else len(images)).tensors
    weights = next(model.parameters(), given[0])
    inputs = [tensor.to(weights.device) for tensor in (given[0] if images is None else images, *given[1:])]
    total = torch.zeros(tuple(inputs[0].shape[2:]), dtype=torch.float64)
    feature_size = (0, 0)
    with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
        for i in progress(range(len(inputs[0]))):
            image = inputs[0][i:i + 1].detach().to(weights.dtype).clone().requires_grad_()
            features = _feature_map(model, [image, *(extra[i:i + 1] for extra in inputs[1:])], stage)
            feature_size = tuple(features.shape[2:])
            pixel = features[0, :, feature_size[0] // 2, feature_size[1] // 2]
            generator = torch.Generator().manual_seed(0)
            signs = torch.randint(0, 2, pixel.shape, generator=generator).to(pixel) * 2 - 1
            gradient = torch.autograd.grad((pixel * signs).sum(), image)[0]
            total += gradient[0].detach().double().abs().sum(0).cpu()
    if not total.isfinite().all() or not total.any():
        raise ValueError(f'The gradient of {type(model).__name__} is '
                         f'{"zero" if total.isfinite().all() else "not finite"}: it has no receptive field')
    centre = _halve(total.sum(1)), _halve(total.sum(0))
    return ReceptiveField(total / len(inputs[0]), centre, feature_size, len(inputs[0]))


def _halve(weights: torch.Tensor) -> float:
    """Return the place from 0 to the length that half of some weights lies before."""
    sums = weights.cumsum(0)
    half = sums[-1] / 2
    at = int((sums < half).sum())
    return at + float((half - sums[at] + weights[at]) / weights[at])


def _feature_map(model: nn.Module, inputs: list[torch.Tensor], stage: int) -> torch.Tensor:
    """Return a feature map, (1, C, H, W)."""
    name = type(model).__name__
    if hasattr(model, 'forward_intermediates'):
        count = len(model.feature_info)
        if not -count <= stage < count:
            raise ValueError(f'stage is {stage}; {name} has {count} maps, from 0')
        return model.forward_intermediates(*inputs, indices=[stage % count], intermediates_only=True)[0]
    # a detector's own output is boxes
    out = getattr(model, 'backbone', model)(*inputs)
    maps = list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, list | tuple) else [out]
    maps = [feature for feature in maps if isinstance(feature, torch.Tensor) and feature.ndim == 4]
    if not maps:
        raise ValueError(f'{name} puts out no map and has no forward_intermediates: build it with features_only=True')
    if not -len(maps) <= stage < len(maps):
        raise ValueError(f'stage is {stage}; {name} puts out {len(maps)} maps')
    return maps[stage]
