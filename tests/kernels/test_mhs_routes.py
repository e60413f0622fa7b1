"""The scan orders of MHS-VM: the official tables bit by bit, and any map down to a single pixel."""
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visionssm_kernels import ROUTES, Routes
from visionssm_kernels.selective_scan_2d.routes import (
    column,
    column_snake,
    raster,
    reverse,
    snake,
    spiral,
    spiral_flipped,
    zigzag,
    zigzag_mirrored,
)

Order = Callable[[torch.Tensor], torch.Tensor]
# the official names, in the order of the official tables
PATHS: dict[str, Order] = {
    'C0': snake, 'C1': column_snake, 'X0': zigzag, 'X1': zigzag_mirrored, 'S0': spiral, 'S1': spiral_flipped,
    'Z0': raster, 'Z1': column,
}
HEADS = {'mhs_c': ('C0', 'C1'), 'mhs_x': ('X0', 'X1'), 'mhs_s': ('S0', 'S1'), 'mhs_z': ('Z0', 'Z1')}


@pytest.fixture
def facts(operator_fixture) -> Path:
    """The folder of the official tables; it stands beside the operator fixtures."""
    folder = operator_fixture('cross_scan__6x6.safetensors').parent.parent / 'mhs_vm' / 'facts'
    if not folder.exists():
        pytest.skip('the official tables of routes are not here: set VISIONSSM_GOLDEN to the folder of fixtures')
    return folder


def test_paths_equal_the_official_ones_on_small_maps(facts: Path):
    grids = json.loads((facts / 'routes_small.json').read_text())['routes']
    assert len(grids) >= 9
    for grid, routes in grids.items():
        height, width = map(int, grid.split('x'))
        for name, path in PATHS.items():
            assert Routes((path,)).table(height, width)[0].tolist() == routes[name], (grid, name)


def test_tables_and_inverses_equal_the_official_ones_of_a_whole_network(facts: Path):
    routes = Routes(tuple(PATHS.values()))
    for level, official in load_file(facts / 'routes_256x256_official.safetensors').items():
        side = 64 >> int(level.removeprefix('layer_'))
        assert torch.equal(routes.table(side, side), official[:, 0]), level
        assert torch.equal(routes.inverse(side, side), official[:, 1]), level


@pytest.mark.parametrize(('path', 'expected'), [
    (zigzag, [0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11]),
    (zigzag_mirrored, [3, 2, 7, 11, 6, 1, 0, 5, 10, 9, 4, 8]),
    (spiral, [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]),
    (spiral_flipped, [8, 9, 10, 11, 7, 3, 2, 1, 0, 4, 5, 6]),
], ids=['zigzag', 'zigzag mirrored', 'spiral', 'spiral flipped'])
def test_order_on_a_map_of_three_rows(path: Order, expected: list[int]):
    assert path(torch.arange(12).view(3, 4)).tolist() == expected


def walk(height: int, width: int) -> list[int]:
    """A clockwise spiral, step by step: turn right where the way ahead is visited."""
    seen: list[int] = []
    i, j, di, dj = 0, 0, 0, 1
    for _ in range(height * width):
        seen.append(i * width + j)
        if not (0 <= i + di < height and 0 <= j + dj < width) or (i + di) * width + j + dj in seen:
            di, dj = dj, -di
        i, j = i + di, j + dj
    return seen


@pytest.mark.parametrize('width', [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize('height', [1, 2, 3, 4, 5, 9])
def test_spiral_is_the_walk_that_turns_right_at_every_wall(height: int, width: int):
    assert Routes((spiral,)).table(height, width)[0].tolist() == walk(height, width)


@pytest.mark.parametrize('height', range(1, 9))
def test_every_size_gives_permutations(height: int):
    for width in range(1, 9):
        table = ROUTES['mhs_4'].build(height, width).long()
        assert torch.equal(table.sort(-1).values, torch.arange(height * width).expand(16, -1)), (height, width)


def test_neighbours_on_the_snake_the_zigzag_and_the_spiral_touch():
    table = Routes((snake, zigzag, spiral)).table(5, 8)
    rows, cols = table // 8, table % 8
    steps = torch.maximum(rows.diff(dim=1).abs(), cols.diff(dim=1).abs())
    assert steps.max() == 1


@pytest.mark.parametrize('name', HEADS)
def test_a_head_reads_two_paths_from_both_ends(name: str):
    first, second = (PATHS[path] for path in HEADS[name])
    assert ROUTES[name].paths == (first, reverse(first), second, reverse(second))


def test_all_heads_in_one_scan_keep_their_order():
    for count in (3, 4):
        paths = sum((ROUTES[name].paths for name in list(HEADS)[:count]), ())
        assert ROUTES[f'mhs_{count}'].paths == paths


def test_tables_follow_symbolic_sizes():
    class Table(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ROUTES['mhs_4'].build(x.shape[0], x.shape[1])

    sides = {0: torch.export.Dim('height', min=2, max=64), 1: torch.export.Dim('width', min=2, max=64)}
    program = torch.export.export(Table(), (torch.zeros(5, 6),), dynamic_shapes=(sides,))
    for size in ((4, 7), (9, 3)):
        assert torch.equal(program.module()(torch.zeros(size)), ROUTES['mhs_4'].table(*size))
