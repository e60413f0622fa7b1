"""The downsampling and the position encoding by convolutions that VSSD and Spatial-Mamba share."""

from typing import Any

import torch
from timm.layers import ConvNormAct
from torch import nn

__all__ = ['ConvPosEnc', 'InvertedDownsample']


class InvertedDownsample(nn.Module):
    """Halve a map by an inverted bottleneck: widen, convolve each channel with stride 2, narrow.

    The first two convolutions have a bias and a ReLU, the last one a bias and BatchNorm.

    With `official_layout` maps lie in memory as in the official VSSD code, channels first and then tokens. The numbers
    are the same, except that PyTorch (2.11) then computes a wrong gradient of BatchNorm for a single image on a CPU,
    as it does for the official code: it is there to compare with that code, not to train.
    """

    official_layout: bool

    def __init__(
            self,
            dim: int,
            out_dim: int | None = None,
            expand: float = 4.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolutions.

        Args:
            dim: Channels C.
            out_dim: Channels C' of the result; 2 C when None.
            expand: Channels of the wide map over C'.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        out_dim = 2 * dim if out_dim is None else out_dim
        self.official_layout = False
        hidden = int(out_dim * expand)
        self.expand = nn.Conv2d(dim, hidden, 1, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(hidden, hidden, 3, stride=2, padding=1, groups=hidden, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.reduce = ConvNormAct(hidden, out_dim, 1, bias=True, apply_act=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Halve a map.

        Args:
            x: Map, (B, H, W, C).

        Returns:
            (B, H', W', C') with H' = ceil(H / 2).
        """
        x = x.permute(0, 3, 1, 2)
        if self.official_layout:
            x = self.reduce(self.act2(self.conv(self.act1(self.expand(x.contiguous())))))
            return x.flatten(2).permute(0, 2, 1).unflatten(1, (x.shape[2], x.shape[3]))
        x = self.reduce(self.act2(self.conv(self.act1(self.expand(x)))))
        return x.permute(0, 2, 3, 1)


class ConvPosEnc(nn.Module):
    """Tell each pixel its surroundings: add a depthwise 3 x 3 convolution of the map to the map, (B, H, W, C)."""

    def __init__(
            self,
            dim: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolution of `dim` channels."""
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
