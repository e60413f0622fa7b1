"""Feature pyramids on top of a plain (single-scale) backbone."""

from typing import Any, List

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

__all__ = ['PlainPyramid', 'SimpleFeaturePyramid']


class ConvNorm(nn.Conv2d):
    """Convolution without bias and a layer normalisation over the channels of each pixel."""

    def __init__(
            self,
            in_chans: int,
            out_chans: int,
            kernel_size: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Keep the size of the map whatever the (odd) kernel size."""
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(in_chans, out_chans, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.norm = LayerNorm2d(out_chans, eps=1e-6, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised convolution, (B, out_chans, H, W)."""
        return self.norm(super().forward(x))


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid: the last map alone is brought to the strides 4, 8, 16, 32, each followed by two convolutions.

    The strides hold for a backbone of stride 16; a fifth map of half the last size is a plain subsampling.
    """

    def __init__(
            self,
            in_chans: int,
            out_chans: int = 256,
            extra_level: bool = True,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the four levels.

        Args:
            in_chans: Channels of the backbone's map, a multiple of 4.
            out_chans: Channels of every output.
            extra_level: Append the subsampled fifth map.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.extra_level = extra_level
        half, quarter = in_chans // 2, in_chans // 4

        def head(width: int) -> list[nn.Module]:
            return [ConvNorm(width, out_chans, 1, **dd), ConvNorm(out_chans, out_chans, 3, **dd)]

        def up(width: int, out_width: int) -> nn.Module:
            return nn.ConvTranspose2d(width, out_width, 2, stride=2, **dd)

        self.simfp_2 = nn.Sequential(
            up(in_chans, half), LayerNorm2d(half, eps=1e-6, **dd), nn.GELU(), up(half, quarter), *head(quarter))
        self.simfp_3 = nn.Sequential(up(in_chans, half), *head(half))
        self.simfp_4 = nn.Sequential(*head(in_chans))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2, stride=2), *head(in_chans))

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Return the maps from fine to coarse.

        Args:
            x: Last map of the backbone, (B, C, H, W).

        Returns:
            Four or five maps of `out_chans` channels with 4H, 2H, H, H/2 (and H/4) rows.
        """
        maps = [self.simfp_2(x), self.simfp_3(x), self.simfp_4(x), self.simfp_5(x)]
        if self.extra_level:
            maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return maps


class PlainPyramid(nn.Module):
    """Bring four maps of one stride to the strides 4, 8, 16 and 32 (patch size 16, or 8)."""

    def __init__(
            self,
            dim: int,
            patch_size: int = 16,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the four rescaling steps.

        Args:
            dim: Channels of the maps.
            patch_size: Stride of the maps, 16 or 8.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        if patch_size not in (8, 16):
            raise ValueError(f'A pyramid exists for patch sizes 8 and 16, not {patch_size}; use fpn=False.')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()

        def up() -> nn.Module:
            return nn.ConvTranspose2d(dim, dim, 2, stride=2, **dd)

        def pool(size: int) -> nn.Module:
            return nn.MaxPool2d(size, stride=size)

        if patch_size == 16:
            self.fpn1 = nn.Sequential(up(), nn.BatchNorm2d(dim, **dd), nn.GELU(), up())
            self.fpn2, self.fpn3, self.fpn4 = nn.Sequential(up()), nn.Identity(), pool(2)
        else:
            self.fpn1 = nn.Sequential(up())
            self.fpn2, self.fpn3, self.fpn4 = nn.Identity(), nn.Sequential(pool(2)), pool(4)

    def forward(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        """Return four maps from fine to coarse.

        Args:
            maps: Four maps of equal size, or one that serves all levels; each (B, C, H, W).

        Returns:
            Maps of 4, 2, 1 and 1/2 times the size for patch size 16; of 2, 1, 1/2 and 1/4 for 8.
        """
        if len(maps) == 1:
            maps = [maps[0], maps[0], maps[0], maps[0]]
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), self.fpn3(maps[2]), self.fpn4(maps[3])]
