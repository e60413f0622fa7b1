"""Structure-aware fusion of the states of a scan over a map, as in Spatial-Mamba."""

from collections.abc import Sequence
from typing import Any, Final, List

import torch
from timm.layers import register_notrace_function
from torch import nn

import visionssm_kernels  # noqa: F401  (registers the operators of torch.ops.visionssm)

from .precision import widen

__all__ = ['StateFusion']


def merge_kernels(kernels: List[torch.Tensor], alpha: torch.Tensor, dilations: List[int]) -> torch.Tensor:
    """Return the one depthwise kernel (D, 1, S, S) that equals the weighted sum of dilated ones, S = 2 max(d) + 1."""
    radius = max(dilations)
    merged = torch.zeros(
        [kernels[0].shape[0], 1, 2 * radius + 1, 2 * radius + 1], dtype=alpha.dtype, device=alpha.device)
    for i, d in enumerate(dilations):
        taps = slice_taps(merged, radius - d, radius + d + 1, d)
        taps.add_(kernels[i] * alpha[i])
    return merged


def slice_taps(kernel: torch.Tensor, start: int, end: int, step: int) -> torch.Tensor:
    """Return a view of every `step`-th tap of a kernel (D, 1, S, S) between `start` and `end`."""
    return kernel[:, :, start:end:step, start:end:step]


@register_notrace_function
def fuse_states(
        h: torch.Tensor,
        kernels: List[torch.Tensor],
        alpha: torch.Tensor,
        dilations: List[int],
        merged: bool,
) -> torch.Tensor:
    """Return the fused states in at least float32, under autocast too; arguments and result as in `StateFusion`."""
    h = widen(h)
    weights = alpha.to(h.dtype)
    wide = [kernel.to(h.dtype) for kernel in kernels]
    if merged:
        kernel = merge_kernels(wide, weights, dilations)
        return torch.ops.visionssm.dilated_conv2d(h, kernel.transpose(0, 1), [1])
    filters = torch.stack(wide).squeeze(2) * weights.view(-1, 1, 1, 1)
    return torch.ops.visionssm.dilated_conv2d(h, filters, dilations)


class StateFusion(nn.Module):
    """Give every state of a map a learned sum of its neighbours at several distances, channel by channel.

    out = sum_m alpha_m conv(h, kernel_m, dilation d_m), with 3 x 3 depthwise kernels and a map whose edges repeat
    outwards.

    For three dilations the sum equals one depthwise convolution of side 11. On a CPU the dilated ones are quicker, as
    they have fewer taps, so they are the default; `merged` takes the one kernel at inference. It is merged anew from 25
    numbers a channel in every pass: nothing outlives a change of the weights.
    """

    dilations: Final[List[int]]
    merged: Final[bool]

    def __init__(
            self,
            dim: int,
            dilations: Sequence[int] = (1, 3, 5),
            merged: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the kernels.

        Args:
            dim: Channels D.
            dilations: Distances of the neighbours.
            merged: Convolve with one merged kernel in evaluation mode.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if not dilations or min(dilations) < 1:
            raise ValueError(f'dilations are {tuple(dilations)}; give at least one, each at least 1.')
        self.dim = dim
        self.dilations = list(dilations)
        self.merged = merged
        self.kernels = nn.ParameterList([torch.empty(dim, 1, 3, 3, **dd) for _ in dilations])
        self.alpha = nn.Parameter(torch.empty(len(dilations), **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all weights to one."""
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Fuse states.

        Args:
            h: States, (B, D, H, W) of any size.

        Returns:
            (B, D, H, W) in channels-last memory; float32, or float64 for float64 states, whatever autocast says.
        """
        return fuse_states(h, list(self.kernels), self.alpha, self.dilations, self.merged and not self.training)
