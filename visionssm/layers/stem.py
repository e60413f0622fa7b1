"""The stem that VSSD and Spatial-Mamba share: overlapping convolutions with one residual pair among them."""

from typing import Any

import torch
from timm.layers import ConvNormAct
from torch import nn

from .patch_embed import check_image

__all__ = ['ResidualStem']


class ResidualStem(nn.Module):
    """Reduce images to maps of a quarter of their size.

    x = conv1(image); x = x + conv2(x); out = conv3(x). All convolutions are without bias and followed by BatchNorm; the
    last one of `conv2` and of `conv3` has no activation, and there is none behind the sum.
    """

    def __init__(
            self,
            in_chans: int,
            dim: int,
            expand: float = 4.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolutions.

        Args:
            in_chans: Channels of the images.
            dim: Channels C of the map.
            expand: Channels between the two convolutions of `conv3`, over C.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        inner, hidden = dim // 2, int(dim * expand)
        self.in_chans = in_chans
        self.conv1 = ConvNormAct(in_chans, inner, 3, stride=2, **dd)
        self.conv2 = nn.Sequential(
            ConvNormAct(inner, inner, 3, **dd),
            ConvNormAct(inner, inner, 3, apply_act=False, **dd))
        self.conv3 = nn.Sequential(
            ConvNormAct(inner, hidden, 3, stride=2, **dd),
            ConvNormAct(hidden, dim, 1, apply_act=False, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images.

        Args:
            x: Images, (B, in_chans, H, W).

        Returns:
            (B, H', W', C) with H' = ceil(ceil(H / 2) / 2), for any size of images.
        """
        # Channels-last memory from here on: what follows the stem reads its maps pixel by pixel.
        x = self.conv1(check_image(x, self.in_chans, 1, 1).contiguous(memory_format=torch.channels_last))
        x = self.conv3(x + self.conv2(x))
        return x.permute(0, 2, 3, 1)
