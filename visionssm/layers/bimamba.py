"""Mamba's selective state-space mixer, read along a sequence in one or in both directions."""

import math
from typing import Any, Final, Optional

import torch
import torch.nn.functional as F
from torch import nn

import visionssm_kernels  # noqa: F401  (registers the operators of torch.ops.visionssm)

from .ssm_init import init_A_log_, init_dt_bias_, init_dt_proj_, negative_exp

__all__ = ['BiMamba', 'SelectiveSSM']


class SelectiveSSM(nn.Module):
    """Causal convolution, input-dependent parameters and selective scan along one direction.

    c = silu(conv(x)); [dt, B, C] = x_proj(c); delta = softplus(dt_proj(dt) + dt_bias); A = -exp(A_log);
    s_t = exp(delta_t A) s_{t-1} + delta_t c_t B_t; y_t = C_t . s_t + D c_t. With `reverse` time runs backwards.
    """

    reverse: Final[bool]

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            d_conv: int = 4,
            dt_rank: int = 8,
            reverse: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the projections and state parameters.

        Args:
            dim: Inner channels D.
            d_state: State size N.
            d_conv: Width of the convolution.
            dt_rank: Rank R of the step projection.
            reverse: Read the sequence from its end.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.reverse = reverse
        self.conv = nn.Conv1d(dim, dim, d_conv, groups=dim, **dd)
        self.x_proj = nn.Linear(dim, dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(dt_rank, dim, bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(dim, **dd))
        self.A_log = nn.Parameter(torch.empty(dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the state parameters anew; `conv` and `x_proj` reset themselves as modules."""
        init_dt_proj_(self.dt_proj.weight)
        init_dt_bias_(self.dt_bias)
        init_A_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: torch.Tensor, reverse_A_log: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Mix along the sequence.

        Args:
            x: Inner features, (B, L, D).
            reverse_A_log: Where given, (D, N): a second scan with this decay runs the other way over the same
                convolved features, and both are summed.

        Returns:
            (B, L, D).
        """
        # The operators themselves, not their Python wrappers: they pass through TorchScript and FX as they are. They
        # take any strides and keep channels innermost, so nothing is copied from here to the output.
        c = torch.ops.visionssm.causal_conv1d(
            x.transpose(1, 2), self.conv.weight, self.conv.bias, 'silu', self.reverse)  # (B, D, L)
        dt, B, C = self.x_proj(c.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=2)
        delta, B, C = self.dt_proj(dt).transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)
        y = torch.ops.visionssm.selective_scan(
            c, delta, negative_exp(self.A_log), B, C, self.D, None, self.dt_bias, True, self.reverse)
        if reverse_A_log is not None:
            y = y + torch.ops.visionssm.selective_scan(
                c, delta, negative_exp(reverse_A_log), B, C, self.D, None, self.dt_bias, True, not self.reverse)
        return y.transpose(1, 2)


def as_row(x: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """View what belongs to pixels, (2, B L, P), as maps of one row, (B, 2, P, 1, L)."""
    return x.unflatten(1, [batch, length]).permute(1, 0, 3, 2).unsqueeze(3)


class ReverseDecay(nn.Module):
    """The decay of a reverse scan that shares everything else with the forward one."""

    def __init__(
            self,
            dim: int,
            d_state: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Hold `A_log`, (dim, d_state)."""
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(dim, d_state, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the decay anew."""
        init_A_log_(self.A_log)


class BiMamba(nn.Module):
    """Sequence mixer: gate and features from one projection, a scan in one or two directions, one output projection.

    [x, z] = in_proj(u); y = ssm(x) + ssm_b(x); out = out_proj(scale * y * silu(z)), scale = 1/2 with `divide_output`.
    """

    two_sided: Final[bool]
    shared: Final[bool]
    halve: Final[bool]

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            d_conv: int = 4,
            expand: float = 2,
            dt_rank: int | None = None,
            bimamba_type: str = 'v2',
            divide_output: bool = True,
            init_values: float | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the mixer.

        Args:
            dim: Channels C of the residual stream.
            d_state: State size N.
            d_conv: Width of the causal convolution.
            expand: Inner channels over `dim`.
            dt_rank: Rank of the step projection; ceil(dim / 16) when None.
            bimamba_type: 'v2', both directions with parameters of their own; 'v1', both directions that share all but
                the decay; 'none', forward only.
            divide_output: Halve the sum of the two directions of 'v2'.
            init_values: Initial value of a per-channel scale of the output; no scale when None.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        if bimamba_type not in ('v2', 'v1', 'none'):
            raise ValueError(f"bimamba_type is {bimamba_type!r}; allowed are 'v2', 'v1' and 'none'.")
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        inner = int(expand * dim)
        dt_rank = dt_rank or math.ceil(dim / 16)
        self.two_sided = bimamba_type == 'v2'
        self.shared = bimamba_type == 'v1'
        self.halve = self.two_sided and divide_output
        self.init_values = init_values
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.ssm = SelectiveSSM(inner, d_state, d_conv, dt_rank, **dd)
        if self.two_sided:
            self.ssm_b = SelectiveSSM(inner, d_state, d_conv, dt_rank, reverse=True, **dd)
        elif self.shared:
            self.ssm_b = ReverseDecay(inner, d_state, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.gamma = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values), **dd))

    def reset_parameters(self) -> None:
        """Draw the output scale anew; the other parameters belong to sub-modules."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.init_values)

    @torch.jit.unused
    def _has_plain_projections(self) -> bool:
        """Say whether the projections are what was built here, no adapters or quantised layers, and have no hooks.

        Hooks want a call, and those of pruning and of the older weight norm make the weight that is read.
        """
        layers = [layer for ssm in (self.ssm, self.ssm_b) for layer in (ssm.x_proj, ssm.dt_proj)]
        hooked = any(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
                     or layer._backward_pre_hooks for layer in (self.ssm, self.ssm_b, *layers))
        return not hooked and all(type(layer) is nn.Linear for layer in layers)

    def _scan_both(self, x: torch.Tensor) -> torch.Tensor:
        """Mix (B, L, D) in both directions by one call each: on short sequences calls take as long as the work."""
        a, b = self.ssm, self.ssm_b
        batch, length = x.shape[0], x.shape[1]
        c = torch.ops.visionssm.causal_conv1d_both(
            x.transpose(1, 2), a.conv.weight, a.conv.bias, b.conv.weight, b.conv.bias, 'silu')  # (B, 2, D, L)
        pixels = c.permute(1, 0, 3, 2).flatten(1, 2)  # (2, B L, D), the order in memory
        x_proj = torch.stack([a.x_proj.weight, b.x_proj.weight])
        dt_proj = torch.stack([a.dt_proj.weight, b.dt_proj.weight])
        dt, B, C = torch.bmm(pixels, x_proj.transpose(1, 2)).split([a.dt_rank, a.d_state, a.d_state], dim=2)
        delta = torch.bmm(dt, dt_proj.transpose(1, 2))
        y = torch.ops.visionssm.selective_scan_2d(
            c.unsqueeze(3), as_row(delta, batch, length), negative_exp(torch.cat([a.A_log, b.A_log])),
            as_row(B, batch, length), as_row(C, batch, length), torch.cat([a.D, b.D]),
            torch.cat([a.dt_bias, b.dt_bias]), True, 'raster_both', 'sum').squeeze(2).transpose(1, 2)
        return 0.5 * y if self.halve else y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix tokens.

        Args:
            x: Tokens, (B, L, C).

        Returns:
            (B, L, C).
        """
        x, z = self.in_proj(x).chunk(2, dim=2)  # (B, L, 2 D) -> twice (B, L, D)
        if self.shared:
            y = self.ssm(x, self.ssm_b.A_log)
        elif self.two_sided and (torch.jit.is_scripting() or self._has_plain_projections()):
            y = self._scan_both(x)
        elif self.halve:
            y = torch.lerp(self.ssm(x), self.ssm_b(x), 0.5)  # one pass instead of a sum and a product
        elif self.two_sided:
            y = self.ssm(x) + self.ssm_b(x)
        else:
            y = self.ssm(x)
        # Both directions see the same gate, so the sum is gated once.
        y = y * F.silu(z)
        y = self.out_proj(y)  # (B, L, D) -> (B, L, C)
        if self.gamma is not None:
            y = y * self.gamma
        return y
