"""What restoration networks have around their trunk: normalised inputs, convolutions, and heads that enlarge.

Maps are channels-last, (B, H, W, C), in the trunk; images and what the heads make are (B, C, H, W).
"""

from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import nn

from visionssm.utils.suggest import check_choice

__all__ = ['ImageFrame', 'MapConv', 'check_image', 'make_head', 'make_skip_conv', 'pad_to_multiple']

HEADS = ('residual', 'pixelshuffle', 'pixelshuffledirect', 'nearest+conv')
SKIP_CONVS = ('1conv', '3conv')
_RGB_MEAN = (0.4488, 0.4371, 0.4040)
_HEAD_WIDTH = 64


class MapConv(nn.Conv2d):
    """A convolution of channels-last maps, (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve a map."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def make_skip_conv(
        kind: str,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return what stands in front of a long skip connection: '1conv', or '3conv' with a narrow middle."""
    dd: dict[str, Any] = {'device': device, 'dtype': dtype}
    check_choice('resi_connection', kind, SKIP_CONVS)
    if kind == '1conv':
        return MapConv(dim, dim, 3, padding=1, **dd)
    return nn.Sequential(
        MapConv(dim, dim // 4, 3, padding=1, **dd), nn.LeakyReLU(0.2), MapConv(dim // 4, dim // 4, 1, **dd),
        nn.LeakyReLU(0.2), MapConv(dim // 4, dim, 3, padding=1, **dd))


class ImageFrame(nn.Module):
    """The way from images in [0, 1] to what a network reads, and back: (x - mean) * range.

    The mean is that of the official training images for three channels, and zero otherwise.
    """

    def __init__(self, in_chans: int, img_range: float = 1., device: torch.device | str | None = None) -> None:
        """Keep the mean outside the state dict, where the official code has none either.

        Args:
            in_chans: Channels of the images.
            img_range: Factor of the values.
            device: Where the mean lies.
        """
        super().__init__()
        if not img_range > 0:
            raise ValueError(f'img_range is {img_range}; it must be above 0.')
        self.img_range = img_range
        self.register_buffer('mean', torch.empty(in_chans, 1, 1, device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the mean."""
        channels = self.mean.shape[0]
        self.mean.copy_(torch.tensor(_RGB_MEAN if channels == 3 else (0.,) * channels).view(-1, 1, 1))

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise images, (B, in_chans, H, W)."""
        return (x - self.mean.to(x.dtype)) * self.img_range

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `enter`."""
        return x / self.img_range + self.mean.to(x.dtype)


class ResidualHead(nn.Module):
    """A correction of the input: denoising and artefacts of compression."""

    def __init__(self, dim: int, in_chans: int, **dd: Any) -> None:
        """Build the convolution from `dim` to `in_chans` channels."""
        super().__init__()
        self.conv_last = nn.Conv2d(dim, in_chans, 3, padding=1, **dd)

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Add what is computed from (B, dim, H, W) to the normalised image (B, in_chans, H, W)."""
        return image + self.conv_last(features)


def _shuffles(scale: int, width: int, **dd: Any) -> nn.Sequential:
    """Return convolutions with pixel shuffles that enlarge `scale` times."""
    if scale == 3:
        return nn.Sequential(nn.Conv2d(width, 9 * width, 3, padding=1, **dd), nn.PixelShuffle(3))
    if scale < 2 or scale & (scale - 1):
        raise ValueError(f"upscale is {scale}; the head 'pixelshuffle' enlarges 3 times or by a power of two.")
    parts: list[nn.Module] = []
    for _ in range(scale.bit_length() - 1):
        parts += [nn.Conv2d(width, 4 * width, 3, padding=1, **dd), nn.PixelShuffle(2)]
    return nn.Sequential(*parts)


class ShuffleHead(nn.Module):
    """Classic super-resolution: a reduction to 64 channels, pixel shuffles, and a last convolution."""

    def __init__(self, dim: int, in_chans: int, scale: int, **dd: Any) -> None:
        """Build the convolutions; `scale` is a power of two, or 3."""
        super().__init__()
        self.conv_before = nn.Sequential(nn.Conv2d(dim, _HEAD_WIDTH, 3, padding=1, **dd), nn.LeakyReLU(0.01))
        self.upsample = _shuffles(scale, _HEAD_WIDTH, **dd)
        self.conv_last = nn.Conv2d(_HEAD_WIDTH, in_chans, 3, padding=1, **dd)

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Enlarge (B, dim, H, W) to (B, in_chans, s H, s W)."""
        return self.conv_last(self.upsample(self.conv_before(features)))


class DirectShuffleHead(nn.Module):
    """Lightweight super-resolution: one convolution and one pixel shuffle."""

    def __init__(self, dim: int, in_chans: int, scale: int, **dd: Any) -> None:
        """Build the convolution."""
        super().__init__()
        self.upsample = nn.Sequential(
            nn.Conv2d(dim, scale ** 2 * in_chans, 3, padding=1, **dd), nn.PixelShuffle(scale))

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Enlarge (B, dim, H, W) to (B, in_chans, s H, s W)."""
        return self.upsample(features)


class NearestHead(nn.Module):
    """Super-resolution of real photographs, 4 times: nearest neighbours, which leave no pattern, and convolutions."""

    def __init__(self, dim: int, in_chans: int, scale: int, **dd: Any) -> None:
        """Build the convolutions; `scale` is 4."""
        super().__init__()
        if scale != 4:
            raise ValueError(f"upscale is {scale}; the head 'nearest+conv' enlarges 4 times.")
        width = _HEAD_WIDTH
        self.conv_before = nn.Sequential(nn.Conv2d(dim, width, 3, padding=1, **dd), nn.LeakyReLU(0.01))
        self.conv_up1 = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.conv_up2 = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.conv_hr = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.conv_last = nn.Conv2d(width, in_chans, 3, padding=1, **dd)
        self.act = nn.LeakyReLU(0.2)
        self.nearest = nn.UpsamplingNearest2d(scale_factor=2)

    def forward(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Enlarge (B, dim, H, W) to (B, in_chans, 4 H, 4 W)."""
        x = self.act(self.conv_up1(self.nearest(self.conv_before(features))))
        x = self.act(self.conv_up2(self.nearest(x)))
        return self.conv_last(self.act(self.conv_hr(x)))


def make_head(
        kind: str,
        dim: int,
        in_chans: int,
        scale: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return what makes an image of the trunk's features.

    Args:
        kind: 'pixelshuffle', 'pixelshuffledirect', 'nearest+conv' or 'residual'.
        dim: Channels of the features.
        in_chans: Channels of the images.
        scale: How many times the image grows; 1 for 'residual'.
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Returns:
        A module of (features (B, dim, H, W), normalised image (B, in_chans, H, W)) to (B, in_chans, s H, s W).
    """
    check_choice('upsampler', kind, HEADS)
    if kind == 'residual':
        if scale != 1:
            raise ValueError(f"upscale is {scale}; the head 'residual' keeps the size, so it must be 1.")
        return ResidualHead(dim, in_chans, device=device, dtype=dtype)
    if scale < 1:
        raise ValueError(f'upscale is {scale}; it must be at least 1.')
    head = {'pixelshuffle': ShuffleHead, 'pixelshuffledirect': DirectShuffleHead, 'nearest+conv': NearestHead}[kind]
    return head(dim, in_chans, scale, device=device, dtype=dtype)


@register_notrace_function
def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Mirror images at the bottom and at the right, edge pixel included, until `multiple` divides their sides.

    Args:
        x: Images, (B, C, H, W), of any size.
        multiple: What the network needs.

    Returns:
        (B, C, H', W').
    """
    for axis in (2, 3):
        size = x.shape[axis]
        missing = -size % multiple
        if missing:
            at = torch.arange(size + missing, device=x.device) % (2 * size)
            x = x.index_select(axis, torch.minimum(at, 2 * size - 1 - at))
    return x


def check_image(x: torch.Tensor, in_chans: int) -> None:
    """Raise unless `x` are images of so many channels."""
    if x.dim() != 4 or x.shape[1] != in_chans or min(x.shape[2:]) < 1:
        raise ValueError(f'Expected images of shape (B, {in_chans}, H, W) with values in [0, 1], got '
                         f'{tuple(x.shape)}.')
