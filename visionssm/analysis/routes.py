"""Scan routes: in which order a model reads the pixels of its maps."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from visionssm_kernels import get_routes

from .scans import OPS, ScanBlock, ScanCall, record_scans

__all__ = ['BlockRoutes', 'ScanRoute', 'scan_routes']

Kind = Literal['path', 'lines', 'wavefront', 'unordered']


@dataclasses.dataclass(frozen=True)
class ScanRoute:
    """One order of the pixels of a map."""
    label: str
    """What it is called, as in 'raster' or 'column, reversed'."""
    kind: Kind
    """'path', one sequence; 'lines', one a row or column; 'wavefront', diagonals one after the other, each at once;
    'unordered', all pixels at once."""
    steps: torch.Tensor
    """Step at which a pixel is read, int64, (H, W)."""
    lines: torch.Tensor
    """Number of the sequence that a pixel belongs to, int64, (H, W)."""

    def paths(self) -> list[torch.Tensor]:
        """Return the sequences: pixel numbers i * W + j in the order of reading; none for the kinds without one."""
        if self.kind not in ('path', 'lines'):
            return []
        steps, lines = self.steps.flatten(), self.lines.flatten()
        order = steps.argsort(stable=True)
        return [order[lines[order] == line] for line in lines.unique().tolist()]


@dataclasses.dataclass(frozen=True)
class BlockRoutes:
    """The routes of one block."""
    block: str
    """Path of the block in the model."""
    op: str
    """The scan operator of `visionssm_kernels`."""
    size: tuple[int, int]
    """Height and width of the map."""
    routes: tuple[ScanRoute, ...]
    """In the order of the block's parameters; none where the scan runs over channels."""
    note: str
    """What else there is to know, in a sentence; may be empty."""


def scan_routes(
        model: nn.Module,
        size: int | Sequence[int] | None = None,
        image: torch.Tensor | None = None,
) -> list[BlockRoutes]:
    """Return the routes of every block that scans, as a run of the model shows them.

    Args:
        model: A model of the package, of any task.
        size: Height and width of the image, or one number for both; the model's own when None. The run takes neither
            memory nor time.
        image: An image (C, H, W), normalised, in place of `size`: needed where the order follows what pixels show.

    Returns:
        The blocks in the order of the run.

    Raises:
        ValueError: The model has no scans, does not take images of this size, or needs an image.
    """
    blocks = record_scans(model, image, size)
    if not blocks:
        raise ValueError(f'{type(model).__name__} has no scans: none of its modules calls a scan operator of '
                         'visionssm_kernels')
    return [_block_routes(block) for block in blocks]


def _block_routes(block: ScanBlock) -> BlockRoutes:
    op, size = block.calls[0].op, block.size
    if not block.spatial:
        return BlockRoutes(block.name, op, size, (), 'Scans the channels of every pixel, from both ends; no pixel '
                                                     'reads another.')
    routes = tuple(route for call in block.calls for route in call_routes(call))
    notes = [note for note in dict.fromkeys(_note(call) for call in block.calls) if note]
    return BlockRoutes(block.name, op, size, routes, ' '.join(notes))


def _note(call: ScanCall) -> str:
    if call.op == 'nc_ssd':
        return 'No order: every pixel reads the same weighted sum over all pixels.'
    if call.op == 'wavefront_scan_2d':
        return 'A state follows from those of two neighbours before it; a diagonal is one step.'
    if call.layout == 'content':
        return 'Pixels of one kind stand together; the model chooses the kinds.'
    if call.layout == 'rows':
        return 'Every row is scanned by itself, then every column.'
    if call.fuse is not None:
        return 'A convolution then mixes the states of neighbours.'
    if call.pixels is not None and bool((call.pixels < 0).any()):
        steps = (call.pixels < 0).nonzero().flatten().tolist()
        return f'Other tokens than pixels stand at {_list(steps)} of the {len(call.pixels)} positions.'
    return ''


def _list(steps: Sequence[int]) -> str:
    return 'position ' + str(steps[0]) if len(steps) == 1 else 'the positions ' + ', '.join(map(str, steps))


def call_routes(call: ScanCall) -> list[ScanRoute]:
    """Return the routes of one call of an operator, in the order of its parameters.

    Args:
        call: A call that scans pixels.

    Raises:
        ValueError: The order follows what pixels show, and there was no image.
    """
    height, width = call.size
    if call.pixels is None:
        raise ValueError(f'{call.path} reads pixels in the order of what they show: give an image')
    zeros = torch.zeros(height, width, dtype=torch.long)
    if call.op == 'nc_ssd':
        return [ScanRoute('all at once', 'unordered', zeros, zeros)]
    if call.op == 'wavefront_scan_2d':
        steps = torch.arange(height)[:, None] + torch.arange(width)
        backwards = bool(call.args['reverse'])
        label = 'diagonals from the ' + ('bottom right' if backwards else 'top left')
        return [ScanRoute(label, 'wavefront', steps.flip(0, 1) if backwards else steps, zeros)]
    if call.layout in ('rows', 'columns'):
        down = call.layout == 'columns'
        line = torch.arange(height if down else width)
        across = line[:, None].expand(height, width) if down else line.expand(height, width)
        number = torch.arange(width).expand(height, width) if down else torch.arange(height)[:, None].expand(
            height, width)
        name = 'columns' if down else 'rows'
        return [ScanRoute(f'all {name}', 'lines', across, number),
                ScanRoute(f'all {name}, reversed', 'lines', len(line) - 1 - across, number)]
    orders, labels = _orders(call)
    routes = []
    for order, label in zip(orders, labels, strict=True):
        steps = torch.arange(len(order))[order >= 0]
        flat = torch.empty(height * width, dtype=torch.long)
        flat[order[order >= 0]] = steps
        routes.append(ScanRoute(label, 'path', flat.view(height, width), zeros))
    return routes


def _orders(call: ScanCall) -> tuple[list[torch.Tensor], list[str]]:
    """Return the pixel numbers in scan order, and what the orders are called."""
    assert call.pixels is not None
    if 'routes' not in call.args:
        label = 'by content' if call.layout == 'content' else 'raster'
        return ([call.pixels.flip(0)], [f'{label}, reversed']) if call.args['reverse'] else ([call.pixels], [label])
    table = call.args['table']
    if table is not None:
        return list(table.cpu().long()), [f'route {k}' for k in range(len(table))]
    named = get_routes(call.args['routes'])
    table = named.table(*call.args[OPS[call.op]].shape[-2:]).long()
    return [call.pixels[order] for order in table], [_label(path) for path in named]


def _label(path: Callable) -> str:
    """Return the name of a path; one that is walked back is a partial function of the path itself."""
    if not isinstance(path, functools.partial):
        return path.__name__.replace('_', ' ')
    inner = path.args[0]
    return f'{_label(inner)}, reversed' if callable(inner) else f'windows of {inner}'
