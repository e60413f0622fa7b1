"""Cross scan and cross merge: a map read along K routes, and K sequences put back on their pixels."""
import torch

from .._checks import check_ndim, check_shape
from .._library import define_composite
from ..selective_scan.reference import from_route, to_route
from .routes import MERGES, Routes, choose, resolve


def check_merge(op: str, merge: str) -> None:
    """Raises unless `merge` is one of `MERGES`."""
    if merge not in MERGES:
        raise ValueError(f'{op}: merge must be one of {", ".join(MERGES)}, got {merge!r}')


def _cross_scan(x: torch.Tensor, routes: str = 'cross', table: torch.Tensor | None = None) -> torch.Tensor:
    op = 'cross_scan'
    check_ndim(op, 'x', x, (4, 5), '(B, D, H, W), or (B, K, D, H, W) for one map a route')
    dim, height, width = x.shape[-3:]
    num_routes, index, reverse = resolve(op, routes, table, x, (height, width))
    if index is not None:
        check_shape(op, 'table', index, (num_routes, height * width), '(K, H * W)')
    if x.ndim == 5:
        check_shape(op, 'x', x, (x.shape[0], num_routes, dim, height, width), '(B, K, D, H, W)')
    x = x.flatten(-2) if x.ndim == 5 else x.flatten(-2)[:, None].expand(-1, num_routes, -1, -1)
    # an op may not return a view of its argument
    return x.clone(memory_format=torch.contiguous_format) if index is None and not reverse else \
        to_route(x, index, reverse)


def _cross_merge(
        y: torch.Tensor,
        routes: str = 'cross',
        merge: str = 'sum',
        table: torch.Tensor | None = None,
) -> torch.Tensor:
    op = 'cross_merge'
    check_merge(op, merge)
    check_ndim(op, 'y', y, (4, 5), '(B, K, D, H, W), or (B, K, D, H * W)')
    if y.ndim == 4 and table is None:
        raise ValueError(f'{op}: y is {tuple(y.shape)}, from which named routes cannot tell H and W: give y as '
                         '(B, K, D, H, W), give size=(H, W), or give routes as a table')
    size = y.shape[3:]
    y = y.flatten(3)
    num_routes, index, reverse = resolve(op, routes, table, y, (size[0], size[-1]))
    check_shape(op, 'y', y, (y.shape[0], num_routes, *y.shape[2:]), '(B, K, D, H * W)')
    if index is not None:
        check_shape(op, 'table', index, (num_routes, y.shape[-1]), '(K, H * W)')
    if merge != 'step' and (index is not None or reverse):
        y = from_route(y, index, reverse)
    if merge == 'none':
        y = y.clone(memory_format=torch.contiguous_format) if index is None and not reverse else y
    else:
        y = y.mean(1) if merge == 'mean' else y.sum(1)
    return y.unflatten(-1, size) if len(size) == 2 else y


define_composite('cross_scan', "(Tensor x, str routes='cross', Tensor? table=None) -> Tensor", _cross_scan)
define_composite(
    'cross_merge', "(Tensor y, str routes='cross', str merge='sum', Tensor? table=None) -> Tensor", _cross_merge)


def cross_scan(x: torch.Tensor, routes: str | Routes | torch.Tensor = 'cross') -> torch.Tensor:
    """Reads a map along K routes.

    The scans over maps of this package read in route order by themselves and need no such copy; this is for operators
    that work on sequences. A scripted module calls `torch.ops.visionssm.cross_scan` (routes by name, or by `table`).

    Args:
        x: Map (B, D, H, W), or one a route (B, K, D, H, W); any dtype.
        routes: Name in `ROUTES`, a `Routes` object, or a table (K, H * W) of pixel numbers in scan order.

    Returns:
        Sequences (B, K, D, H * W) in the dtype of x; [.., k, :, l] is the pixel that route k visits at step l.
    """
    check_ndim('cross_scan', 'x', x, (4, 5), '(B, D, H, W), or (B, K, D, H, W) for one map a route')
    name, table = choose('cross_scan', routes, x, (x.shape[-2], x.shape[-1]))
    return torch.ops.visionssm.cross_scan(x, name, table)


def cross_merge(
        y: torch.Tensor,
        routes: str | Routes | torch.Tensor = 'cross',
        merge: str = 'sum',
        size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Puts the sequences of K routes back on their pixels and merges them; with 'sum' the transpose of `cross_scan`.

    A scripted module calls `torch.ops.visionssm.cross_merge` (routes by name, or by `table`; y in five dimensions).

    Args:
        y: Sequences (B, K, D, H * W), or the same as (B, K, D, H, W).
        routes: As in `cross_scan`.
        merge: 'sum' or 'mean' over the routes, pixel by pixel; 'none'; or 'step', the sum over the routes step by step.
        size: (H, W); needed where y has four dimensions and routes is no table.

    Returns:
        Maps (B, D, H, W) in the dtype of y, or (B, K, D, H, W) with 'none'; with H and W as one dimension where
        neither y nor `size` tells them apart.
    """
    check_ndim('cross_merge', 'y', y, (4, 5), '(B, K, D, H, W), or (B, K, D, H * W)')
    if size is not None and y.ndim == 4:
        if size[0] * size[1] != y.shape[-1]:
            raise ValueError(f'cross_merge: size {tuple(size)} does not fit the {y.shape[-1]} steps of y')
        y = y.unflatten(-1, tuple(size))
    if y.ndim == 5 or isinstance(routes, torch.Tensor):
        name, table = choose('cross_merge', routes, y, (y.shape[3], y.shape[4] if y.ndim == 5 else 1))
    else:
        name, table = '', None  # the op says what is missing
    return torch.ops.visionssm.cross_merge(y, name, merge, table)
