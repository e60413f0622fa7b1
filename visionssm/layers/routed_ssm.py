"""State-space models over maps: input-dependent parameters, and a scan along routes."""

import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import nn

from visionssm_kernels import get_routes

from .precision import widen
from .ssm_init import init_state_, negative_exp

__all__ = ['CascadeSSM', 'RoutedSSD', 'RoutedSSM']


@register_notrace_function
def route_projections(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Project the pixels of a map once for every route.

    Args:
        u: Map (B, D, H, W), or one map a route (B, K, D, H, W).
        weight: (K, P, D).

    Returns:
        (B, K, P, H * W); of one map for all routes with all that belongs to a pixel side by side in memory.
    """
    if u.dim() == 4:
        pixels = F.linear(u.flatten(2).transpose(1, 2), weight.flatten(0, 1))
        return pixels.unflatten(-1, (weight.shape[0], weight.shape[1])).permute(0, 2, 3, 1)
    return torch.matmul(weight, u.flatten(-2))


@register_notrace_function
def step_projections(dt: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Project low-rank steps (B, K, R, L) by one weight a route, (K, D, R), to (B, K, D, L), laid out as they are."""
    if dt.stride(2) < dt.stride(3):
        pixels = dt.permute(1, 0, 3, 2)
        delta = torch.bmm(pixels.flatten(1, 2), weight.transpose(1, 2))  # (K, B L, D)
        return delta.unflatten(1, (pixels.shape[1], pixels.shape[2])).permute(1, 0, 3, 2)
    return torch.matmul(weight, dt)


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
    delta = step_projections(dt, dt_proj)
    return torch.ops.visionssm.selective_scan_2d(
        widen(u) if wide else u, delta.unflatten(-1, size), negative_exp(A_log), B.unflatten(-1, size),
        C.unflatten(-1, size), D, dt_bias.flatten(), True, routes, merge)


class RoutedSSM(nn.Module):
    """Input-dependent parameters and a selective scan along K routes over a map, each route with parameters of its own.

    [dt, B, C] = x_proj[k] u; delta = softplus(dt_proj[k] dt + dt_bias[k]); A = -exp(A_log); along route k
    s_t = exp(delta_t A) s_{t-1} + delta_t u_t B_t; y_t = C_t . s_t + D u_t; every y_t goes back to its pixel.

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


class RoutedSSD(nn.Module):
    """The counterpart of `RoutedSSM` with the scan of Mamba-2: one decay and one step a head, and no step projection.

    [dt, B, C] = x_proj[k] u; step = softplus(dt + dt_bias[k]); A = -exp(A_log); along route k and in every head of P
    channels S_t = exp(step_t A) S_{t-1} + step_t u_t B_t^T; y_t = S_t C_t + D u_t; every y_t goes back to its pixel.
    """

    routes: Final[str]
    wide: Final[bool]

    def __init__(
            self,
            dim: int,
            d_state: int = 64,
            num_heads: int | None = None,
            routes: str = 'cross',
            init: str = 'v0',
            wide: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the projection and state parameters.

        Args:
            dim: Inner channels D.
            d_state: State size N.
            num_heads: Heads M of a route; ceil(dim / 16) when None.
            routes: Name in `visionssm_kernels.ROUTES`.
            init: Style of the initial state parameters, see `init_state_`.
            wide: Return float32 for half-precision maps.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        num_routes = len(get_routes(routes))
        num_heads = num_heads or math.ceil(dim / 16)
        if dim % num_heads:
            raise ValueError(f'The {dim} inner channels cannot be dealt out to {num_heads} heads: choose a divisor.')
        self.d_state = d_state
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.routes = routes
        self.init = init
        self.wide = wide
        self.x_proj = nn.Parameter(torch.empty(num_routes, num_heads + 2 * d_state, dim, **dd))
        self.dt_bias = nn.Parameter(torch.empty(num_routes, num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(num_routes, num_heads, **dd))
        self.D = nn.Parameter(torch.empty(num_routes, num_heads, self.head_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        bound = self.x_proj.shape[-1] ** -0.5  # what nn.Linear draws
        nn.init.uniform_(self.x_proj, -bound, bound)
        init_state_(self.init, self.A_log, self.dt_bias)
        nn.init.ones_(self.D)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Mix over the map.

        Args:
            u: Inner features, (B, D, H, W).

        Returns:
            (B, D, H, W), in the dtype of u, but see `wide`.
        """
        dt, B, C = route_projections(u, self.x_proj).unflatten(-1, u.shape[-2:]).split(
            [self.num_heads, self.d_state, self.d_state], dim=2)
        x = (widen(u) if self.wide else u).unflatten(1, (self.num_heads, self.head_dim))
        y = torch.ops.visionssm.ssd_2d(
            x, dt, negative_exp(self.A_log).flatten(), B, C, self.D.flatten(0, 1), self.dt_bias.flatten(), True, None,
            self.routes)
        return y.flatten(1, 2)
