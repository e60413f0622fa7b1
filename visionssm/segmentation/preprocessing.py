"""What the U-Nets expect of an image: stretched to 0..255 by its own extremes, then resized without antialiasing."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ['prepare_image', 'resize_map', 'stretch_intensity']


def stretch_intensity(image: torch.Tensor) -> torch.Tensor:
    """Return 255 (x - min) / (max - min), with the extremes of the whole image.

    The official code normalises with the mean and deviation of a data set first, which the stretching undoes.

    Args:
        image: One image of any shape and type.

    Returns:
        The same shape in 0..255, float32; all 0 where the image has one value only.
    """
    if image.numel() == 0:
        raise ValueError(f'The image is empty: its shape is {tuple(image.shape)}.')
    low, high = image.min().float(), image.max().float()
    return (image.float() - low) * (255 / (high - low)).where(high > low, 0.)


def resize_map(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize bilinearly without antialiasing, as torchvision did by default before version 0.17.

    Args:
        image: (C, H, W), floating point; images, masks in 0..1 and probabilities alike.
        size: Height and width.

    Returns:
        (C, height, width).
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], tuple(size), mode='bilinear', align_corners=False)[0]


def prepare_image(image: torch.Tensor, size: Sequence[int] = (256, 256)) -> torch.Tensor:
    """Stretch and resize an image.

    Args:
        image: (C, H, W) of any range and type, RGB.
        size: Height and width that the network gets.

    Returns:
        (C, height, width) in 0..255, float32.
    """
    return resize_map(stretch_intensity(image), size)
