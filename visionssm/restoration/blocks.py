"""MambaIR's residual state-space block: a four-way scan, and convolutions with channel attention beside it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import DropPath, SqueezeExcite
from timm.models import checkpoint
from torch import nn

from visionssm.layers import SS2D, default_norm

__all__ = ['BlockSequence', 'RestorationBlock', 'make_channel_attention_block']

SQUEEZE = 30
"""Channels for each hidden channel of the channel attention."""


def make_channel_attention_block(
        dim: int,
        light: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Return convolutions with channel attention for maps (B, dim, H, W).

    Args:
        dim: Channels, at least 30.
        light: Pointwise and depthwise convolutions (the second one dilated) instead of two whole ones.
        device: Where the parameters are created.
        dtype: Type of the parameters.
    """
    if dim < SQUEEZE:
        raise ValueError(f'embed_dim is {dim}; the channel attention needs at least {SQUEEZE} channels.')
    dd: dict[str, Any] = {'device': device, 'dtype': dtype}
    attention = SqueezeExcite(dim, rd_channels=dim // SQUEEZE, **dd)
    if light:
        half = dim // 2
        return nn.Sequential(
            nn.Conv2d(dim, half, 1, **dd), nn.Conv2d(half, half, 3, padding=1, groups=half, **dd), nn.GELU(),
            nn.Conv2d(half, dim, 1, **dd), nn.Conv2d(dim, dim, 3, padding=2, dilation=2, groups=dim, **dd), attention)
    third = dim // 3
    return nn.Sequential(
        nn.Conv2d(dim, third, 3, padding=1, **dd), nn.GELU(), nn.Conv2d(third, dim, 3, padding=1, **dd), attention)


class RestorationBlock(nn.Module):
    """u = scale1 x + drop_path(ss2d(norm1(x))); out = scale2 u + cab(norm2(u)), on maps (B, H, W, C)."""

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            expand: float = 2.,
            drop_path: float = 0.,
            light: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the block.

        Args:
            dim: Channels C, at least 30.
            d_state: State size of the scan.
            expand: Inner channels of the scan over C.
            drop_path: Stochastic depth rate of the scan's branch; the other branch is never dropped.
            light: See `make_channel_attention_block`.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.scale1 = nn.Parameter(torch.empty(dim, **dd))
        self.norm1 = default_norm(dim, **dd)
        self.mixer = SS2D(dim, d_state, expand, gate='act', **dd)
        self.drop_path = DropPath(drop_path)
        self.scale2 = nn.Parameter(torch.empty(dim, **dd))
        self.norm2 = default_norm(dim, **dd)
        self.cab = make_channel_attention_block(dim, light, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the factors of the skip connections to one."""
        nn.init.ones_(self.scale1)
        nn.init.ones_(self.scale2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        x = self.scale1 * x + self.drop_path(self.mixer(self.norm1(x)))
        return self.scale2 * x + self.cab(self.norm2(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BlockSequence(nn.Sequential):
    """Blocks in a row, which can be recomputed in the backward pass instead of stored."""

    def __init__(self, blocks: Iterable[nn.Module] = ()) -> None:
        """Keep the blocks."""
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, noise: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Run all blocks.

        Args:
            x: Map, (B, H, W, C).
            noise: What the blocks take besides the map, one tensor a block; nothing when empty.

        Returns:
            (B, H, W, C).
        """
        for i, block in enumerate(self):
            inputs = (x, noise[i]) if noise else (x,)
            x = checkpoint(block, *inputs) if self.grad_checkpointing else block(*inputs)
        return x
