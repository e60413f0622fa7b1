"""Sum of dilated depth-wise convolutions: the definition, one tap at a time."""
from collections.abc import Iterator, Sequence

import torch

__all__ = ['backward', 'forward']


def _taps(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int]) -> Iterator[tuple]:
    """The index of every tap in `weight`, without the channel, and that of the pixels (H, W) which it reads."""
    height, width = x.shape[2:]
    side = weight.shape[3]
    for m, dilation in enumerate(dilations):
        for i in range(side):
            for j in range(side):
                rows = torch.arange(height, device=x.device) + (i - side // 2) * dilation
                columns = torch.arange(width, device=x.device) + (j - side // 2) * dilation
                yield (m, i, j), (rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1))


def forward(x: torch.Tensor, weight: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """Sum of depth-wise convolutions, a filter for each dilation.

    `y[i, j] = sum_m sum_uv weight[m, u, v] x[i + (u - S // 2) d_m, j + (v - S // 2) d_m]` for every channel, where an
    index outside the map stands for the nearest one inside.

    Args:
        x: (B, D, H, W), float32 or float64.
        weight: (M, D, S, S), same dtype as `x`, contiguous; S is odd.
        dilations: M distances between taps.

    Returns:
        (B, D, H, W), dtype of `x`, in any layout.
    """
    out = torch.zeros_like(x)
    for (m, i, j), (rows, columns) in _taps(x, weight, dilations):
        out = out + weight[m, :, i, j, None, None] * x[:, :, rows, columns]
    return out


def backward(
        dout: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        dilations: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `forward`.

    Args:
        dout: Gradient of the output, (B, D, H, W), same dtype as `x`.
        x: As in the forward pass.
        weight: As in the forward pass.
        dilations: As in the forward pass.

    Returns:
        Gradients of `x` (B, D, H, W), in any layout, and of `weight` (M, D, S, S).
    """
    dx, dweight = x.new_zeros(x.shape), torch.zeros_like(weight)
    for (m, i, j), (rows, columns) in _taps(x, weight, dilations):
        target = (slice(None), slice(None), rows, columns)
        values = weight[m, :, i, j, None, None] * dout
        batch, channel = (torch.arange(size, device=x.device) for size in x.shape[:2])
        dx.index_put_((batch[:, None, None, None], channel[:, None, None], rows, columns), values, accumulate=True)
        dweight[m, :, i, j] = (dout * x[target]).sum((0, 2, 3))
    return dx, dweight
