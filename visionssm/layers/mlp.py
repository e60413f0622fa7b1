"""The MLP of the hierarchical models."""

from typing import Any

import torch
from timm.layers import Mlp as _Mlp

from .pieces import count_pieces, in_pieces

__all__ = ['Mlp']

# Numbers of the hidden layer in a piece: 4 MB in float32, which a cache holds and allocators hand out again and again.
_PIECE = 1 << 20
_LEAST_ROWS = 1024  # products of fewer rows take longer a row


class Mlp(_Mlp):
    """fc2(act(fc1(x))), timm's `Mlp` with its parameters and arguments, for channels innermost.

    In inference on a CPU the hidden layer of a large map is made piece by piece. Rows do not depend on each other, so
    the numbers are the same up to the order of sums in a product. The map is taken whole where a graph is made, where
    gradients are needed, and where a hook wants to see the layers inside.
    """

    def __init__(self, in_features: int, hidden_features: int, **kwargs: Any) -> None:
        """Build timm's `Mlp` without its convolutions.

        Args:
            in_features: Channels C.
            hidden_features: Channels of the hidden layer.
            **kwargs: The other arguments of timm's `Mlp`, but for `use_conv`.
        """
        super().__init__(in_features, hidden_features, **kwargs)
        self.rows = max(_PIECE // max(hidden_features, 1), _LEAST_ROWS)  # of a piece

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., C) to itself."""
        if not torch.jit.is_scripting():
            pieces = self._pieces(x)
            if pieces > 1:
                return self._by_pieces(x, pieces)
        return self._whole(x)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))

    @torch.jit.unused
    def _pieces(self, x: torch.Tensor) -> int:
        return count_pieces(x, x.numel() // x.shape[-1], self.rows, self)

    @torch.jit.unused
    def _by_pieces(self, x: torch.Tensor, pieces: int) -> torch.Tensor:
        return in_pieces(self._whole, x.flatten(0, -2), pieces).unflatten(0, x.shape[:-1])
