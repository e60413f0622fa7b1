"""Depth-wise causal convolution: the definition, one tap and one position at a time."""
import torch

__all__ = ['backward', 'forward']


def _source(position: int, tap: int, width: int, reverse: bool) -> int:
    """Position of `x` that `tap` reads for output `position`; outside the sequence it stands for a zero."""
    offset = width - 1 - tap
    return position + offset if reverse else position - offset


def _pre_activation(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        reverse: bool,
) -> torch.Tensor:
    """The sums before the activation, (B, D, L)."""
    (_, _, length), width = x.shape, weight.shape[1]
    columns = []
    for position in range(length):
        column = torch.zeros_like(x[..., 0]) if bias is None else bias.expand_as(x[..., 0])
        for tap in range(width):
            source = _source(position, tap, width, reverse)
            if 0 <= source < length:
                column = column + weight[:, tap] * x[..., source]
        columns.append(column)
    return torch.stack(columns, dim=-1)


def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        silu: bool,
        reverse: bool,
) -> torch.Tensor:
    """Causal convolution of every channel with its own filter.

    `p[t] = bias + sum_k weight[k] * x[t - (W - 1 - k)]`, with `x` zero before its start, and `y = p` or
    `y = p * sigmoid(p)`. With `reverse` the sum reads `x[t + (W - 1 - k)]`: the flip of the convolution of the flip.

    Args:
        x: (B, D, L), float32 or float64.
        weight: (D, W), same dtype as `x`; `weight[:, W - 1]` multiplies the current position.
        bias: (D,) or None, same dtype as `x`.
        silu: Whether SiLU follows the sum.
        reverse: Whether the filter looks ahead instead of back.

    Returns:
        (B, D, L), dtype of `x`.
    """
    pre = _pre_activation(x, weight, bias, reverse)
    return pre * pre.sigmoid() if silu else pre


def backward(
        dout: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        silu: bool,
        reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`.

    Args:
        dout: Gradient of the output, (B, D, L).
        x: As in the forward pass.
        weight: As in the forward pass.
        bias: As in the forward pass.
        silu: As in the forward pass.
        reverse: As in the forward pass.

    Returns:
        Gradients of `x` (B, D, L), `weight` (D, W) and `bias` (D,); the last one also where there is no bias.
    """
    (_, _, length), width = x.shape, weight.shape[1]
    if silu:
        pre = _pre_activation(x, weight, bias, reverse)
        gate = pre.sigmoid()
        dout = dout * gate * (1 + pre * (1 - gate))
    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
    for position in range(length):
        for tap in range(width):
            source = _source(position, tap, width, reverse)
            if 0 <= source < length:
                dx[..., source] += weight[:, tap] * dout[..., position]
                dweight[:, tap] += (x[..., source] * dout[..., position]).sum(0)
    return dx, dweight, dout.sum((0, 2))
