"""Faults that a data set makes by itself, from good pictures alone.

Each is a callable from a picture (C, H, W) in [0, 1] to a worse one, (C, H / scale, W / scale). What is drawn comes
from PyTorch's global generator, which the data set seeds for each sample. A training patch is cut out before it is
spoilt, with `margin` more pixels on every side that start at a multiple of `align`, so that the patch is what would
have been cut out of the whole spoilt picture.
"""
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...registry import TRANSFORMS
from ...restoration.degradations import (
    SECOND_STAGE,
    SecondOrderDegradation,
    Stage,
    add_gaussian_noise,
    compress_jpeg,
    shrink_bicubic,
)
from ...restoration.sharpen import unsharp_mask

__all__ = ['BicubicFault', 'JpegFault', 'NoiseFault', 'SecondOrderFault']


def _check_scale(scale: int) -> None:
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f'scale is {scale!r}; it must be a whole number from 1 up')


@TRANSFORMS.register_module()
class BicubicFault:
    """Shrinks as MATLAB does, which made the small images of the benchmarks.

    Args:
        scale: How many times.
    """

    def __init__(self, scale: int) -> None:
        _check_scale(scale)
        self.scale = self.align = scale
        # the kernel reaches two small pixels far, and the last digits are cut off anyway
        self.margin = 4 * scale

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        """Spoil a picture."""
        return shrink_bicubic(picture, self.scale)


@TRANSFORMS.register_module()
class NoiseFault:
    """Adds Gaussian noise without clipping.

    Args:
        sigma: Deviation, in units of 1 / 255.
        seed: Makes the noise a function of the size alone: that of the official evaluation, which seeds NumPy with 0
            before every picture and draws in the order height, width, channel from blue to red. None draws anew.
    """

    scale = align = 1
    margin = 0

    def __init__(self, sigma: float, seed: int | None = None) -> None:
        if not sigma > 0:
            raise ValueError(f'sigma is {sigma}; it must be above 0')
        self.sigma = sigma
        self.seed = seed

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        """Spoil a picture."""
        if self.seed is None:
            return add_gaussian_noise(picture, self.sigma)
        generator = np.random.RandomState(self.seed)  # noqa: NPY002  (the generator of the official numbers)
        channels, height, width = picture.shape
        noise = generator.normal(0, self.sigma / 255, (height, width, channels))[..., ::-1]
        return picture + torch.from_numpy(noise.copy()).permute(2, 0, 1).to(picture.dtype)


@TRANSFORMS.register_module()
class JpegFault:
    """Writes and reads a JPEG.

    Args:
        quality: From 1 to 100.
    """

    scale = 1
    # JPEG's blocks, in pictures whose colours are stored at half the resolution
    align = margin = 16

    def __init__(self, quality: int) -> None:
        if quality not in range(1, 101):
            raise ValueError(f'quality is {quality}; JPEG knows 1 to 100')
        self.quality = quality

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        """Spoil a picture."""
        return compress_jpeg(picture, self.quality)


@TRANSFORMS.register_module()
class SecondOrderFault:
    """The faults of photographs from the web: blur, resizing, noise and JPEG, twice over (Real-ESRGAN's chain).

    Args:
        scale: How many times smaller the result is.
        first: Replaces values of the first stage, see `restoration.degradations.Stage`.
        second: Replaces values of the second stage.
        final_sinc: Probability of the last ringing filter.
        sharpen: Spoil the picture after `unsharp_mask`, as Real-ESRGAN does; its losses then have `sharpen=True` too.
        margin: Pixels around a patch that are spoilt with it, so that its borders are none; a multiple of `scale`.
    """

    def __init__(
            self,
            scale: int = 4,
            first: dict[str, Any] | None = None,
            second: dict[str, Any] | None = None,
            final_sinc: float = 0.8,
            sharpen: bool = False,
            margin: int = 0,
    ) -> None:
        _check_scale(scale)
        if margin < 0 or margin % scale:
            raise ValueError(f'margin is {margin}; it must be a multiple of the scale {scale}, or 0')
        self.scale = self.align = scale
        self.sharpen = sharpen
        self.margin = margin
        try:
            stages = replace(Stage(), **(first or {})), replace(SECOND_STAGE, **(second or {}))
        except TypeError as error:
            raise ValueError(f'a stage of faults takes {", ".join(Stage.__annotations__)}: {error}') from error
        self.spoil = SecondOrderDegradation(scale, *stages, final_sinc)

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        """Spoil a picture."""
        return self.spoil(unsharp_mask(picture) if self.sharpen else picture)
