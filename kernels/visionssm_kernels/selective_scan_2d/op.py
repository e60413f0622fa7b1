"""The selective scan over 2-D routes: checks and shapes around the primitive `visionssm::routed_scan`."""
import torch

from .._checks import check_ndim, check_not_empty, check_shape, check_tensors
from .._library import define_composite
from ..selective_scan.op import routed_scan
from ..selective_scan.reference import to_route
from .cross import check_merge
from .routes import Routes, choose, resolve


def _canonical_matrix(name: str, x: torch.Tensor, size: tuple[int, ...], dim: int) -> torch.Tensor:
    """Checks B or C and returns it as (B, K, G, N, L)."""
    op, (batch, routes, state, height, width) = 'selective_scan_2d', size
    check_ndim(op, name, x, (5, 6), '(B, K, N, H, W) or (B, K, G, N, H, W)')
    if x.ndim == 5:
        check_shape(op, name, x, size, '(B, K, N, H, W)')
        return x.flatten(-2)[:, :, None]
    groups = x.shape[2]
    check_shape(op, name, x, (batch, routes, groups, state, height, width), '(B, K, G, N, H, W)')
    if groups == 0 or dim % groups:
        raise ValueError(f'{op}: the {groups} groups of {name} must divide the {dim} channels of u')
    return x.flatten(-2)


def _selective_scan_2d(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        routes: str = 'cross',
        merge: str = 'sum',
        table: torch.Tensor | None = None,
) -> torch.Tensor:
    op = 'selective_scan_2d'
    check_merge(op, merge)
    check_tensors(op, u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    check_ndim(op, 'u', u, (4, 5), '(B, D, H, W), or (B, K, D, H, W) for one map a route')
    check_ndim(op, 'A', A, (2,), '(K * D, N)')
    batch, (dim, height, width) = u.shape[0], u.shape[-3:]
    state = A.shape[1]
    check_not_empty(op, D=dim, N=state, H=height, W=width)
    num_routes, index, reverse = resolve(op, routes, table, u, (height, width))
    if u.ndim == 5:
        check_shape(op, 'u', u, (batch, num_routes, dim, height, width), '(B, K, D, H, W)')
    check_shape(op, 'delta', delta, (batch, num_routes, dim, height, width), '(B, K, D, H, W)')
    check_shape(op, 'A', A, (num_routes * dim, state), '(K * D, N)')
    for name, x in (('D', D), ('delta_bias', delta_bias)):
        if x is not None:
            check_shape(op, name, x, (num_routes * dim,), '(K * D,)')
    size = (batch, num_routes, state, height, width)
    B, C = _canonical_matrix('B', B, size, dim), _canonical_matrix('C', C, size, dim)
    if index is not None and table is not None:
        check_shape(op, 'table', table, (num_routes, height * width), '(K, H * W)')
    D, delta_bias = (None if x is None else x.view(num_routes, dim) for x in (D, delta_bias))
    u = u.flatten(-2) if u.ndim == 5 else u.flatten(-2)[:, None]
    out, _, _ = routed_scan(
        u, delta.flatten(-2), A.view(num_routes, dim, state), B, C, D, None, delta_bias, index,
        delta_softplus, reverse, merge in ('sum', 'mean'))
    if merge == 'mean':
        out = out / num_routes
    elif merge == 'step':
        out = to_route(out, index, reverse).sum(1, keepdim=True)
    out = out.unflatten(-1, (height, width))
    return out if merge == 'none' else out[:, 0]


define_composite(
    'selective_scan_2d',
    '(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? delta_bias=None, '
    "bool delta_softplus=False, str routes='cross', str merge='sum', Tensor? table=None) -> Tensor",
    _selective_scan_2d)


def selective_scan_2d(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        routes: str | Routes | torch.Tensor = 'cross',
        merge: str = 'sum',
) -> torch.Tensor:
    """Runs the selective scan along K routes over a map and merges the results on their pixels.

    Every map is laid out by pixel; the kernel reads pixels in route order, so nothing is copied or flipped. The
    recurrence is that of `selective_scan`, with parameters of its own for each route. A scripted module calls
    `torch.ops.visionssm.selective_scan_2d` (routes by name, or by `table`).

    Args:
        u: Input, (B, D, H, W); or one a route, (B, K, D, H, W).
        delta: Step sizes, (B, K, D, H, W).
        A: Decay rates, (K * D, N), route slow, channel fast.
        B: Input matrix, (B, K, N, H, W), or grouped (B, K, G, N, H, W) with group d // (D / G) for channel d.
        C: Output matrix, any of the forms of B.
        D: Skip weights, (K * D,).
        delta_bias: Added to delta, (K * D,).
        delta_softplus: Applies softplus to delta (after the bias).
        routes: Name in `routes.ROUTES`, a `Routes` object, or a table (K, H * W) of pixel numbers in scan order.
        merge: 'sum' or 'mean' over the routes, pixel by pixel; 'none'; or 'step', the sum over the routes step by step:
            place l of the map, in memory order, gets what every route computed at its step l.

    Returns:
        (B, D, H, W), or (B, K, D, H, W) with merge 'none'; in the dtype of u.

    Note:
        Precision and gradients as for `selective_scan`.
    """
    routes, table = choose('selective_scan_2d', routes, u, (u.shape[-2], u.shape[-1]))
    return torch.ops.visionssm.selective_scan_2d(
        u, delta, A, B, C, D, delta_bias, delta_softplus, routes, merge, table)
