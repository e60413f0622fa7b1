"""The Triton wavefront scan against the reference: on an accelerator, or with TRITON_INTERPRET=1 in the interpreter."""
import functools

import pytest
import torch

from visionssm_kernels import set_strict, use_backend, wavefront_scan_2d
from visionssm_kernels._testing import assert_same_results, results_and_gradients, wavefront_inputs

pytestmark = [pytest.mark.interp, pytest.mark.gpu, pytest.mark.usefixtures('poisoned_memory')]

# B, D, H, W, N
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 1, 5, 2), (1, 3, 9, 1, 3), (2, 3, 3, 3, 3), (1, 2, 2, 6, 1)]


@pytest.fixture(autouse=True)
def _strict():
    set_strict(True)
    yield
    set_strict(None)


def compare(inputs, bounds, **options):
    """Compares output and gradients with the reference, which computes in at least float32."""
    call = functools.partial(wavefront_scan_2d, **options)
    exact = {name: x if x.dtype == torch.float64 else x.float() for name, x in inputs.items()}
    with use_backend('reference'):
        expected = results_and_gradients(call, exact)
    with use_backend('triton'):
        actual = results_and_gradients(call, inputs)
    assert actual['out0'].dtype == inputs['u'].dtype
    assert_same_results(actual, expected, *bounds)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('shape', SHAPES, ids=lambda s: 'B{}-D{}-H{}-W{}-N{}'.format(*s))
def test_results_and_gradients_equal_the_reference_in_float64(shape, reverse, device):
    inputs = wavefront_inputs(*shape, dtype=torch.float64, device=device)
    compare(inputs, (1e-10, 1e-10), delta_softplus=True, reverse=reverse)


def test_options_may_be_absent_and_maps_may_have_any_strides(device):
    inputs = wavefront_inputs(1, 3, 2, 3, 2, extras=False, dtype=torch.float64, device=device)
    strided = {name: x.transpose(-2, -1).contiguous().transpose(-2, -1) for name, x in inputs.items()}
    compare(strided, (1e-10, 1e-10))


def test_tiles_are_cut_along_states_and_channels(device, monkeypatch):
    from visionssm_kernels.wavefront_scan_2d import triton_impl
    monkeypatch.setattr(triton_impl, 'TILE_BYTES', 64)
    monkeypatch.setattr(triton_impl, 'GROUP', 2)
    inputs = wavefront_inputs(1, 5, 2, 3, 3, dtype=torch.float64, device=device)
    compare(inputs, (1e-10, 1e-10), delta_softplus=True, reverse=True)


@pytest.mark.parametrize(('tile_bytes', 'shape'), [(4096, (2, 5, 2, 3, 3)), (64, (2, 3, 2, 2, 3))],
                         ids=['whole', 'parts'])
def test_channels_may_be_innermost_and_results_are_laid_out_as_their_maps(tile_bytes, shape, device, monkeypatch):
    from visionssm_kernels.wavefront_scan_2d import triton_impl
    monkeypatch.setattr(triton_impl, 'TILE_BYTES', tile_bytes)
    inputs = wavefront_inputs(*shape, dtype=torch.float64, device=device)
    # half of a projection, as in models: its gradient is dense all the same
    inputs = {name: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :x.shape[1]]
              if x.ndim == 4 else x for name, x in inputs.items()}
    compare(inputs, (1e-10, 1e-10), delta_softplus=True)
    out, checkpoints = triton_impl.forward(*inputs.values(), True, False)
    gradients = triton_impl.backward(torch.ones_like(out), *inputs.values(), checkpoints, True, False)
    for x, result in ((inputs['u'], out), *zip(inputs.values(), gradients, strict=True)):
        assert result.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(('dtype', 'bounds'), [
    (torch.float32, (1e-5, 1e-5)), (torch.bfloat16, (5e-3, 1e-2)), (torch.float16, (2e-3, 5e-3))],
    ids=['fp32', 'bf16', 'fp16'])
def test_results_and_gradients_are_close_in_lower_precision(dtype, bounds, device):
    compare(wavefront_inputs(1, 3, 3, 4, 2, dtype=dtype, device=device), bounds, delta_softplus=True)


def test_results_are_the_same_in_every_run(device):
    inputs = wavefront_inputs(1, 3, 2, 4, 2, device=device)
    with use_backend('triton'):
        first, second = (results_and_gradients(wavefront_scan_2d, inputs) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
