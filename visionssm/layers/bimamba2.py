"""Mamba-2's state-space mixer, read along a sequence in one or in both directions."""

from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import RmsNorm
from torch import nn

import visionssm_kernels  # noqa: F401  (registers the operators of torch.ops.visionssm)

from .ssm_init import init_A_log_uniform_, init_dt_bias_, negative_exp

__all__ = ['BiMamba2']


class DirectedSSD(nn.Module):
    """Causal convolution and scan of Mamba-2 along one direction.

    [x, B, C] = silu(conv(xBC)); step = softplus(dt + dt_bias); A = -exp(A_log); in every head of P channels
    S_t = exp(step_t A) S_{t-1} + step_t x_t B_t^T; y_t = S_t C_t + D x_t. With `reverse` time runs backwards.
    """

    reverse: Final[bool]

    def __init__(
            self,
            num_heads: int,
            headdim: int,
            d_state: int,
            ngroups: int,
            d_conv: int = 4,
            reverse: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolution and the state parameters.

        Args:
            num_heads: Heads M.
            headdim: Channels P of a head.
            d_state: State size N.
            ngroups: Groups G of heads that share B and C.
            d_conv: Width of the convolution.
            reverse: Read the sequence from its end.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.headdim = headdim
        self.d_state = d_state
        self.ngroups = ngroups
        self.reverse = reverse
        width = num_heads * headdim + 2 * ngroups * d_state
        self.conv = nn.Conv1d(width, width, d_conv, groups=width, **dd)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(num_heads, **dd))
        self.D = nn.Parameter(torch.empty(num_heads, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the state parameters anew; `conv` resets itself as a module."""
        init_dt_bias_(self.dt_bias)
        init_A_log_uniform_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, xBC: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
        """Mix along the sequence.

        Args:
            xBC: Inner features and the matrices B and C, (B, M P + 2 G N, L).
            dt: Steps before bias and softplus, (B, L, M).

        Returns:
            (B, L, M P).
        """
        xBC = torch.ops.visionssm.causal_conv1d(xBC, self.conv.weight, self.conv.bias, 'silu', self.reverse)
        states = self.ngroups * self.d_state
        x, B, C = xBC.transpose(1, 2).split([self.num_heads * self.headdim, states, states], dim=2)
        y = torch.ops.visionssm.ssd(
            x.unflatten(2, (self.num_heads, self.headdim)), dt, negative_exp(self.A_log),
            B.unflatten(2, (self.ngroups, self.d_state)), C.unflatten(2, (self.ngroups, self.d_state)), self.D, None,
            self.dt_bias, True, None, None, self.reverse)
        return y.flatten(2)


class BiMamba2(nn.Module):
    """Sequence mixer: all inputs of the scan from one projection, one or two directions, a gated norm, a projection.

    [z, xBC, dt] = in_proj(u); y = scale * (ssm(xBC, dt) + ssm_b(xBC, dt)); out = out_proj(norm(y * silu(z))), with
    scale = 1/2 with `divide_output`.
    """

    scale: Final[float]

    def __init__(
            self,
            dim: int,
            d_state: int = 64,
            d_conv: int = 4,
            expand: float = 2,
            headdim: int = 64,
            ngroups: int = 1,
            bimamba_type: str = 'v2',
            divide_output: bool = True,
            init_values: float | None = None,
            norm_eps: float = 1e-5,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the mixer.

        Args:
            dim: Channels C of the residual stream.
            d_state: State size N.
            d_conv: Width of the causal convolution.
            expand: Inner channels over `dim`.
            headdim: Channels P of a head.
            ngroups: Groups G of heads that share B and C.
            bimamba_type: 'v2', both directions with convolutions, steps and decays of their own; 'none', forward only.
            divide_output: Halve the sum of the two directions.
            init_values: Initial value of a per-channel scale of the output; no scale when None.
            norm_eps: Epsilon of the normalisation.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        if bimamba_type not in ('v2', 'none'):
            raise ValueError(f"bimamba_type is {bimamba_type!r}; Mamba-2 has 'v2' and 'none'.")
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        inner = int(expand * dim)
        num_heads = inner // headdim
        if num_heads * headdim != inner or num_heads % ngroups or num_heads == 0:
            raise ValueError(f'headdim is {headdim} and ngroups {ngroups}; headdim must divide the {inner} inner '
                             'channels, and ngroups the number of heads.')
        width = inner + 2 * ngroups * d_state
        self.sizes = [inner, width, num_heads]
        self.scale = 0.5 if bimamba_type == 'v2' and divide_output else 1.0
        self.init_values = init_values
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False, **dd)
        self.ssm = DirectedSSD(num_heads, headdim, d_state, ngroups, d_conv, **dd)
        self.ssm_b = None if bimamba_type == 'none' else DirectedSSD(
            num_heads, headdim, d_state, ngroups, d_conv, reverse=True, **dd)
        self.norm = RmsNorm(inner, eps=norm_eps, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.gamma = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values), **dd))

    def reset_parameters(self) -> None:
        """Draw the output scale anew; the other parameters belong to sub-modules."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix tokens.

        Args:
            x: Tokens, (B, L, C).

        Returns:
            (B, L, C).
        """
        z, xBC, dt = self.in_proj(x).split(self.sizes, dim=2)
        xBC = xBC.transpose(1, 2).contiguous()  # (B, L, D + 2 G N) -> (B, D + 2 G N, L), once for both directions
        y = self.ssm(xBC, dt)
        if self.ssm_b is not None:
            y = y + self.ssm_b(xBC, dt)
        # Both directions see the same gate, so the sum is gated once; under autocast the norm stays in float32.
        y = self.norm((y * self.scale * F.silu(z)).to(self.norm.weight.dtype))
        y = self.out_proj(y)
        if self.gamma is not None:
            y = y * self.gamma
        return y
