"""The scan over 2-D routes as written down: read the map along each route, scan, put back, merge."""
import torch

from ..selective_scan import reference as selective_scan_reference
from .cross import cross_merge, cross_scan


def selective_scan_2d(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        delta_softplus: bool,
        table: torch.Tensor,
        merge: str = 'sum',
) -> torch.Tensor:
    """Scans each route with the 1-D reference; arguments as in `visionssm_kernels.selective_scan_2d`."""
    height, width = u.shape[-2:]
    routes = table.shape[0]

    def rows(x: torch.Tensor | None, k: int) -> torch.Tensor | None:
        return None if x is None else x.chunk(routes)[k][None]

    def matrix(x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(-2)
        x = x[:, :, None] if x.ndim == 4 else x
        return selective_scan_reference.to_route(x, table, False)

    x, step = cross_scan(u, table), cross_scan(delta, table)
    B_l, C_l = matrix(B), matrix(C)
    ys = [selective_scan_reference.forward(
        x[:, k:k + 1], step[:, k:k + 1], A.chunk(routes)[k][None], B_l[:, k:k + 1], C_l[:, k:k + 1], rows(D, k), None,
        rows(delta_bias, k), None, delta_softplus, False, False)[0] for k in range(routes)]
    return cross_merge(torch.cat(ys, 1), table, merge).unflatten(-1, (height, width))
