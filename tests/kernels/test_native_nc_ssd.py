"""The native form of nc_ssd against products in float64: cuts of all axes, layouts, threads, instruction sets."""
import functools

import pytest
import torch

from visionssm_kernels import nc_ssd, set_strict, use_backend
from visionssm_kernels._native import INSTRUCTION_SETS, native_library
from visionssm_kernels._testing import assert_same_results, nc_ssd_inputs, results_and_gradients

pytestmark = pytest.mark.usefixtures('needs_native', 'poisoned_memory')

# B, L, M, P, G, N: tiles are of 6 or 12 rows and 8, 16 or 32 columns, spans of 64 columns, weighted blocks of 128
# positions, parts of about 256
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 17, 4, 5, 2, 3), (1, 131, 2, 64, 1, 64), (2, 40, 6, 35, 3, 33), (3, 7, 2, 130, 2, 70),
          (1, 21, 1, 100, 1, 17), (2, 300, 1, 16, 1, 20), (1, 1030, 3, 9, 1, 6), (9, 5, 2, 8, 2, 12)]


@pytest.fixture(autouse=True)
def _strict():
    set_strict(True)
    yield
    set_strict(None)


def shape_id(shape: tuple[int, ...]) -> str:
    return 'B{}-L{}-M{}-P{}-G{}-N{}'.format(*shape)


def native(inputs: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
    with use_backend('native'):
        return results_and_gradients(functools.partial(nc_ssd, **options), inputs)


def compare(inputs: dict[str, torch.Tensor], **options) -> None:
    """Compares output and gradients with the products of PyTorch in float64."""
    with use_backend('chunked'):
        expected = results_and_gradients(
            functools.partial(nc_ssd, **options), {name: x.double() for name, x in inputs.items()})
    assert_same_results(native(inputs, **options), expected, 1e-6, 2e-6)


@pytest.mark.parametrize('extras', [True, False], ids=['skip', 'plain'])
@pytest.mark.parametrize('positive', [True, False], ids=['positive', 'negative'])
@pytest.mark.parametrize('shape', SHAPES, ids=shape_id)
def test_results_and_gradients_equal_the_products_in_float64(shape, positive, extras):
    compare(nc_ssd_inputs(*shape, extras), positive=positive)


@pytest.mark.parametrize('isa', INSTRUCTION_SETS)
@pytest.mark.parametrize('shape', SHAPES, ids=shape_id)
def test_instruction_sets_agree(shape, isa, monkeypatch):
    monkeypatch.setenv('VISIONSSM_NATIVE_ISA', isa)
    compare(nc_ssd_inputs(*shape))


@pytest.mark.parametrize('layout', [
    lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1), lambda x: torch.cat([x, x, x], -1).chunk(3, -1)[1],
    lambda x: x[:, :1].expand_as(x), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: x.repeat_interleave(2, -1)[..., ::2],
], ids=['positions last', 'part of a wider tensor', 'expanded', 'positions first', 'with gaps'])
def test_tensors_may_have_any_strides(layout):
    inputs = {name: layout(x) if x.ndim > 1 else x for name, x in nc_ssd_inputs(2, 19, 6, 20, 2, 18).items()}
    compare(inputs)
    with use_backend('native'):
        assert nc_ssd(**inputs).is_contiguous()


@pytest.mark.parametrize('shape', [(1, 1030, 2, 64, 1, 20), (3, 131, 6, 35, 3, 33), (5, 40, 1, 9, 1, 6)], ids=shape_id)
def test_results_depend_neither_on_threads_nor_on_the_rest_of_the_batch(shape):
    inputs = nc_ssd_inputs(*shape)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(native(inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())
    last = {name: x[-1:] if x.ndim > 1 else x for name, x in inputs.items()}
    assert torch.equal(native(last)['out0'], results[0]['out0'][-1:])


def test_float64_is_left_to_the_products():
    inputs = nc_ssd_inputs(2, 17, 4, 5, 2, 3, dtype=torch.float64)
    with use_backend('chunked'):
        expected = results_and_gradients(nc_ssd, inputs)
    assert all(torch.equal(x, expected[name]) for name, x in native(inputs).items())


def test_a_lack_of_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(native_library(), 'visionssm_nc_ssd', lambda *args: 1)
    with pytest.raises(MemoryError, match=r'nc_ssd: no memory for the sums of x \(1, 9, 4, 5\)'):
        native(nc_ssd_inputs(1, 9, 4, 5, 2, 3))
