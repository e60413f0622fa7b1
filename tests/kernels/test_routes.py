"""Routes: permutations, closed forms, inverses, and the official tables."""
import pytest
import torch
from safetensors import safe_open

from visionssm_kernels import ROUTES, Routes, get_routes
from visionssm_kernels.selective_scan_2d.routes import check_table, reverse, windows

SIZES = [(1, 1), (1, 9), (7, 3), (6, 6), (17, 20)]
# the official numbers of the four-way scans
MODES = {'0': 'cross', '1': 'unidirectional', '2': 'bidirectional', '3': 'rot90'}
ALL = ROUTES | {'windows': Routes((windows(4), windows(3, by_column=True), reverse(windows(2))))}
FIXTURES = ['4x5', '6x6']


def load(path):
    with safe_open(path, 'pt') as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@pytest.mark.parametrize('size', SIZES, ids=lambda s: f'{s[0]}x{s[1]}')
@pytest.mark.parametrize('name', ALL)
def test_every_route_is_a_permutation_and_its_inverse_undoes_it(name, size):
    table, inverse = (make(*size).long() for make in (ALL[name].table, ALL[name].inverse))
    length = size[0] * size[1]
    assert table.shape == (len(ALL[name]), length)
    assert torch.equal(table.gather(1, inverse), torch.arange(length).expand_as(table))


@pytest.mark.parametrize('size', SIZES, ids=lambda s: f'{s[0]}x{s[1]}')
@pytest.mark.parametrize('name', [name for name, routes in ROUTES.items() if routes.affine(2, 3)])
def test_closed_form_equals_table(name, size):
    l = torch.arange(size[0] * size[1])
    forms = ROUTES[name].affine(*size)
    steps = [form.offset + l // form.inner * form.outer_stride + l % form.inner * form.inner_stride for form in forms]
    assert torch.equal(torch.stack(steps).int(), ROUTES[name].table(*size))


def test_routes_without_closed_form_say_so():
    assert ROUTES['snake'].affine(4, 5) is None
    assert len(ROUTES['cross'].affine(4, 5)) == 4


@pytest.mark.parametrize('grid', FIXTURES)
@pytest.mark.parametrize('mode', MODES)
def test_tables_equal_the_official_ones(mode, grid, operator_fixture):
    tensors = load(operator_fixture(f'cross_scan__{grid}.safetensors'))
    height, width = tensors['in.x'].shape[-2:]
    assert torch.equal(get_routes(MODES[mode]).table(height, width).long(), tensors[f'route.s{mode}'])


@pytest.mark.parametrize(('name', 'expected'), [
    ('snake', [0, 1, 2, 5, 4, 3]), ('diagonal', [0, 1, 3, 2, 4, 5]), ('column_reverse', [5, 2, 4, 1, 3, 0])])
def test_order_on_a_small_map(name, expected):
    assert get_routes(name).table(2, 3)[0].tolist() == expected


def test_windows_visit_one_window_after_the_other():
    table = Routes((windows(2),)).table(3, 4)[0].tolist()
    assert table == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]


def test_tables_are_built_once():
    assert get_routes('cross').table(5, 6) is get_routes('cross').table(5, 6)


def test_a_table_cached_under_inference_mode_serves_training():
    with torch.inference_mode():
        table = get_routes('snake').table(3, 11)
    assert not table.is_inference()


@pytest.mark.parametrize(('table', 'error', 'message'), [
    (torch.zeros(2, 6), TypeError, 'must be int32 or int64, got float32'),
    (torch.zeros(2, 5, dtype=torch.int32), ValueError, r'L = H \* W = 6; got \(2, 5\)'),
    (torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 4]]), ValueError, r'rows \[1\] of the table are no perm'),
], ids=['dtype', 'shape', 'repeated pixel'])
def test_bad_tables_are_explained(table, error, message):
    with pytest.raises(error, match=message):
        check_table(table, 6)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown name 'zigzag'; known: raster, "):
        get_routes('zigzag')


def test_windows_need_a_size():
    with pytest.raises(ValueError, match='size must be at least 1, got 0'):
        windows(0)


def test_paths_that_are_no_permutations_are_refused():
    with pytest.raises(ValueError, match='are no permutations'):
        Routes((lambda pixels: pixels.flatten() * 0,)).table(2, 3)


def test_routes_need_a_path():
    with pytest.raises(ValueError, match='paths is empty'):
        Routes(())


def test_a_table_on_the_meta_device_has_its_shape():
    table = ROUTES['cross'].table(3, 5, torch.device('meta'))
    assert table.is_meta and table.shape == (4, 15)
