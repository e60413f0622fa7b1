"""The decompositions around loops against the definitions of the ops."""
import pytest
import torch

import visionssm_kernels as kernels
from visionssm.export.loops import _skew, _straighten, loop_decompositions

TABLE = loop_decompositions()


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scan_arguments(length: int, routes: int, groups: int, constant: bool) -> dict:
    dim, state = 6, 3
    matrix = (routes, dim, state) if constant else (2, routes, groups, state, length)
    return {'u': maps(2, routes, dim, length), 'delta': maps(2, routes, dim, length, seed=1),
            'A': -maps(routes, dim, state, seed=2).exp(), 'B': maps(*matrix, seed=3),
            'C': maps(2, routes, groups, state, length, seed=4), 'D': maps(routes, dim, seed=5),
            'z': None, 'delta_bias': maps(routes, dim, seed=7)}


@pytest.mark.parametrize('length', [1, 2, 7])
@pytest.mark.parametrize(('groups', 'constant'), [(1, False), (2, False), (3, True)])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('gated', [False, True])
def test_the_scan_is_what_the_definition_gives(length: int, groups: int, constant: bool, reverse: bool, gated: bool):
    inputs = scan_arguments(length, 2, groups, constant)
    if gated:
        inputs['z'] = maps(2, 2, 6, length, seed=6)
    op = torch.ops.visionssm.routed_scan.default
    arguments = (*inputs.values(), None, True, reverse, False)
    with kernels.use_backend('reference'):
        want, last, _ = op(*arguments)
    found, found_last, _ = TABLE[op](*arguments)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_last, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('merge', [False, True])
@pytest.mark.parametrize('shared', [False, True])
def test_routes_are_read_and_written_where_they_lie(merge: bool, shared: bool):
    inputs = scan_arguments(12, 4, 1, constant=False)
    inputs['u'] = inputs['u'][:, :1] if shared else inputs['u']
    inputs['z'] = maps(2, 4, 6, 12, seed=8)
    index = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]).int()
    arguments = (*inputs.values(), index, True, False, merge)
    op = torch.ops.visionssm.routed_scan.default
    with kernels.use_backend('reference'):
        want = op(*arguments)[0]
    torch.testing.assert_close(TABLE[op](*arguments)[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (1, 5), (4, 1), (3, 5), (5, 3)])
@pytest.mark.parametrize('reverse', [False, True])
def test_the_wavefront_is_what_the_definition_gives(height: int, width: int, reverse: bool):
    wide, narrow = ([maps(2, size, height, width, seed=10 * size + seed) for seed in range(3)] for size in (4, 2))
    rates = [-maps(4, 2, seed=seed).exp() for seed in (1, 2)]
    arguments = (*wide, *rates, *narrow, maps(4), maps(4, seed=3), maps(4, seed=4), True, reverse, False)
    op = torch.ops.visionssm.wavefront_scan.default
    with kernels.use_backend('reference'):
        want = op(*arguments)[0]
    torch.testing.assert_close(TABLE[op](*arguments)[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('height', 'width'), [(1, 4), (3, 1), (3, 4), (4, 3)])
def test_diagonals_go_back_to_where_they_were(height: int, width: int):
    x = maps(2, height, width)
    diagonals = _skew(x)
    assert diagonals.shape == (height + width - 1, 2, height)
    assert diagonals[height - 1, 0, 0] == (x[0, 0, height - 1] if width >= height else 0)
    assert torch.equal(_straighten(diagonals, width), x)
