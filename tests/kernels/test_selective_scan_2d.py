"""The scan over 2-D routes: every backend against gather, scan, scatter; options, layouts, errors."""
import functools

import pytest
import torch

from visionssm_kernels import ROUTES, Routes, get_routes, selective_scan_2d, set_strict, use_backend
from visionssm_kernels._testing import assert_close_rms, assert_same_results, results_and_gradients
from visionssm_kernels.selective_scan_2d import reference
from visionssm_kernels.selective_scan_2d.routes import windows

pytestmark = pytest.mark.usefixtures('poisoned_memory')

MAPS = [(1, 9), (7, 3), (14, 14), (17, 20)]
K = 4


@pytest.fixture(autouse=True)
def _strict():
    set_strict(True)
    yield
    set_strict(None)


def make_inputs(batch, dim, height, width, state, routes=K, groups=None, own_maps=False, dtype=torch.float64):
    def make(*shape):
        return torch.randn(shape, dtype=dtype)

    matrix = (batch, routes, state, height, width) if groups is None else (batch, routes, groups, state, height, width)
    return {'u': make(batch, *([routes] if own_maps else []), dim, height, width),
            'delta': make(batch, routes, dim, height, width) / 2,
            'A': -4 * torch.rand(routes * dim, state, dtype=dtype), 'B': make(*matrix), 'C': make(*matrix),
            'D': make(routes * dim), 'delta_bias': make(routes * dim)}


def definition(table, merge, **inputs):
    return reference.selective_scan_2d(**inputs, delta_softplus=True, table=table, merge=merge)


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=['f64', 'f32'])
@pytest.mark.parametrize('merge', ['sum', 'mean', 'none', 'step'])
@pytest.mark.parametrize('name', ['cross', 'unidirectional', 'bidirectional', 'rot90', 'diagonal', 'snake'])
def test_named_routes_equal_the_definition(name, merge, dtype, bound, cpu_backend):
    inputs = make_inputs(2, 19, 7, 11, 3, dtype=dtype)
    expected = results_and_gradients(functools.partial(definition, get_routes(name).table(7, 11), merge), inputs)
    with use_backend(cpu_backend):
        scan = functools.partial(selective_scan_2d, routes=name, merge=merge, delta_softplus=True)
        assert_same_results(results_and_gradients(scan, inputs), expected, bound, bound)


@pytest.mark.parametrize('own_maps', [False, True], ids=['one map', 'a map a route'])
@pytest.mark.parametrize('groups', [None, 3], ids=['shared', 'grouped'])
@pytest.mark.parametrize('size', MAPS, ids=lambda s: f'{s[0]}x{s[1]}')
def test_sizes_groups_and_maps_equal_the_definition(size, groups, own_maps, cpu_backend):
    inputs = make_inputs(1, 24, *size, 2, groups=groups, own_maps=own_maps)
    expected = results_and_gradients(functools.partial(definition, get_routes('cross').table(*size), 'sum'), inputs)
    with use_backend(cpu_backend):
        actual = results_and_gradients(functools.partial(selective_scan_2d, delta_softplus=True), inputs)
    assert_same_results(actual, expected, 1e-10, 1e-10)


@pytest.mark.parametrize('name', ['raster', 'raster_reverse', 'column', 'column_reverse'])
def test_single_routes(name, cpu_backend):
    inputs = make_inputs(2, 6, 5, 7, 3, routes=1)
    expected = results_and_gradients(functools.partial(definition, get_routes(name).table(5, 7), 'sum'), inputs)
    with use_backend(cpu_backend):
        scan = functools.partial(selective_scan_2d, routes=name, delta_softplus=True)
        assert_same_results(results_and_gradients(scan, inputs), expected, 1e-10, 1e-10)


@pytest.mark.parametrize('kind', ['object', 'int64 table', 'int32 table'])
def test_own_routes(kind, cpu_backend):
    routes = Routes((windows(3), windows(2), ROUTES['snake'].paths[1]))
    table = routes.table(7, 5)
    given = {'object': routes, 'int64 table': table.long(), 'int32 table': table}[kind]
    inputs = make_inputs(2, 6, 7, 5, 3, routes=3)
    expected = results_and_gradients(functools.partial(definition, table, 'sum'), inputs)
    with use_backend(cpu_backend):
        scan = functools.partial(selective_scan_2d, routes=given, delta_softplus=True)
        assert_same_results(results_and_gradients(scan, inputs), expected, 1e-10, 1e-10)


def test_channels_last_maps_give_the_same_result(cpu_backend):
    inputs = make_inputs(2, 18, 6, 7, 3)
    other = inputs | {'u': inputs['u'].contiguous(memory_format=torch.channels_last)}
    with use_backend(cpu_backend):
        scan = functools.partial(selective_scan_2d, delta_softplus=True)
        assert_same_results(results_and_gradients(scan, other), results_and_gradients(scan, inputs), 1e-12, 1e-12)


@pytest.mark.parametrize(('name', 'merge', 'groups', 'own_maps'), [
    ('cross', 'sum', None, False), ('cross', 'none', 2, True), ('diagonal', 'sum', 2, True),
    ('snake', 'none', None, False)])
def test_layout_of_maps_changes_no_bit_of_the_native_results(name, merge, groups, own_maps):
    inputs = make_inputs(2, 40, 9, 10, 9, groups=groups, own_maps=own_maps, dtype=torch.float32)
    other = {key: x.movedim(-3, -1).contiguous().movedim(-1, -3) if x.ndim > 2 else x for key, x in inputs.items()}
    with use_backend('native'):
        scan = functools.partial(selective_scan_2d, routes=name, merge=merge, delta_softplus=True)
        planar, innermost = (results_and_gradients(scan, maps) for maps in (inputs, other))
    assert all(torch.equal(x, innermost[key]) for key, x in planar.items())


def test_half_precision_rounds_after_the_merge(cpu_backend):
    inputs = make_inputs(1, 16, 8, 9, 1, dtype=torch.float32)
    half = {name: x.bfloat16() if x.ndim > 2 else x for name, x in inputs.items()}
    with use_backend(cpu_backend):
        y = selective_scan_2d(**half, delta_softplus=True)
        expected = selective_scan_2d(**{name: x.float() for name, x in half.items()}, delta_softplus=True)
    assert y.dtype == torch.bfloat16
    assert_close_rms(y, expected.bfloat16(), 1e-4, 'y')


def test_forward_only_calls_work_under_inference_mode(cpu_backend):
    inputs = make_inputs(1, 4, 3, 13, 2)
    with use_backend(cpu_backend):
        expected = selective_scan_2d(**inputs)
        with torch.inference_mode():
            assert torch.equal(selective_scan_2d(**inputs), expected)


def test_empty_batch(cpu_backend):
    inputs = {name: x.requires_grad_() for name, x in make_inputs(0, 4, 3, 5, 2).items()}
    with use_backend(cpu_backend):
        y = selective_scan_2d(**inputs)
        y.sum().backward()
    assert y.shape == (0, 4, 3, 5) and not inputs['A'].grad.any()


@pytest.mark.parametrize(('change', 'error', 'message'), [
    ({'u': torch.zeros(1, 4, 6)}, ValueError, r'u must be \(B, D, H, W\), or \(B, K, D, H, W\)'),
    ({'u': torch.zeros(1, 3, 4, 2, 3)}, ValueError, r'u must be \(B, K, D, H, W\) = \(1, 4, 4, 2, 3\), got \(1, 3, '),
    ({'delta': torch.zeros(1, 1, 4, 2, 3)}, ValueError, r'delta must be .* = \(1, 4, 4, 2, 3\), got \(1, 1, 4, 2, 3\)'),
    ({'A': torch.zeros(4, 2)}, ValueError, r'A must be \(K \* D, N\) = \(16, 2\), got \(4, 2\)'),
    ({'B': torch.zeros(1, 4, 3, 2, 2, 3)}, ValueError, 'the 3 groups of B must divide the 4 channels'),
    ({'D': torch.zeros(4)}, ValueError, r'D must be \(K \* D,\) = \(16\), got \(4\)'),
    ({'merge': 'max'}, ValueError, "merge must be one of sum, mean, none, step, got 'max'"),
    ({'routes': 'spiral'}, ValueError, "unknown name 'spiral'"),
    ({'routes': torch.zeros(4, 6, dtype=torch.int32)}, ValueError, 'are no permutations'),
    ({'routes': ['raster'] * 4}, TypeError, 'routes must be a name, .* got list'),
    ({'routes': torch.arange(5)[None]}, ValueError, r'L = H \* W = 6; got \(1, 5\)'),
], ids=['u rank', 'u maps', 'delta', 'A', 'groups', 'D', 'merge', 'name', 'permutation', 'list', 'table size'])
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        selective_scan_2d(**(make_inputs(1, 4, 2, 3, 2, dtype=torch.float32) | change))


@pytest.mark.parametrize('table', [[[0, 1, 2, 3, 4, 6]], [[-1, 1, 2, 3, 4, 5]], [[0, 0, 2, 3, 4, 5]]],
                         ids=['beyond', 'negative', 'twice'])
def test_op_refuses_tables_that_do_not_visit_each_pixel_once(table, cpu_backend):
    inputs = make_inputs(1, 4, 2, 3, 2, routes=1)
    with use_backend(cpu_backend), pytest.raises(ValueError, match='each of the numbers 0..5 once'):
        torch.ops.visionssm.selective_scan_2d(**inputs, table=torch.tensor(table))


def test_a_table_that_changes_is_looked_at_again(cpu_backend):
    inputs = make_inputs(1, 4, 2, 3, 2, routes=1)
    table = torch.arange(6, dtype=torch.int32)[None].clone()
    with use_backend(cpu_backend):
        for _ in range(2):
            torch.ops.visionssm.selective_scan_2d(**inputs, table=table)
        table[0, 0] = 9
        with pytest.raises(ValueError, match='each of the numbers 0..5 once'):
            torch.ops.visionssm.selective_scan_2d(**inputs, table=table)
