"""SS2D, the mixer of VMamba and its relatives."""

import math
from typing import Any, Final

import torch
from timm.layers import get_act_layer
from torch import nn

from visionssm.utils.suggest import check_choice

from .precision import WideLayerNorm
from .routed_ssm import CascadeSSM, RoutedSSD, RoutedSSM

__all__ = ['SS2D']

GATES = ('none', 'act', 'linear')
OUT_NORMS = ('layernorm', 'none', 'dwconv', 'layernorm_dwconv', 'softmax', 'sigmoid')


class SpatialSoftmax(nn.Module):
    """Softmax over the pixels of every channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise a map, (B, H, W, D)."""
        return x.flatten(1, 2).softmax(1).unflatten(1, x.shape[1:3])


class ChannelsFirst(nn.Module):
    """(B, H, W, C) to (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a view."""
        return x.permute(0, 3, 1, 2)


class ChannelsLast(nn.Module):
    """(B, C, H, W) to (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a view."""
        return x.permute(0, 2, 3, 1)


def make_out_norm(
        kind: str,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return the normalisation between scan and gate, on channels-last maps; `kind` as in `SS2D`."""
    if kind in ('dwconv', 'layernorm_dwconv'):
        first = [WideLayerNorm(dim, device=device, dtype=dtype)] if kind == 'layernorm_dwconv' else []
        conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, device=device, dtype=dtype)
        return nn.Sequential(*first, ChannelsFirst(), conv, ChannelsLast())
    if kind == 'layernorm':
        return WideLayerNorm(dim, device=device, dtype=dtype)
    return {'none': nn.Identity, 'softmax': SpatialSoftmax, 'sigmoid': nn.Sigmoid}[kind]()


class SS2D(nn.Module):
    """VMamba's mixer: projection, depthwise convolution, scan along four routes, normalisation, gate, projection.

    [u, z] = in_proj(x); u = act(conv(u)); y = out_act(out_norm(ssm(u))); out = out_proj(y * gate(z)).
    """

    gated: Final[bool]

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            expand: float = 2,
            dt_rank: int | None = None,
            d_conv: int = 3,
            conv_bias: bool = True,
            act: str = 'silu',
            gate: str = 'none',
            out_norm: str = 'layernorm',
            out_act: bool = False,
            routes: str = 'cross',
            ssm: str = 'mamba1',
            init: str = 'v0',
            drop: float = 0.,
            bias: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the mixer.

        Args:
            dim: Channels C.
            d_state: State size N.
            expand: Inner channels D over C.
            dt_rank: Rank of the step projection, for 'mamba2' the heads of a route; ceil(dim / 16) when None.
            d_conv: Side of the depthwise convolution, odd; none below 2.
            conv_bias: Bias of the convolution.
            act: Activation behind the convolution.
            gate: 'none'; 'act', the activation of a branch z; 'linear', z as it is.
            out_norm: 'layernorm', 'none', 'dwconv' (a depthwise 3 x 3 convolution alone), 'layernorm_dwconv' (both),
                'softmax' (over the pixels of a channel) or 'sigmoid'.
            out_act: GELU behind `out_norm`.
            routes: Name in `visionssm_kernels.ROUTES`, or 'cascade', see `CascadeSSM`.
            ssm: 'mamba1', a selective scan; 'mamba2', the scan of Mamba-2 with scalar decay and heads.
            init: Style of the initial state parameters, see `init_state_`.
            drop: Dropout behind the last projection.
            bias: Bias of both projections.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        for name, value, allowed in (
                ('gate', gate, GATES), ('out_norm', out_norm, OUT_NORMS), ('ssm', ssm, ('mamba1', 'mamba2'))):
            check_choice(name, value, allowed)
        if ssm == 'mamba2' and routes == 'cascade':
            raise ValueError("routes='cascade' has no form with ssm='mamba2'; choose 'mamba1' or other routes.")
        if d_conv > 1 and d_conv % 2 == 0:
            raise ValueError(f'd_conv is {d_conv}; an odd side keeps the size of the map, 1 is no convolution.')
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(f'expand is {expand}; with {dim} channels it leaves no inner channel.')
        dt_rank = dt_rank or math.ceil(dim / 16)
        self.gated = gate != 'none'
        self.in_proj = nn.Linear(dim, 2 * inner if self.gated else inner, bias=bias, **dd)
        self.conv = nn.Identity() if d_conv < 2 else nn.Conv2d(
            inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias, **dd)
        if ssm == 'mamba2' and d_conv > 1:
            # Official weights of this form call the convolution conv.1: only so can names be turned back.
            self.conv = nn.Sequential(nn.Identity(), self.conv)
        self.act = get_act_layer(act)()
        # Where a normalisation follows, it takes the merged routes in float32: they can leave the range of float16.
        wide = out_norm not in ('none', 'dwconv')
        if ssm == 'mamba2':
            self.ssm = RoutedSSD(inner, d_state, dt_rank, routes, init, wide, **dd)
        elif routes == 'cascade':
            self.ssm = CascadeSSM(inner, d_state, dt_rank, init, wide, **dd)
        else:
            self.ssm = RoutedSSM(inner, d_state, dt_rank, routes, 'sum', init, wide, **dd)
        self.out_norm = make_out_norm(out_norm, inner, **dd)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.gate_act = get_act_layer(act)() if gate == 'act' else nn.Identity()
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix a map.

        Args:
            x: Map, (B, H, W, C).

        Returns:
            (B, H, W, C).
        """
        u = self.in_proj(x)
        z = u
        if self.gated:
            u, z = u.chunk(2, dim=-1)
        # All of it reads pixel by pixel, so that nothing is copied where the convolution keeps this layout.
        u = self.act(self.conv(u.permute(0, 3, 1, 2))).contiguous(memory_format=torch.channels_last)
        y = self.ssm(u).permute(0, 2, 3, 1)  # (B, D, H, W) -> (B, H, W, D)
        y = self.out_act(self.out_norm(y).to(u.dtype))
        if self.gated:
            y = y * self.gate_act(z)
        return self.drop(self.out_proj(y))
