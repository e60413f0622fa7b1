"""The selective scan over 2-D routes: checks and shapes around the primitive `visionssm::routed_scan`."""
import torch

from .._checks import check_ndim, check_not_empty, check_shape, check_tensors
from .._library import define_composite
from ..selective_scan.op import routed_scan
from ..selective_scan.reference import to_route
from .cross import check_merge
from .routes import Routes, choose, resolve

_OP = 'selective_scan_2d'


def _shapes_fit(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        matrices: tuple[torch.Tensor, torch.Tensor],
        vectors: tuple[torch.Tensor | None, torch.Tensor | None],
) -> bool:
    """Says at a glance whether the checks below would pass with as many routes as delta has; they take much longer."""
    maps, rates = delta.shape, A.shape
    if len(maps) != 5 or len(rates) != 2 or 0 in maps[1:] or rates[1] == 0 or rates[0] != maps[1] * maps[2]:
        return False
    if u.shape != maps and (u.ndim != 4 or u.shape[0] != maps[0] or u.shape[1:] != maps[2:]):
        return False
    for x in matrices:
        shape = x.shape
        if shape[:2] != maps[:2] or shape[-2:] != maps[3:] or shape[-3] != rates[1] or len(shape) not in (5, 6):
            return False
        if len(shape) == 6 and (shape[2] == 0 or maps[2] % shape[2]):
            return False
    return all(x is None or x.shape == rates[:1] for x in vectors)


def _check_sizes(u: torch.Tensor, A: torch.Tensor) -> None:
    """Raises where u and A do not even say what the sizes are."""
    check_ndim(_OP, 'u', u, (4, 5), '(B, D, H, W), or (B, K, D, H, W) for one map a route')
    check_ndim(_OP, 'A', A, (2,), '(K * D, N)')
    dim, height, width = u.shape[-3:]
    check_not_empty(_OP, D=dim, N=A.shape[1], H=height, W=width)


def _check_shapes(
        num_routes: int,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        matrices: tuple[torch.Tensor, torch.Tensor],
        vectors: tuple[torch.Tensor | None, torch.Tensor | None],
) -> None:
    """Raises and says which shape is wrong."""
    (batch, *_), (dim, height, width), state = u.shape, u.shape[-3:], A.shape[1]
    if u.ndim == 5:
        check_shape(_OP, 'u', u, (batch, num_routes, dim, height, width), '(B, K, D, H, W)')
    check_shape(_OP, 'delta', delta, (batch, num_routes, dim, height, width), '(B, K, D, H, W)')
    check_shape(_OP, 'A', A, (num_routes * dim, state), '(K * D, N)')
    for name, vector in zip(('D', 'delta_bias'), vectors, strict=True):
        if vector is not None:
            check_shape(_OP, name, vector, (num_routes * dim,), '(K * D,)')
    for name, x in zip('BC', matrices, strict=True):
        check_ndim(_OP, name, x, (5, 6), '(B, K, N, H, W) or (B, K, G, N, H, W)')
        if x.ndim == 5:
            check_shape(_OP, name, x, (batch, num_routes, state, height, width), '(B, K, N, H, W)')
            continue
        groups = x.shape[2]
        check_shape(_OP, name, x, (batch, num_routes, groups, state, height, width), '(B, K, G, N, H, W)')
        if groups == 0 or dim % groups:
            raise ValueError(f'{_OP}: the {groups} groups of {name} must divide the {dim} channels of u')


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
    check_merge(_OP, merge)
    check_tensors(_OP, u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    fit = _shapes_fit(u, delta, A, (B, C), (D, delta_bias))
    if not fit:
        _check_sizes(u, A)
    dim, height, width = u.shape[-3:]
    num_routes, index, reverse = resolve(_OP, routes, table, u, (height, width))
    if not fit or delta.shape[1] != num_routes:
        _check_shapes(num_routes, u, delta, A, (B, C), (D, delta_bias))
    if index is not None and table is not None:
        check_shape(_OP, 'table', table, (num_routes, height * width), '(K, H * W)')
    batch, state, length = u.shape[0], A.shape[1], height * width
    # one view each, by all sizes: on small maps every call of PyTorch counts
    B, C = (x.reshape(batch, num_routes, 1 if x.ndim == 5 else x.shape[2], state, length) for x in (B, C))
    D, delta_bias = (None if x is None else x.view(num_routes, dim) for x in (D, delta_bias))
    out, _, _ = routed_scan(
        u.reshape(batch, 1 if u.ndim == 4 else num_routes, dim, length), delta.reshape(batch, num_routes, dim, length),
        A.view(num_routes, dim, state), B, C, D, None, delta_bias, index, delta_softplus, reverse,
        merge in ('sum', 'mean'))
    if merge == 'mean':
        out = out / num_routes
    elif merge == 'step':
        out = to_route(out, index, reverse).sum(1, keepdim=True)
    if merge == 'none':
        return out.view(batch, num_routes, dim, height, width)
    return out.view(batch, dim, height, width)


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
