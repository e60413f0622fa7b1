"""Sums that half precision cannot hold: what keeps a map in float32 until a normalisation brings it back."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import nn

__all__ = ['WideLayerNorm', 'widen']


@register_notrace_function
def widen(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32 where it is float16 or bfloat16."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm of a float32 map that does not take the map to the type of half-precision weights before it ends."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., D)."""
        y = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)
