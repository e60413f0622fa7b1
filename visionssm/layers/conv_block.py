"""The block that VSSD and Spatial-Mamba share."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import nn

from .conv_stem import default_norm
from .downsample import ConvPosEnc

__all__ = ['ConvPosBlock']


class ConvPosBlock(nn.Module):
    """Mixer and MLP, each behind a depthwise convolution and a norm, all four around residual connections."""

    def __init__(
            self,
            dim: int,
            mixer: nn.Module,
            mlp: nn.Module,
            drop_path: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Assemble the block.

        Args:
            dim: Channels C.
            mixer: Maps (B, H, W, C) to itself.
            mlp: Maps (..., C) to itself.
            drop_path: Rate at which the branches of mixer and MLP are dropped.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.cpe1 = ConvPosEnc(dim, **dd)
        self.norm1 = default_norm(dim, **dd)
        self.mixer = mixer
        self.cpe2 = ConvPosEnc(dim, **dd)
        self.norm2 = default_norm(dim, **dd)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        x = self.cpe1(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))
