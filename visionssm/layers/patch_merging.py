"""Halving of a map by putting each square of four pixels into one, as in Swin."""

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import nn

from .conv_stem import default_norm

__all__ = ['PatchMerging', 'merge_patches']


@register_notrace_function
def merge_patches(x: torch.Tensor, pad: bool = True) -> torch.Tensor:
    """Concatenate the four pixels of every 2 x 2 square.

    Args:
        x: Map, (B, H, W, C).
        pad: Complete odd sizes with zeros at the bottom and right; else their last row and column are left out.

    Returns:
        (B, H', W', 4 C) with H' = ceil(H / 2) or floor(H / 2); pixels in the (row, column) order (0, 0), (1, 0),
        (0, 1), (1, 1).
    """
    height, width = x.shape[1], x.shape[2]
    if pad:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    elif height < 2 or width < 2:
        raise ValueError(
            f'A map of {height} x {width} pixels has no square of four pixels to merge: enlarge the images, or '
            f"build the layer with pad='pad'.")
    else:
        x = x[:, :height // 2 * 2, :width // 2 * 2]
    batch, height, width, chans = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, chans)
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)


class PatchMerging(nn.Module):
    """Merge squares of four pixels, normalise, project: (B, H, W, C) to (B, H / 2, W / 2, C')."""

    pad: Final[bool]

    def __init__(
            self,
            dim: int,
            out_dim: int | None = None,
            pad: str = 'pad',
            norm_layer: Callable[..., nn.Module] | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the norm and the projection.

        Args:
            dim: Channels C.
            out_dim: Channels C' of the result; 2 C when None.
            pad: What becomes of odd sizes: 'pad', zeros at the bottom and right; 'crop', the last row or column is
                left out.
            norm_layer: Makes the norm of 4 C channels of a channels-last map; a LayerNorm with epsilon 1e-5 when None.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        if pad not in ('pad', 'crop'):
            raise ValueError(f"pad is {pad!r}; allowed are 'pad' and 'crop'.")
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.pad = pad == 'pad'
        self.norm = (norm_layer or default_norm)(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim if out_dim is None else out_dim, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Halve a map.

        Args:
            x: Map, (B, H, W, C).

        Returns:
            (B, H', W', C').
        """
        return self.reduction(self.norm(merge_patches(x, self.pad)))
