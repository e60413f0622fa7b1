"""Selective state-space mixers over maps, read along routes."""

import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import get_act_layer, register_notrace_function
from torch import nn

from visionssm_kernels import get_routes

from .ssm_init import init_state_, negative_exp

__all__ = ['SS2D', 'CascadeSSM', 'RoutedSSM']

GATES = ('none', 'act', 'linear')
OUT_NORMS = ('layernorm', 'none', 'dwconv', 'layernorm_dwconv', 'softmax', 'sigmoid')


@register_notrace_function
def widen(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32 where it is float16 or bfloat16."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


@register_notrace_function
def route_projections(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Project the pixels of a map once for every route.

    Args:
        u: Map (B, D, H, W), or one map a route (B, K, D, H, W).
        weight: (K, P, D).

    Returns:
        (B, K, P, H * W).
    """
    flat = u.flatten(-2)
    if u.dim() == 4:
        return torch.matmul(weight.flatten(0, 1), flat).unflatten(1, (weight.shape[0], weight.shape[1]))
    return torch.matmul(weight, flat)


def scan_routes(
        u: torch.Tensor,
        x_proj: torch.Tensor,
        dt_proj: torch.Tensor,
        dt_bias: torch.Tensor,
        A_log: torch.Tensor,
        D: torch.Tensor,
        routes: str,
        merge: str,
        wide: bool,
) -> torch.Tensor:
    """Compute the parameters of the scan from the map, and scan; arguments and result as in `RoutedSSM`."""
    size = u.shape[-2:]
    rank, state = dt_proj.shape[2], A_log.shape[1]
    dt, B, C = route_projections(u, x_proj).split([rank, state, state], dim=2)
    delta = torch.matmul(dt_proj, dt)  # (B, K, D, L)
    return torch.ops.visionssm.selective_scan_2d(
        widen(u) if wide else u, delta.unflatten(-1, size), negative_exp(A_log), B.unflatten(-1, size),
        C.unflatten(-1, size), D, dt_bias.flatten(), True, routes, merge)


class RoutedSSM(nn.Module):
    """Input-dependent parameters and a selective scan along K routes over a map, each route with parameters of its own.

    [dt, B, C] = x_proj[k] u; delta = softplus(dt_proj[k] dt + dt_bias[k]); A = -exp(A_log); along route k
    s_t = exp(delta_t A) s_{t-1} + delta_t u_t B_t; y_t = <s_t, C_t> + D u_t; every y_t goes back to its pixel.

    The projections are pointwise, so they commute with the order of the pixels: they are computed once on the map, and
    the scan reads pixels in route order.
    """

    routes: Final[str]
    merge: Final[str]
    wide: Final[bool]

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            dt_rank: int | None = None,
            routes: str = 'cross',
            merge: str = 'sum',
            init: str = 'v0',
            wide: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the projections and state parameters.

        Args:
            dim: Inner channels D.
            d_state: State size N.
            dt_rank: Rank R of the step projection; ceil(dim / 16) when None.
            routes: Name in `visionssm_kernels.ROUTES`.
            merge: 'sum' or 'mean' over the routes, or 'none'.
            init: Style of the initial state parameters, see `init_state_`.
            wide: Return float32 for half-precision maps: sums over routes can leave the range of float16.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        num_routes = len(get_routes(routes))
        dt_rank = dt_rank or math.ceil(dim / 16)
        self.dim = dim
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.num_routes = num_routes
        self.routes = routes
        self.merge = merge
        self.init = init
        self.wide = wide
        self.x_proj = nn.Parameter(torch.empty(num_routes, dt_rank + 2 * d_state, dim, **dd))
        self.dt_proj = nn.Parameter(torch.empty(num_routes, dim, dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(num_routes, dim, **dd))
        self.A_log = nn.Parameter(torch.empty(num_routes * dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(num_routes * dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        bound = self.x_proj.shape[-1] ** -0.5  # what nn.Linear draws
        nn.init.uniform_(self.x_proj, -bound, bound)
        init_state_(self.init, self.A_log, self.dt_bias, self.dt_proj)
        nn.init.ones_(self.D)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Mix over the map.

        Args:
            u: Inner features (B, D, H, W), or one map a route (B, K, D, H, W).

        Returns:
            (B, D, H, W), or (B, K, D, H, W) with merge 'none'; in the dtype of u, but see `wide`.
        """
        return scan_routes(
            u, self.x_proj, self.dt_proj, self.dt_bias, self.A_log, self.D, self.routes, self.merge, self.wide)


class CascadeSSM(RoutedSSM):
    """VMamba's `cascade2d`: every row of a map is scanned by itself, from both ends, and then every column.

    The channels are normalised (without parameters) in front of both passes. What the two directions of a pass compute
    at their l-th step is added up at place l: the second one is not turned back onto its pixels.
    """

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            dt_rank: int | None = None,
            init: str = 'v0',
            wide: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the parameters of four scans; arguments as for `RoutedSSM`."""
        super().__init__(dim, d_state, dt_rank, 'cross', 'sum', init, wide, device, dtype)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Mix along rows, then along columns.

        Args:
            u: Inner features, (B, D, H, W).

        Returns:
            (B, D, H, W).
        """
        rows = self._scan_lines(u.permute(0, 2, 3, 1), 0)  # (B, H, W, D)
        columns = self._scan_lines(rows.to(u.dtype).transpose(1, 2), 2)  # (B, W, H, D)
        return columns.permute(0, 3, 2, 1)

    def _scan_lines(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Normalise (B, M, L, D) and scan each of its B M lines with the parameter sets `first` and `first` + 1."""
        last = first + 2
        channels = slice(first * self.dim, last * self.dim)
        x = F.layer_norm(widen(x), [self.dim], eps=1e-5).to(x.dtype)
        y = scan_routes(
            x.transpose(2, 3).flatten(0, 1).unsqueeze(2),  # (B M, D, 1, L)
            self.x_proj[first:last], self.dt_proj[first:last], self.dt_bias[first:last], self.A_log[channels],
            self.D[channels], 'raster_both', 'step', self.wide)
        return y.squeeze(2).unflatten(0, (x.shape[0], x.shape[1])).transpose(2, 3)


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm of a float32 map that does not take the map to the type of half-precision weights before it ends."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., D)."""
        y = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)


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
                ('gate', gate, GATES), ('out_norm', out_norm, OUT_NORMS), ('ssm', ssm, ('mamba1',))):
            if value not in allowed:
                raise ValueError(f'{name} is {value!r}; allowed are {", ".join(map(repr, allowed))}.')
        if d_conv > 1 and d_conv % 2 == 0:
            raise ValueError(f'd_conv is {d_conv}; an odd side keeps the size of the map, 1 is no convolution.')
        inner = int(expand * dim)
        dt_rank = dt_rank or math.ceil(dim / 16)
        self.gated = gate != 'none'
        self.in_proj = nn.Linear(dim, 2 * inner if self.gated else inner, bias=bias, **dd)
        self.conv = nn.Identity() if d_conv < 2 else nn.Conv2d(
            inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias, **dd)
        self.act = get_act_layer(act)()
        # Where a normalisation follows, it takes the merged routes in float32: they can leave the range of float16.
        wide = out_norm not in ('none', 'dwconv')
        if routes == 'cascade':
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
        # The convolution is fastest on channels-last memory, projections and scan on channel-first: one copy between.
        u = self.act(self.conv(u.permute(0, 3, 1, 2))).contiguous()
        y = self.ssm(u).permute(0, 2, 3, 1)  # (B, D, H, W) -> (B, H, W, D)
        y = self.out_act(self.out_norm(y).to(u.dtype))
        if self.gated:
            y = y * self.gate_act(z)
        return self.drop(self.out_proj(y))
