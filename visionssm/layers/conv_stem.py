"""Convolutions that lead into and between the stages of a hierarchical backbone, on channels-last maps."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, register_notrace_function, register_notrace_module, to_2tuple, trunc_normal_
from torch import nn

from .patch_embed import check_image

__all__ = ['ConvDownsample', 'ConvStem', 'default_norm']

default_norm: Callable[..., nn.Module] = partial(LayerNorm, eps=1e-5)
"""Makes the norm of the channels of a channels-last map."""


@register_notrace_function
def fit_pos_embed(pos_embed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return a position embedding (1, C, H', W') as (1, height, width, C), bicubically resampled where it must be."""
    if pos_embed.shape[2] != height or pos_embed.shape[3] != width:
        pos_embed = F.interpolate(
            pos_embed.float(), size=[height, width], mode='bicubic', align_corners=False).to(pos_embed.dtype)
    return pos_embed.permute(0, 2, 3, 1)


class ConvStem(nn.Module):
    """Patches of an image as a map: one convolution of the size of its stride, or two overlapping ones.

    norm1(conv1(x)), with `overlap` norm2(conv2(gelu(norm1(conv1(x))))); then the position embedding.
    """

    overlap: Final[bool]

    def __init__(
            self,
            in_chans: int,
            dim: int,
            patch_size: int = 4,
            overlap: bool = False,
            norm_layer: Callable[..., nn.Module] | None = None,
            pos_embed_size: int | tuple[int, int] | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolutions.

        Args:
            in_chans: Channels of the images.
            dim: Channels C of the map.
            patch_size: Side of a patch, even with `overlap`.
            overlap: Two convolutions of stride `patch_size` / 2 and side `patch_size` / 2 + 1; else one.
            norm_layer: Makes the norm of the channels of a channels-last map; a LayerNorm with epsilon 1e-5 when None.
            pos_embed_size: Size (H', W') of a learned position embedding, resampled for other maps; none when None.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if patch_size < 1 or (overlap and patch_size % 2):
            raise ValueError(f'patch_size is {patch_size}; two overlapping convolutions need an even one, from 2 on.')
        norm_layer = norm_layer or default_norm
        self.in_chans = in_chans
        self.overlap = overlap
        stride = patch_size // 2
        # Both overlapping convolutions pad by one pixel: with the usual stride of 2 they take any image.
        self.least = max(1, stride * stride - stride - 1) if overlap else patch_size
        if overlap:
            self.conv1 = nn.Conv2d(in_chans, dim // 2, stride + 1, stride, padding=1, **dd)
            self.norm1 = norm_layer(dim // 2, **dd)
            self.act = nn.GELU()
            self.conv2 = nn.Conv2d(dim // 2, dim, stride + 1, stride, padding=1, **dd)
            self.norm2 = norm_layer(dim, **dd)
        else:
            self.conv1 = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
            self.norm1 = norm_layer(dim, **dd)
        self.pos_embed = None
        self.add_pos_embed = pos_embed_size is not None
        if pos_embed_size is not None:
            self.pos_embed = nn.Parameter(torch.empty(1, dim, *to_2tuple(pos_embed_size), **dd))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the position embedding anew; the other parameters belong to sub-modules."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images.

        Args:
            x: Images, (B, in_chans, H, W).

        Returns:
            (B, H', W', C); H' = floor(H / patch_size), or with `overlap` and patches of 4 ceil(ceil(H / 2) / 2).
        """
        # Channels-last memory from here on: norms and blocks read their maps pixel by pixel.
        x = check_image(x, self.in_chans, self.least, self.least).contiguous(memory_format=torch.channels_last)
        x = self.norm1(self.conv1(x).permute(0, 2, 3, 1))
        if self.overlap:
            x = self.norm2(self.conv2(self.act(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        if self.pos_embed is not None and self.add_pos_embed:
            x = x + fit_pos_embed(self.pos_embed, x.shape[1], x.shape[2])
        return x


@register_notrace_function
def check_map(x: torch.Tensor, least: int) -> torch.Tensor:
    """Return `x`, (B, H, W, C), or raise a ValueError where a side is below `least`."""
    if x.shape[1] < least or x.shape[2] < least:
        raise ValueError(
            f'A map of {x.shape[1]} x {x.shape[2]} pixels cannot be halved: enlarge the images, or use a convolution '
            f'of side 3.')
    return x


@register_notrace_module
class HalvingConv2d(nn.Conv2d):
    """Convolution of stride 2 that is one product of matrices where its weights outnumber the pixels.

    The library of convolutions brings the weights into an order of its own in every pass, which then takes longer than
    all the rest; gathering a few pixels does not. Graphs keep the convolution, because their sizes must stay free.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve (B, C, H, W), channels innermost in memory, to the same layout."""
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self._conv_forward(x, self.weight, self.bias)
        if 2 * x.shape[0] * (x.shape[2] // 2) * (x.shape[3] // 2) > self.out_channels:
            return self._conv_forward(x, self.weight, self.bias)
        (height, width), (top, left) = self.kernel_size, self.padding
        pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
        pixels = pixels.unfold(1, height, 2).unfold(2, width, 2).flatten(3)  # (B, H', W', C * kernel)
        return F.linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ConvDownsample(nn.Module):
    """Halve a map by a convolution of stride 2 and a norm: (B, H, W, C) to (B, H', W', C')."""

    def __init__(
            self,
            dim: int,
            out_dim: int,
            kernel_size: int = 3,
            norm_layer: Callable[..., nn.Module] | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolution.

        Args:
            dim: Channels C.
            out_dim: Channels C' of the result.
            kernel_size: 3, padded: H' = ceil(H / 2); or 2: H' = floor(H / 2).
            norm_layer: Makes the norm of the channels of a channels-last map; a LayerNorm with epsilon 1e-5 when None.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        if kernel_size not in (2, 3):
            raise ValueError(f'kernel_size is {kernel_size}; allowed are 2 and 3.')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.least = 2 if kernel_size == 2 else 1
        self.conv = HalvingConv2d(dim, out_dim, kernel_size, stride=2, padding=kernel_size // 3, **dd)
        self.post_norm = (norm_layer or default_norm)(out_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Halve a map.

        Args:
            x: Map, (B, H, W, C).

        Returns:
            (B, H', W', C').
        """
        x = self.conv(check_map(x, self.least).permute(0, 3, 1, 2))
        return self.post_norm(x.permute(0, 2, 3, 1))
