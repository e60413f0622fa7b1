"""The Triton scan of Mamba-2 against the reference: on an accelerator, or in Triton's interpreter."""
import functools
import math

import pytest
import torch

from visionssm_kernels import set_strict, ssd, ssd_2d, use_backend
from visionssm_kernels._testing import assert_close_rms, assert_same_results, results_and_gradients, ssd_inputs
from visionssm_kernels.ssd import reference

pytestmark = [pytest.mark.interp, pytest.mark.gpu]

# B, L, M, P, G, N
SIZES = [(1, 1, 1, 1, 1, 1), (2, 17, 4, 3, 2, 5), (1, 70, 2, 17, 1, 33), (2, 9, 3, 16, 3, 16), (1, 130, 2, 5, 2, 1)]


@pytest.fixture(autouse=True)
def _poisoned_and_strict():
    """Unwritten outputs read as NaN; a silent fall-back to another backend is an error."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    set_strict(True)
    yield
    set_strict(None)
    torch.use_deterministic_algorithms(False)


def compare(inputs, bounds, **options):
    """Compares outputs and all gradients with those of the reference on the same numbers in float32 or float64."""
    scan = functools.partial(ssd, return_final_states=True, **options)
    exact = {name: x if x.dtype == torch.float64 else x.float() for name, x in inputs.items()}
    with use_backend('reference'):
        expected = results_and_gradients(scan, exact)
    with use_backend('triton'):
        actual = results_and_gradients(scan, inputs)
    assert actual['out0'].dtype == inputs['x'].dtype
    assert_same_results(actual, expected, *bounds)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('extras', [False, True], ids=['plain', 'extras'])
@pytest.mark.parametrize('size', SIZES, ids=lambda s: 'B{}-L{}-M{}-P{}-G{}-N{}'.format(*s))
def test_results_and_gradients_equal_the_reference_in_float64(size, extras, reverse, device):
    inputs = ssd_inputs(*size, extras, torch.float64, device)
    compare(inputs, (1e-10, 1e-10), dt_softplus=extras, reverse=reverse)


@pytest.mark.parametrize('given', ['D', 'z', 'dt_bias', 'initial_states'])
def test_every_option_works_by_itself(given, device):
    inputs = ssd_inputs(1, 9, 2, 3, 1, 2, True, torch.float64, device)
    inputs = {name: x for name, x in inputs.items() if name in ('x', 'dt', 'A', 'B', 'C', given)}
    compare(inputs, (1e-10, 1e-10), dt_softplus=True, dt_limit=(0.3, 1.1))


def test_wide_heads_and_states_take_several_tiles(device, monkeypatch):
    from visionssm_kernels.ssd import triton_impl
    monkeypatch.setattr(triton_impl, 'MAX_BLOCK', 16)
    monkeypatch.setattr(triton_impl, 'MAX_GRADIENT_BLOCK', 16)
    compare(ssd_inputs(1, 9, 2, 35, 1, 40, True, torch.float64, device), (1e-10, 1e-10), dt_softplus=True)


@pytest.mark.parametrize(('dtype', 'bounds'), [
    (torch.float32, (1e-5, 1e-5)), (torch.bfloat16, (5e-3, 1e-2)), (torch.float16, (2e-3, 5e-3))],
    ids=['fp32', 'bf16', 'fp16'])
def test_results_and_gradients_are_close_in_lower_precision(dtype, bounds, device):
    compare(ssd_inputs(1, 70, 2, 8, 1, 4, True, dtype, device), bounds, dt_softplus=True)


def test_sequences_may_have_any_strides(device):
    inputs = ssd_inputs(2, 9, 4, 3, 2, 5, True, torch.float64, device)
    for name in ('x', 'B', 'C', 'z', 'dt'):
        inputs[name] = inputs[name].transpose(1, -1).contiguous().transpose(1, -1)
    inputs['B'] = inputs['B'][:, :1].expand(-1, 9, -1, -1)
    compare(inputs, (1e-10, 1e-10), dt_softplus=True)


def test_gradient_of_the_output_may_have_any_strides_and_that_of_the_state_be_absent(device):
    from visionssm_kernels.ssd import triton_impl
    tensors = list(ssd_inputs(1, 9, 2, 3, 1, 2, True, torch.float64, device).values())
    tensors[6], flags = None, (True, 0., math.inf, True)
    dout = torch.randn((), dtype=torch.float64, device=device).expand(1, 9, 2, 3)
    results = []
    for backend in (triton_impl, reference):
        starts = backend.forward(*tensors, *flags)[2]
        results.append((starts, *backend.backward(dout, None, *tensors, starts, *flags)))
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert_close_rms(actual, expected, 1e-10, f'result {i}')


@pytest.mark.parametrize('extreme', ['huge A', 'one huge step', 'tiny steps'])
def test_extreme_steps_keep_their_precision(extreme, device):
    inputs = ssd_inputs(1, 20, 2, 3, 1, 2, False, torch.float32, device)
    if extreme == 'one huge step':
        inputs['dt'][:, 5] = 1e6
    inputs['A'] = inputs['A'] * (1e6 if extreme == 'huge A' else 1)
    inputs['dt'] = inputs['dt'] - (14 if extreme == 'tiny steps' else 0)
    compare(inputs, (1e-5, 1e-5), dt_softplus=True)


def test_results_are_the_same_in_every_run(device):
    inputs = ssd_inputs(1, 20, 2, 3, 1, 2, device=device)
    with use_backend('triton'):
        first, second = (results_and_gradients(ssd, inputs) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize(('routes', 'merge'), [('cross', 'sum'), ('raster_reverse', 'none')])
def test_2d_scan_runs_on_triton(routes, merge, device):
    count = 4 if routes == 'cross' else 1
    shapes = {'x': (1, 2, 3, 2, 4), 'dt': (1, count, 2, 2, 4), 'A': (2 * count,), 'B': (1, count, 2, 2, 4),
              'C': (1, count, 2, 2, 4), 'D': (2 * count,)}
    inputs = {name: torch.randn(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
    inputs['A'] = -inputs['A'].abs()
    scan = functools.partial(ssd_2d, routes=routes, merge=merge, dt_softplus=True)
    with use_backend('reference'):
        expected = results_and_gradients(scan, inputs)
    with use_backend('triton'):
        assert_same_results(results_and_gradients(scan, inputs), expected, 1e-10, 1e-10)
