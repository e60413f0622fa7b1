"""The Triton form of nc_ssd against the reference: on an accelerator, or with TRITON_INTERPRET=1 in the interpreter."""
import functools

import pytest
import torch

from visionssm_kernels import nc_ssd, set_strict, use_backend
from visionssm_kernels._testing import assert_same_results, nc_ssd_inputs, results_and_gradients

pytestmark = [pytest.mark.interp, pytest.mark.gpu, pytest.mark.usefixtures('poisoned_memory')]

# B, L, M, P, G, N: tiles are of 16 to 32 positions, states and values
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 17, 4, 5, 2, 3), (1, 33, 2, 34, 1, 35), (2, 5, 3, 2, 3, 2)]


@pytest.fixture(autouse=True)
def _strict():
    set_strict(True)
    yield
    set_strict(None)


def compare(inputs, bounds, **options):
    """Compares output and gradients with the reference, which computes in at least float32."""
    call = functools.partial(nc_ssd, **options)
    exact = {name: x if x.dtype == torch.float64 else x.float() for name, x in inputs.items()}
    with use_backend('reference'):
        expected = results_and_gradients(call, exact)
    with use_backend('triton'):
        actual = results_and_gradients(call, inputs)
    assert actual['out0'].dtype == inputs['x'].dtype and actual['out0'].is_contiguous()
    assert_same_results(actual, expected, *bounds)


@pytest.mark.parametrize('positive', [True, False], ids=['positive', 'negative'])
@pytest.mark.parametrize('shape', SHAPES, ids=lambda s: 'B{}-L{}-M{}-P{}-G{}-N{}'.format(*s))
def test_results_and_gradients_equal_the_reference_in_float64(shape, positive, device):
    compare(nc_ssd_inputs(*shape, dtype=torch.float64, device=device), (1e-10, 1e-10), positive=positive)


def test_the_skip_may_be_absent_and_tensors_may_have_any_strides(device):
    inputs = nc_ssd_inputs(2, 9, 4, 3, 2, 5, extras=False, dtype=torch.float64, device=device)
    strided = {name: x.transpose(1, -1).contiguous().transpose(1, -1) if x.ndim > 1 else x
               for name, x in inputs.items()}
    compare(strided, (1e-10, 1e-10))


def test_long_sums_are_cut_into_parts(device, monkeypatch):
    from visionssm_kernels.nc_ssd import triton_impl
    monkeypatch.setattr(triton_impl, 'PART', 20)
    compare(nc_ssd_inputs(2, 45, 2, 3, 1, 4, dtype=torch.float64, device=device), (1e-10, 1e-10))


@pytest.mark.parametrize(('dtype', 'bounds'), [
    (torch.float32, (1e-5, 1e-5)), (torch.bfloat16, (5e-3, 1e-2)), (torch.float16, (2e-3, 5e-3))],
    ids=['fp32', 'bf16', 'fp16'])
def test_results_and_gradients_are_close_in_lower_precision(dtype, bounds, device):
    compare(nc_ssd_inputs(1, 19, 4, 6, 2, 5, dtype=dtype, device=device), bounds)


def test_results_are_the_same_in_every_run(device):
    inputs = nc_ssd_inputs(1, 19, 4, 6, 2, 5, device=device)
    with use_backend('triton'):
        first, second = (results_and_gradients(nc_ssd, inputs) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
