"""The parts of Mamba-YOLO's backbone and neck.

Maps are (B, C, H, W) between them and lie channels-last in memory where the images do, so that norms and scans, which
want the channels last, read them without a copy.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, LayerNorm2d
from torch import nn

from visionssm.layers import SS2D, merge_patches

__all__ = ['GatedConvMlp', 'LocalBlock', 'MambaYOLOBlock', 'MergeConv', 'PyramidPool', 'YOLOStem', 'fold_norms',
           'make_conv']

make_conv = partial(ConvNormAct, act_layer=nn.SiLU, norm_kwargs={'eps': 1e-3, 'momentum': 0.03})
"""Makes a convolution (without bias), BatchNorm with the constants of YOLO, and SiLU."""


class YOLOStem(nn.Module):
    """Two convolutions of stride 2, one with GELU and one with SiLU: images to maps of a quarter of their size."""

    def __init__(
            self,
            in_chans: int,
            dim: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolutions from `in_chans` to `dim` channels."""
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = make_conv(in_chans, dim // 2, 3, stride=2, act_layer=nn.GELU, **dd)
        self.conv2 = make_conv(dim // 2, dim, 3, stride=2, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to (B, C, H / 4, W / 4)."""
        return self.conv2(self.conv1(x))


class MergeConv(nn.Module):
    """Halve a map: each square of four pixels becomes one, and a pointwise convolution mixes its channels."""

    def __init__(
            self,
            dim: int,
            out_dim: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolution from 4 `dim` to `out_dim` channels."""
        super().__init__()
        self.conv = make_conv(4 * dim, out_dim, 1, bias=True, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) with even sides to (B, C', H / 2, W / 2)."""
        return self.conv(merge_patches(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class LocalBlock(nn.Module):
    """A depthwise 3 x 3 convolution and two pointwise ones, around a residual connection."""

    def __init__(
            self,
            dim: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolutions of `dim` channels."""
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = make_conv(dim, dim, 3, groups=dim, bias=True, apply_act=False, **dd)
        self.fc1 = nn.Conv2d(dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to itself."""
        return x + self.fc2(self.act(self.fc1(self.conv(x))))


class GatedConvMlp(nn.Module):
    """An MLP over pixels whose gate sees the neighbours: [u, v] = fc1(x); out = fc2(gelu(conv(u) + u) * v)."""

    def __init__(
            self,
            dim: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolutions; the hidden layer has 8 / 3 `dim` channels, rounded down."""
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        hidden = 8 * dim // 3
        self.fc1 = nn.Conv2d(dim, 2 * hidden, 1, **dd)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to itself."""
        u, v = self.fc1(x).chunk(2, dim=1)
        return self.fc2(self.act(self.conv(u) + u) * v)


class MambaYOLOBlock(nn.Module):
    """x = proj(x); x = x + mixers(norm1(local(x))); x = x + mlp(norm2(x)).

    The block of the backbone has one mixer and a projection with bias; that of the neck projects without bias, and only
    where the number of channels changes, and may have several mixers in a row.
    """

    def __init__(
            self,
            in_dim: int,
            dim: int,
            num_mixers: int = 1,
            d_state: int = 16,
            expand: float = 2.,
            proj_bias: bool = True,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the block.

        Args:
            in_dim: Channels C' of its input.
            dim: Channels C.
            num_mixers: Mixers in a row, without residual connections between them.
            d_state: State size N of the scans.
            expand: Inner channels of a mixer over C.
            proj_bias: Always project, with a bias; else only where C' is not C, and without one.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        project = proj_bias or in_dim != dim
        self.proj = make_conv(in_dim, dim, 1, bias=proj_bias, **dd) if project else nn.Identity()
        self.local = LocalBlock(dim, **dd)
        self.norm1 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.mixers = nn.Sequential(*[
            SS2D(dim, d_state, expand, act='gelu', gate='act', init='v2', **dd) for _ in range(num_mixers)])
        self.norm2 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.mlp = GatedConvMlp(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C', H, W) to (B, C, H, W)."""
        x = self.proj(x)
        y = self.norm1(self.local(x)).permute(0, 2, 3, 1)  # (B, H, W, C), as the mixers take it
        x = x + self.mixers(y).permute(0, 3, 1, 2)
        return x + self.mlp(self.norm2(x))


class PyramidPool(nn.Module):
    """Maxima of windows of 1, 5, 9 and 13 pixels side by side, between two pointwise convolutions (SPPF)."""

    def __init__(
            self,
            dim: int,
            out_dim: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolutions from `dim` to `out_dim` channels, with half of `dim` between them."""
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = make_conv(dim, dim // 2, 1, **dd)
        self.conv2 = make_conv(4 * (dim // 2), out_dim, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C', H, W)."""
        maps = [self.conv1(x)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, stride=1, padding=2))
        return self.conv2(torch.cat(maps, dim=1))


def fold_norms(module: nn.Module) -> None:
    """Fold the BatchNorm of every convolution below `module`, which must be in evaluation mode, into its weights."""
    for layer in module.modules():
        if isinstance(layer, ConvNormAct) and isinstance(layer.bn, nn.BatchNorm2d):
            norm = layer.bn
            layer.conv = torch.nn.utils.fuse_conv_bn_eval(layer.conv, norm)
            layer.bn = norm.act
