"""Scan orders over the pixels of a map, as data: entry [k, l] of a table (K, L) is the pixel that route k visits at l.

Pixel (i, j) of an (H, W) map has the number i * W + j. A *path* is one order, a function of the map of pixel numbers; a
`Routes` object is a tuple of paths. Named ones stand in `ROUTES`; a new one is `Routes((path, ...))`, and any table of
permutations serves as well.
"""
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

from .._library import define_op
from ..selective_scan.op import mark_checked

MERGES = ('sum', 'mean', 'none', 'step')

Path = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Affine:
    """Closed form of a path: step l visits offset + (l // inner) * outer_stride + (l % inner) * inner_stride."""
    inner: int
    inner_stride: int
    outer_stride: int
    offset: int


def raster(pixels: torch.Tensor) -> torch.Tensor:
    """Rows from top to bottom, each from left to right."""
    return pixels.reshape(-1)


def column(pixels: torch.Tensor) -> torch.Tensor:
    """Columns from left to right, each from top to bottom."""
    return pixels.t().reshape(-1)


def column_mirrored(pixels: torch.Tensor) -> torch.Tensor:
    """Columns from right to left, each from top to bottom: the raster order of the map turned by 90 degrees."""
    return pixels.flip(1).t().reshape(-1)


def snake(pixels: torch.Tensor) -> torch.Tensor:
    """Rows from top to bottom, the even ones from left to right, the odd ones back."""
    odd = torch.arange(pixels.shape[0], device=pixels.device)[:, None] % 2 == 1
    return torch.where(odd, pixels.flip(1), pixels).reshape(-1)


def column_snake(pixels: torch.Tensor) -> torch.Tensor:
    """Columns from left to right, the even ones downwards, the odd ones back."""
    return snake(pixels.t())


def diagonal(pixels: torch.Tensor) -> torch.Tensor:
    """Diagonals i + j = 0, 1, ... from the top left corner, each from its upper right to its lower left end."""
    height, width = pixels.shape
    row = torch.arange(height, device=pixels.device)[:, None]
    column_number = torch.arange(width, device=pixels.device)
    key = (row + column_number) * height + row
    return pixels.reshape(-1)[key.reshape(-1).argsort()]


def antidiagonal(pixels: torch.Tensor) -> torch.Tensor:
    """The diagonals of the mirrored map, from the top right corner."""
    return diagonal(pixels.flip(1))


def zigzag(pixels: torch.Tensor) -> torch.Tensor:
    """Diagonals i + j = 0, 1, ... from the top left corner the even ones walked upwards, the odd ones down."""
    height, width = pixels.shape
    row = torch.arange(height, device=pixels.device)[:, None]
    number = row + torch.arange(width, device=pixels.device)
    key = number * height + torch.where(number % 2 == 1, row, height - 1 - row)
    return pixels.reshape(-1)[key.reshape(-1).argsort()]


def zigzag_mirrored(pixels: torch.Tensor) -> torch.Tensor:
    """The zigzag of the mirrored map, from the top right corner."""
    return zigzag(pixels.flip(1))


def spiral(pixels: torch.Tensor) -> torch.Tensor:
    """Rings from the outside to the inside, each clockwise from its upper left corner."""
    height, width = pixels.shape
    row = torch.arange(height, device=pixels.device)[:, None].expand(height, width)
    col = torch.arange(width, device=pixels.device).expand(height, width)
    ring = torch.minimum(torch.minimum(row, height - 1 - row), torch.minimum(col, width - 1 - col))
    row, col = row - ring, col - ring
    last_row, last_col = height - 1 - 2 * ring, width - 1 - 2 * ring
    within = last_col + last_row + last_col + (last_row - row)  # the left column upwards
    within = torch.where(row == last_row, last_col + last_row + (last_col - col), within)
    within = torch.where(col == last_col, last_col + row, within)
    within = torch.where(row == 0, col, within)
    visited = height * width - (last_row + 1) * (last_col + 1)  # on the rings outside this one
    return pixels.reshape(-1)[(visited + within).reshape(-1).argsort()]


def spiral_flipped(pixels: torch.Tensor) -> torch.Tensor:
    """The spiral of the map turned upside down: from the lower left corner, against the clock."""
    return spiral(pixels.flip(0))


def _walk_back(path: Path, pixels: torch.Tensor) -> torch.Tensor:
    return path(pixels).flip(0)


@functools.cache
def reverse(path: Path) -> Path:
    """Returns the path walked from its end to its start; the same object for the same path."""
    return functools.partial(_walk_back, path)


def _by_window(size: int, by_column: bool, pixels: torch.Tensor) -> torch.Tensor:
    height, width = pixels.shape
    row = torch.arange(height, device=pixels.device)[:, None].expand(height, width)
    col = torch.arange(width, device=pixels.device).expand(height, width)
    if by_column:
        row, col, width = col, row, height
    window = (row // size) * ((width + size - 1) // size) + col // size
    within = (row % size) * size + col % size
    return pixels.reshape(-1)[(window * size ** 2 + within).reshape(-1).argsort()]


@functools.cache
def windows(size: int, by_column: bool = False) -> Path:
    """Returns the path through windows of `size` x `size` pixels, ragged at the far edges.

    Args:
        size: Height and width of a window.
        by_column: Takes the windows, and the pixels of each, column by column instead of row by row.
    """
    if size < 1:
        raise ValueError(f'windows: size must be at least 1, got {size}')
    return functools.partial(_by_window, size, by_column)


@dataclasses.dataclass(frozen=True)
class Routes:
    """K paths over the pixels of a map of any size.

    Args:
        paths: The paths; each maps the (H, W) map of pixel numbers to the L = H * W numbers in scan order.
    """
    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError('Routes: paths is empty; give at least one path, for example Routes((raster,))')

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    @functools.cached_property
    def natural(self) -> str | None:
        """'forward' or 'reverse' where all paths are the memory order or its reverse, so that no table is needed."""
        if all(path is raster for path in self.paths):
            return 'forward'
        return 'reverse' if all(path is reverse(raster) for path in self.paths) else None

    def build(self, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
        """Makes the table (K, H * W), int32, of ATen ops only: sizes may be symbolic."""
        pixels = torch.arange(height * width, device=device).view(height, width)
        return torch.stack([path(pixels) for path in self.paths]).to(torch.int32)

    def table(self, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
        """Returns the table (K, H * W), int32, from a cache; it is shared, so do not write to it."""
        return _cached_table(self, int(height), int(width), torch.device(device or 'cpu'))

    def inverse(self, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
        """Returns the inverse table (K, H * W), int32: entry [k, p] is the step at which route k visits pixel p."""
        return _cached_inverse(self, int(height), int(width), torch.device(device or 'cpu'))

    def affine(self, height: int, width: int) -> tuple[Affine, ...] | None:
        """Returns the closed forms of the paths, None unless every path has one."""
        forms = tuple(_affine(path, height, width) for path in self.paths)
        return None if None in forms else forms


def _affine(path: Path, height: int, width: int) -> Affine | None:
    if isinstance(path, functools.partial) and path.func is _walk_back:
        form = _affine(path.args[0], height, width)
        last = height * width - 1
        if form is None:
            return None
        end = form.offset + (last // form.inner) * form.outer_stride + (last % form.inner) * form.inner_stride
        return Affine(form.inner, -form.inner_stride, -form.outer_stride, end)
    forms: dict[Path, Affine] = {
        raster: Affine(width, 1, width, 0),
        column: Affine(height, width, 1, 0),
        column_mirrored: Affine(height, width, -1, width - 1),
    }
    return forms.get(path)


@functools.lru_cache(maxsize=256)
def _cached_table(routes: Routes, height: int, width: int, device: torch.device) -> torch.Tensor:
    # a table made in inference mode could not be saved for a later backward pass
    with torch.inference_mode(False):
        table = routes.build(height, width, device)
    if device.type != 'meta':  # a tensor without values passes no check of them
        check_table(table, height * width)
    return table


@functools.lru_cache(maxsize=256)
def _cached_inverse(routes: Routes, height: int, width: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return routes.table(height, width, device).argsort(-1).to(torch.int32)


def _there_and_back(*paths: Path) -> tuple[Path, ...]:
    return tuple(way for path in paths for way in (path, reverse(path)))


# the scan heads of MHS-VM: two paths each, read from both ends
_MHS_HEADS = {
    'c': _there_and_back(snake, column_snake),
    'x': _there_and_back(zigzag, zigzag_mirrored),
    's': _there_and_back(spiral, spiral_flipped),
    'z': _there_and_back(raster, column),
}

ROUTES: dict[str, Routes] = {
    'raster': Routes((raster,)),
    'raster_reverse': Routes((reverse(raster),)),
    'column': Routes((column,)),
    'column_reverse': Routes((reverse(column),)),
    'raster_both': Routes((raster, reverse(raster))),
    # the four-way scans of VMamba, in the order of its parameter sets
    'cross': Routes((raster, column, reverse(raster), reverse(column))),
    'unidirectional': Routes((raster,) * 4),
    'bidirectional': Routes((raster, raster, reverse(raster), reverse(raster))),
    'rot90': Routes((raster, column_mirrored, reverse(raster), reverse(column_mirrored))),
    'diagonal': Routes((diagonal, antidiagonal, reverse(diagonal), reverse(antidiagonal))),
    'snake': Routes((snake, column_snake, reverse(snake), reverse(column_snake))),
    # MHS-VM, head by head and for 3 or 4 heads in one scan
    **{f'mhs_{head}': Routes(paths) for head, paths in _MHS_HEADS.items()},
    'mhs_3': Routes(tuple(path for head in 'cxs' for path in _MHS_HEADS[head])),
    'mhs_4': Routes(tuple(path for head in 'cxsz' for path in _MHS_HEADS[head])),
}
"""Routes by name."""


def get_routes(name: str) -> Routes:
    """Returns the named routes.

    Args:
        name: A key of `ROUTES`.
    """
    try:
        return ROUTES[name]
    except KeyError:
        raise ValueError(f'routes: unknown name {name!r}; known: {", ".join(ROUTES)}; a Routes object or a table '
                         '(K, L) of pixel numbers is also allowed') from None


def check_table(table: torch.Tensor, length: int) -> None:
    """Raises unless `table` is a (K, L) table of permutations of the pixel numbers 0..L-1."""
    if table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f'routes: a table must be int32 or int64, got {str(table.dtype).removeprefix("torch.")}')
    if table.ndim != 2 or table.shape[1] != length or table.shape[0] == 0:
        raise ValueError(f'routes: a table must be (K, L), K >= 1, L = H * W = {length}; got {tuple(table.shape)}')
    expected = torch.arange(length, device=table.device, dtype=table.dtype)
    wrong = (table.sort(-1).values != expected).any(-1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f'routes: rows {wrong} of the table are no permutations of the pixel numbers 0..{length - 1}')


def is_traced(x: torch.Tensor) -> bool:
    """Says whether x stands for a tensor of a graph under construction, where a cached table would be a constant."""
    return torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)


def _route_table(routes: str, height: int, width: int, device: torch.device) -> torch.Tensor:
    # a copy, because compiled graphs use the memory of dead tensors again; normal, because only such have a version
    with torch.inference_mode(False):
        return mark_checked(get_routes(routes).table(height, width, device).clone())


def _route_table_fake(routes: str, height: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.empty(len(get_routes(routes)), height * width, dtype=torch.int32, device=device)


# one node of a graph, where `Routes.build` has dozens, among them sorts that would run in every pass
route_table = define_op(
    'route_table', '(str routes, SymInt height, SymInt width, Device device) -> Tensor', _route_table,
    _route_table_fake,
    decomposition=lambda routes, height, width, device: get_routes(routes).build(height, width, device))


def choose(
        op: str,
        routes: str | Routes | torch.Tensor,
        x: torch.Tensor,
        size: tuple[int, int],
) -> tuple[str, torch.Tensor | None]:
    """Turns what a public function takes for routes into what its op takes.

    Args:
        op: Name of the op, for messages.
        routes: Name in `ROUTES`, a `Routes` object, or a table (K, H * W).
        x: The leading argument of the op.
        size: (H, W).

    Returns:
        A name and None, or '' and a table on the device of x.
    """
    if isinstance(routes, Routes):
        make = routes.build if is_traced(x) else routes.table
        return '', make(*size, x.device)
    if isinstance(routes, torch.Tensor):
        if not is_traced(x):
            check_table(routes, size[0] * size[1])
        return '', routes.to(x.device)
    if not isinstance(routes, str):
        raise TypeError(f'{op}: routes must be a name, a Routes object or a table (K, H * W), got '
                        f'{type(routes).__name__}')
    return routes, None


def resolve(
        op: str,
        routes: str,
        table: torch.Tensor | None,
        x: torch.Tensor,
        size: tuple[int, int],
) -> tuple[int, torch.Tensor | None, bool]:
    """Returns the number of routes, their table (None for the memory order) and whether the order is reversed.

    Args:
        op: Name of the op, for messages.
        routes: Name in `ROUTES`; ignored where there is a table.
        table: Table (K, H * W), or None.
        x: The leading argument of the op.
        size: (H, W).
    """
    if table is not None:
        if table.device != x.device:
            raise ValueError(f'{op}: the table of routes is on {table.device}, but the map is on {x.device}')
        return table.shape[0], table.to(torch.int32).contiguous(), False
    named = get_routes(routes)
    if named.natural is not None:
        return len(named), None, named.natural == 'reverse'
    make = functools.partial(route_table, routes) if is_traced(x) else named.table
    return len(named), make(*size, x.device), False
