"""Selective state-space mixers over maps, read along routes."""

import math
from typing import Any, Final

import torch
from torch import nn

from visionssm_kernels import get_routes

from .ssm_init import init_A_log_, init_dt_bias_, init_dt_proj_, negative_exp

__all__ = ['RoutedSSM']


class RoutedSSM(nn.Module):
    """Input-dependent parameters and a selective scan along K routes over a map, each route with parameters of its own.

    [dt, B, C] = x_proj[k] u; delta = softplus(dt_proj[k] dt + dt_bias[k]); A = -exp(A_log); along route k
    s_t = exp(delta_t A) s_{t-1} + delta_t u_t B_t; y_t = <s_t, C_t> + D u_t; every y_t goes back to its pixel.

    The projections are pointwise, so they commute with the order of the pixels: they are computed once on the map, and
    the scan reads pixels in route order.
    """

    routes: Final[str]
    merge: Final[str]
    own_maps: Final[bool]

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            dt_rank: int | None = None,
            routes: str = 'cross',
            merge: str = 'sum',
            own_maps: bool = False,
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
            own_maps: Each route reads a map of its own.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        num_routes = len(get_routes(routes))
        dt_rank = dt_rank or math.ceil(dim / 16)
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.num_routes = num_routes
        self.routes = routes
        self.merge = merge
        self.own_maps = own_maps
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
        init_dt_proj_(self.dt_proj)
        init_dt_bias_(self.dt_bias)
        init_A_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Mix over the map.

        Args:
            u: Inner features (B, D, H, W), or (B, K, D, H, W) with `own_maps`.

        Returns:
            (B, D, H, W), or (B, K, D, H, W) with merge 'none'; in the dtype of u.
        """
        size = u.shape[-2:]
        flat = u.flatten(-2)
        if self.own_maps:
            projected = torch.matmul(self.x_proj, flat)  # (B, K, R + 2 N, L)
        else:
            projected = torch.matmul(self.x_proj.flatten(0, 1), flat).unflatten(1, (self.num_routes, -1))
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        delta = torch.matmul(self.dt_proj, dt)  # (B, K, D, L)
        return torch.ops.visionssm.selective_scan_2d(
            u, delta.unflatten(-1, size), negative_exp(self.A_log), B.unflatten(-1, size), C.unflatten(-1, size),
            self.D, self.dt_bias.flatten(), True, self.routes, self.merge)
