"""Patches of an image as tokens, with clear errors for images that cannot be cut."""

from typing import Tuple, Union

import torch
from timm.layers import register_notrace_function, to_2tuple
from torch import nn

__all__ = ['PatchEmbed', 'check_image']


@register_notrace_function
def check_image(x: torch.Tensor, in_chans: int, patch_height: int, patch_width: int) -> torch.Tensor:
    """Return `x`, or raise a ValueError where it cannot be cut into patches."""
    if x.dim() != 4:
        raise ValueError(f'Expected images of shape (B, {in_chans}, H, W), got {x.dim()} dimensions.')
    if x.shape[1] != in_chans:
        raise ValueError(
            f'Expected images with {in_chans} channels, got {x.shape[1]}: '
            f'convert the images, or build the model with in_chans={x.shape[1]}.')
    if x.shape[2] < patch_height or x.shape[3] < patch_width:
        raise ValueError(
            f'An image of {x.shape[2]} x {x.shape[3]} pixels is smaller than a patch '
            f'({patch_height} x {patch_width}): enlarge the images, or use a model with smaller patches.')
    return x


class PatchEmbed(nn.Module):
    """Project each patch of an image to a token; patches overlap where the stride is smaller than the patch."""

    def __init__(
            self,
            img_size: int | tuple[int, int],
            patch_size: int | tuple[int, int],
            stride: int | tuple[int, int],
            in_chans: int,
            embed_dim: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the projection.

        Args:
            img_size: Size (H, W) that the position embedding is made for.
            patch_size: Side(s) of a patch.
            stride: Distance(s) of neighbouring patches.
            in_chans: Channels of the images.
            embed_dim: Channels of a token.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.in_chans = in_chans
        self.patch_size: Tuple[int, int] = to_2tuple(patch_size)
        self.stride: Tuple[int, int] = to_2tuple(stride)
        self.proj = nn.Conv2d(
            in_chans, embed_dim, kernel_size=self.patch_size, stride=self.stride, device=device, dtype=dtype)
        self.set_input_size(img_size)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Note the size of the images; the grid follows."""
        img_size = tuple(to_2tuple(img_size))
        grid_size = self.dynamic_feat_size(img_size)
        if min(grid_size) < 1:
            raise ValueError(
                f'img_size {img_size} is smaller than a patch {self.patch_size}: choose a larger img_size or '
                f'a smaller patch_size.')
        self.img_size: Tuple[int, int] = img_size
        self.grid_size: Tuple[int, int] = grid_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> Union[int, Tuple[int, int]]:
        """Return the stride of the map."""
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """Return the grid of patches for an image size."""
        return (
            (img_size[0] - self.patch_size[0]) // self.stride[0] + 1,
            (img_size[1] - self.patch_size[1]) // self.stride[1] + 1,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project (B, in_chans, H, W) to (B, C, H', W')."""
        return self.proj(check_image(x, self.in_chans, self.patch_size[0], self.patch_size[1]))
