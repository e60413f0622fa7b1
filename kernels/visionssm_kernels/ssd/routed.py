"""The scan of Mamba-2 over 2-D routes: the map is read along each route, and all routes are heads of one scan."""
import math
from collections.abc import Sequence

import torch

from .._checks import check_ndim, check_not_empty, check_shape, check_tensors
from .._dispatch import accumulation_dtype
from .._library import define_composite
from ..selective_scan_2d.cross import check_merge
from ..selective_scan_2d.routes import Routes, choose, resolve

_OP = 'ssd_2d'


def _check_matrix(name: str, x: torch.Tensor, size: tuple[int, ...], heads: int) -> torch.Tensor:
    """Checks B or C and returns it as (B, K, G, N, H, W)."""
    batch, routes, state, height, width = size
    check_ndim(_OP, name, x, (5, 6), '(B, K, N, H, W) or (B, K, G, N, H, W)')
    x = x[:, :, None] if x.ndim == 5 else x
    check_shape(_OP, name, x, (batch, routes, x.shape[2], state, height, width), '(B, K, G, N, H, W)')
    if x.shape[2] == 0 or heads % x.shape[2]:
        raise ValueError(f'{_OP}: the {x.shape[2]} groups of {name} must divide the {heads} heads of x')
    return x


def _ssd_2d(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: Sequence[float] | None = None,
        routes: str = 'cross',
        merge: str = 'sum',
        table: torch.Tensor | None = None,
) -> torch.Tensor:
    check_merge(_OP, merge)
    check_tensors(_OP, x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
    check_ndim(_OP, 'x', x, (5, 6), '(B, M, P, H, W), or (B, K, M, P, H, W) for one map a route')
    check_ndim(_OP, 'B', B, (5, 6), '(B, K, N, H, W) or (B, K, G, N, H, W)')
    batch, (heads, channels, height, width), state = x.shape[0], x.shape[-4:], B.shape[-3]
    check_not_empty(_OP, M=heads, P=channels, N=state, H=height, W=width)
    num_routes, index, _ = resolve(_OP, routes, table, x, (height, width))
    if index is not None:
        check_shape(_OP, 'table', index, (num_routes, height * width), '(K, H * W)')
    if x.ndim == 6:
        check_shape(_OP, 'x', x, (batch, num_routes, heads, channels, height, width), '(B, K, M, P, H, W)')
    check_shape(_OP, 'dt', dt, (batch, num_routes, heads, height, width), '(B, K, M, H, W)')
    rows = num_routes * heads
    check_shape(_OP, 'A', A, (rows,), '(K * M,)')
    if dt_bias is not None:
        check_shape(_OP, 'dt_bias', dt_bias, (rows,), '(K * M,)')
    if D is not None:
        check_ndim(_OP, 'D', D, (1, 2), '(K * M,) or (K * M, P)')
        check_shape(_OP, 'D', D, (rows, channels)[:D.ndim], '(K * M,)' if D.ndim == 1 else '(K * M, P)')
    size = (batch, num_routes, state, height, width)
    B, C = _check_matrix('B', B, size, heads), _check_matrix('C', C, size, heads)
    check_shape(_OP, 'C', C, tuple(B.shape), '(B, K, G, N, H, W), the shape of B,')

    def sequences(maps: torch.Tensor, channels: int) -> torch.Tensor:
        """(B, [K,] M or G, channels, H, W) -> (B, L, K M or K G, channels)."""
        read = torch.ops.visionssm.cross_scan(maps.flatten(-4, -3), routes, index)
        return read.unflatten(2, (-1, channels)).flatten(1, 2).movedim(-1, 1)

    y = torch.ops.visionssm.ssd(
        sequences(x, channels).to(accumulation_dtype(x)), sequences(dt[:, :, :, None], 1)[..., 0], A,
        sequences(B, state), sequences(C, state), D, None, dt_bias, dt_softplus, dt_limit)
    y = y.movedim(1, -1).reshape(batch, num_routes, heads * channels, height, width)
    # merged in the accumulation dtype, so that the sum is rounded once
    y = torch.ops.visionssm.cross_merge(y, routes, merge, index).to(x.dtype)
    return y.unflatten(-3, (heads, channels))


define_composite(
    'ssd_2d',
    '(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? dt_bias=None, bool dt_softplus=False, '
    "float[]? dt_limit=None, str routes='cross', str merge='sum', Tensor? table=None) -> Tensor", _ssd_2d)


def ssd_2d(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        routes: str | Routes | torch.Tensor = 'cross',
        merge: str = 'sum',
) -> torch.Tensor:
    """Runs the scan of Mamba-2 along K routes over a map and merges the results on their pixels.

    The recurrence is that of `ssd`, with parameters of its own for each route. A scripted module calls
    `torch.ops.visionssm.ssd_2d` (routes by name, or by `table`).

    Args:
        x: Input, (B, M, P, H, W); or one a route, (B, K, M, P, H, W).
        dt: Step sizes, (B, K, M, H, W).
        A: Decay rates, (K * M,), route slow, head fast.
        B: Input matrix, (B, K, N, H, W), or grouped (B, K, G, N, H, W) with group m // (M / G) for head m.
        C: Output matrix, in the form of B.
        D: Skip weights, (K * M,) or (K * M, P).
        dt_bias: Added to dt, (K * M,).
        dt_softplus: Applies softplus to dt (after the bias).
        dt_limit: Smallest and largest step (after softplus).
        routes: Name in `ROUTES`, a `Routes` object, or a table (K, H * W) of pixel numbers in scan order.
        merge: 'sum' or 'mean' over the routes, pixel by pixel; 'none'; or 'step', see `selective_scan_2d`.

    Returns:
        (B, M, P, H, W), or (B, K, M, P, H, W) with merge 'none'; in the dtype of x.

    Note:
        Precision and gradients as for `ssd`. The map is copied once a route.
    """
    check_ndim(_OP, 'x', x, (5, 6), '(B, M, P, H, W), or (B, K, M, P, H, W) for one map a route')
    name, table = choose(_OP, routes, x, (x.shape[-2], x.shape[-1]))
    return torch.ops.visionssm.ssd_2d(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, name, merge, table)
