"""The 1-D selective scan: golden fixtures, gradcheck of the reference, every CPU backend against the reference."""
import functools
import itertools
import json

import pytest
import torch
from safetensors import safe_open

from visionssm_kernels import selective_scan, set_strict, use_backend
from visionssm_kernels._testing import (
    assert_close_rms,
    assert_same_results,
    results_and_gradients,
    scan_inputs,
)
from visionssm_kernels.selective_scan import reference

pytestmark = pytest.mark.usefixtures('poisoned_memory')

FIXTURES = ('bf16_L40', 'const_BC_L21', 'groups4_N1_L33', 'plain_L17', 'z_laststate_L64')
SIZES = [(1, 1, 1, 1), (2, 5, 17, 3), (1, 24, 63, 16), (2, 33, 257, 17), (1, 40, 64, 1), (2, 16, 129, 5)]
# (groups of B, groups of C): None is (B, N, L), 0 constant over time
FORMS = {'shared': (None, None), 'grouped': (2, 2), 'mixed': (2, 1), 'constant-B': (0, None), 'constant-C': (2, 0),
         'constant': (0, 0)}


@pytest.fixture(autouse=True)
def _strict():
    set_strict(True)
    yield
    set_strict(None)


def plain_definition(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """mamba_ssm's definition written out once more, apart from the package; float64, differentiated by autograd."""
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = torch.nn.functional.softplus(step) if delta_softplus else step
    state, ys = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), []
    for l in range(u.shape[-1]):
        at = [x if x.ndim == 2 else x[..., l] if x.ndim == 3 else x.repeat_interleave(
            u.shape[1] // x.shape[1], 1)[..., l] for x in (B, C)]
        B_l, C_l = (x if x.ndim == 3 or m.ndim == 2 else x[:, None] for x, m in zip(at, (B, C)))
        state = torch.exp(step[..., l, None] * A) * state + (step * u)[..., l, None] * B_l
        ys.append((state * C_l).sum(-1))
    y = torch.stack(ys, -1) + (0 if D is None else D[:, None] * u)
    return y if z is None else y * torch.nn.functional.silu(z), state


@pytest.mark.parametrize('name', FIXTURES)
@pytest.mark.parametrize('precision', ['float32', 'float64'])
def test_golden_fixture(name, precision, cpu_backend, operator_fixture):
    with safe_open(operator_fixture(f'selective_scan__{name}.safetensors'), 'pt') as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        meta = file.metadata()
    tolerance, config = json.loads(meta['tolerance']), json.loads(meta['config'])
    suffix, dtype = ('64', torch.float64) if precision == 'float64' else ('', torch.float32)
    inputs = {key[3:]: x.to(dtype).requires_grad_() for key, x in tensors.items() if key.startswith('in.')}
    with use_backend(cpu_backend):
        y, last_state = selective_scan(**inputs, delta_softplus=config['delta_softplus'], return_last_state=True)
        grads = torch.autograd.grad(y, list(inputs.values()), tensors['loss_weight'].to(dtype))
    atol, rtol = (1e-10, 0) if suffix else (tolerance['atol'], tolerance['rtol'])
    torch.testing.assert_close(y, tensors[f'out{suffix}.y'], atol=atol, rtol=rtol)
    torch.testing.assert_close(last_state, tensors[f'out{suffix}.last_state'], atol=atol, rtol=rtol)
    for key, grad in zip(inputs, grads):
        expected = tensors[f'grad{suffix}.{key}']
        bound = 1e-10 if suffix else tolerance['grad_rel_to_max'] * expected.abs().max().item()
        rtol = 1e-10 if suffix else 0
        torch.testing.assert_close(grad, expected, atol=bound, rtol=rtol, msg=lambda m, k=key: f'{k}: {m}')


def test_half_precision_fixture_rounds_once(cpu_backend, operator_fixture):
    with safe_open(operator_fixture('selective_scan__bf16_L40.safetensors'), 'pt') as file:
        inputs = {key[3:]: file.get_tensor(key) for key in file.keys() if key.startswith('in.')}
        expected = file.get_tensor('out.y_cast')
    with use_backend(cpu_backend):
        y = selective_scan(**inputs, delta_softplus=True)
    assert y.dtype == torch.bfloat16
    # one unit in the last place where float32 sums of another order fall on the other side of a rounding edge
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=2 ** -7)


@pytest.mark.parametrize('form', FORMS)
def test_reference_gradcheck(form):
    inputs = scan_inputs(2, 4, 5, 2, *FORMS[form], dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    with use_backend('reference'):
        assert torch.autograd.gradcheck(
            lambda *args: selective_scan(*args, delta_softplus=True, return_last_state=True), leaves)


@pytest.mark.parametrize('form', FORMS)
def test_reference_is_the_plain_definition(form):
    inputs = scan_inputs(2, 6, 70, 3, *FORMS[form], dtype=torch.float64)
    expected = results_and_gradients(functools.partial(plain_definition, delta_softplus=True), inputs)
    with use_backend('reference'):
        actual = results_and_gradients(
            functools.partial(selective_scan, delta_softplus=True, return_last_state=True), inputs)
    assert_same_results(actual, expected, 1e-12, 1e-12)


@pytest.mark.parametrize('cpu_backend', ['native', 'chunked'], indirect=True)
@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=['f64', 'f32'])
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('size', SIZES, ids=lambda s: 'B{}-D{}-L{}-N{}'.format(*s))
def test_backend_agrees_with_reference(size, form, dtype, bound, cpu_backend):
    groups = FORMS[form] if size[1] % 2 == 0 else tuple(1 if g == 2 else g for g in FORMS[form])
    for extras, reverse in ((True, False), (False, True)):
        inputs = scan_inputs(*size, *groups, extras=extras, dtype=dtype)
        scan = functools.partial(selective_scan, delta_softplus=extras, return_last_state=True, reverse=reverse)
        if not extras:
            inputs['delta'] = inputs['delta'].abs()
        with use_backend('reference'):
            expected = results_and_gradients(scan, inputs)
        with use_backend(cpu_backend):
            assert_same_results(results_and_gradients(scan, inputs), expected, bound, bound)


@pytest.mark.parametrize(('dtype', 'out_bound', 'grad_bound'), [
    (torch.bfloat16, 5e-3, 1e-2), (torch.float16, 2e-3, 5e-3)], ids=['bf16', 'f16'])
def test_half_precision_accumulates_in_float32(dtype, out_bound, grad_bound, cpu_backend):
    inputs = scan_inputs(2, 24, 130, 4, dtype=dtype)
    scan = functools.partial(selective_scan, delta_softplus=True, return_last_state=True)
    with use_backend('reference'):
        expected = results_and_gradients(scan, {name: x.float() for name, x in inputs.items()})
    with use_backend(cpu_backend):
        actual = results_and_gradients(scan, inputs)
    assert actual['out0'].dtype == dtype and actual['out1'].dtype == torch.float32
    assert {name: actual[f'grad_{name}'].dtype for name in inputs} == {name: x.dtype for name, x in inputs.items()}
    assert_same_results(actual, expected, out_bound, grad_bound)


def test_reverse_equals_flipping_everything(cpu_backend):
    inputs = scan_inputs(2, 7, 65, 3, dtype=torch.float64)
    flipped = {name: x.flip(-1) if name in ('u', 'delta', 'z', 'B', 'C') else x for name, x in inputs.items()}
    with use_backend(cpu_backend):
        y, state = selective_scan(**inputs, delta_softplus=True, return_last_state=True, reverse=True)
        y_flipped, state_flipped = selective_scan(**flipped, delta_softplus=True, return_last_state=True)
    assert_close_rms(y, y_flipped.flip(-1), 1e-12, 'y')
    assert_close_rms(state, state_flipped, 1e-12, 'last_state')


@pytest.mark.parametrize('layout', ['channel-last', 'sliced', 'expanded'])
def test_strides_do_not_matter(layout, cpu_backend):
    inputs = scan_inputs(2, 33, 70, 4, dtype=torch.float64)
    if layout == 'expanded':
        inputs |= {'u': inputs['u'][:, :1].expand(-1, 33, -1), 'B': inputs['B'][:1].expand(2, -1, -1),
                   'delta': inputs['delta'][:, :, :1].expand(-1, -1, 70)}
    other = dict(inputs)
    for name in ('u', 'delta', 'z', 'B', 'C'):
        x = inputs[name]
        if layout == 'channel-last':
            other[name] = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == 'sliced':
            other[name] = torch.cat([x, x], -1)[..., :70]
        inputs[name] = x.contiguous()
    with use_backend(cpu_backend):
        y, y_other = (selective_scan(**kwargs, delta_softplus=True) for kwargs in (inputs, other))
        dout = torch.randn(2, 70, 33, dtype=torch.float64).transpose(1, 2)
        grads = []
        for kwargs in (inputs, other):
            leaves = {name: x.detach().requires_grad_() for name, x in kwargs.items()}
            grads.append(torch.autograd.grad(selective_scan(**leaves), list(leaves.values()), dout))
    assert_close_rms(y_other, y, 1e-12, 'y')
    for a, b in zip(*grads):
        assert_close_rms(a, b, 1e-12, 'gradient')


@pytest.mark.parametrize('extreme', ['zero A', 'huge A', 'zero delta', 'huge delta', 'very negative delta'])
def test_extreme_rates_agree_with_reference(extreme, cpu_backend):
    inputs = scan_inputs(1, 17, 66, 3)
    inputs['A'] = {'zero A': inputs['A'] * 0, 'huge A': inputs['A'] * 1e6}.get(extreme, inputs['A'])
    inputs['delta'] = {'zero delta': inputs['delta'] * 0, 'huge delta': inputs['delta'].abs() * 1e4,
                       'very negative delta': -inputs['delta'].abs() * 1e4}.get(extreme, inputs['delta'])
    scan = functools.partial(selective_scan, delta_softplus=True)
    with use_backend('reference'):
        expected = results_and_gradients(scan, inputs)
    with use_backend(cpu_backend):
        actual = results_and_gradients(scan, inputs)
    assert all(x.isfinite().all() for x in actual.values())
    assert_same_results(actual, expected, 1e-5, 1e-5)


def test_nan_spreads_as_in_the_reference(cpu_backend):
    inputs = scan_inputs(1, 20, 70, 2)
    inputs['delta'][0, 3, 40] = torch.nan
    with use_backend(cpu_backend):
        y = selective_scan(**inputs, delta_softplus=True)
    nan = torch.zeros(20, 70, dtype=torch.bool)
    nan[3, 40:] = True
    assert torch.equal(y[0].isnan(), nan)


@pytest.mark.parametrize('wanted', [('u',), ('A', 'D'), ('B',), ('C', 'z'), ('delta', 'delta_bias')], ids='-'.join)
def test_gradients_of_a_subset_equal_those_of_all(wanted, cpu_backend):
    inputs = scan_inputs(2, 9, 20, 3, dtype=torch.float64)
    scan = functools.partial(selective_scan, delta_softplus=True)
    with use_backend(cpu_backend):
        everything = results_and_gradients(scan, inputs)
        subset = results_and_gradients(scan, inputs, wanted)
    assert set(subset) == {'out0', *(f'grad_{name}' for name in wanted)}
    assert all(torch.equal(x, everything[name]) for name, x in subset.items())


def test_gradient_of_the_last_state_alone(cpu_backend):
    inputs = scan_inputs(2, 5, 70, 3, dtype=torch.float64)

    def last_state(**kwargs):
        return selective_scan(**kwargs, delta_softplus=True, return_last_state=True)[1]

    def reference_state(**kwargs):
        args = {name: x[None] if x.ndim < 3 else x[:, None, None] if name in 'BC' else x[:, None]
                for name, x in kwargs.items()}
        return reference.forward(**args, index=None, delta_softplus=True, reverse=False, merge=False)[1][:, 0]

    with use_backend(cpu_backend):
        actual = results_and_gradients(last_state, inputs, [n for n in inputs if n not in ('C', 'D', 'z')])
    expected = results_and_gradients(reference_state, inputs, [n for n in inputs if n not in ('C', 'D', 'z')])
    assert_same_results(actual, expected, 1e-12, 1e-11)


def test_backward_twice_gives_equal_gradients(cpu_backend):
    inputs = [x.requires_grad_() for x in scan_inputs(2, 24, 70, 4).values()]
    with use_backend(cpu_backend):
        y = selective_scan(*inputs, delta_softplus=True)
        first, second = (torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_tensor_used_twice_gets_both_gradients(cpu_backend):
    inputs = scan_inputs(1, 6, 20, 6, dtype=torch.float64, extras=False)
    with use_backend(cpu_backend):
        apart = results_and_gradients(selective_scan, inputs | {'u': inputs['delta']})
        shared = inputs['delta'].clone().requires_grad_()
        y = selective_scan(shared, shared, inputs['A'], inputs['B'], inputs['C'])
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        grad, = torch.autograd.grad(y, shared, weight)
    torch.testing.assert_close(grad, apart['grad_u'] + apart['grad_delta'])


def test_gradients_cross_backends():
    inputs = scan_inputs(2, 20, 130, 3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    results = []
    for forward, backward in itertools.product(['chunked', 'reference'], repeat=2):
        with use_backend(forward):
            y = selective_scan(*leaves, delta_softplus=True)
        with use_backend(backward):
            results.append(torch.autograd.grad(y.sum(), leaves))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert_close_rms(b, a, 1e-12, 'gradient')


def test_empty_batch_gives_empty_results_and_zero_parameter_gradients():
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(0, 4, 9, 3).items()}
    y, state = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    (y.sum() + state.sum()).backward()
    assert y.shape == (0, 4, 9) and state.shape == (0, 4, 3)
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs.values())


@pytest.mark.parametrize(('change', 'error', 'message'), [
    ({'u': torch.zeros(2, 4)}, ValueError, r'u must be \(B, D, L\), got \(2, 4\)'),
    ({'delta': torch.zeros(2, 4, 8)}, ValueError, r'delta must be .* = \(2, 4, 9\), got \(2, 4, 8\)'),
    ({'A': torch.zeros(5, 3)}, ValueError, r'A must be \(D, N\) = \(4, 3\), got \(5, 3\)'),
    ({'B': torch.zeros(2, 3, 3, 9)}, ValueError, 'the 3 groups of B must divide the 4 channels of u'),
    ({'C': torch.zeros(2, 2, 9)}, ValueError, r'C must be \(B, N, L\) = \(2, 3, 9\), got \(2, 2, 9\)'),
    ({'D': torch.zeros(3)}, ValueError, r'D must be \(D,\) = \(4\), got \(3\)'),
    ({'z': torch.zeros(2, 4, 9).double()}, TypeError, 'z is float64, but u is float32; float64 cannot be mixed'),
    ({'B': torch.zeros(2, 3, 9, dtype=torch.int64)}, TypeError, r'B must be floating point .* got int64'),
    ({'C': torch.zeros(2, 3, 9, device='meta')}, ValueError, 'C is on meta, but u is on cpu'),
    ({n: torch.zeros(2, 3 if n in 'BC' else 4, 0) for n in ('u', 'delta', 'B', 'C', 'z')}, ValueError, 'L is 0'),
], ids=['u', 'delta', 'A', 'groups', 'C', 'D', 'float64', 'integer', 'device', 'L0'])
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**(scan_inputs(2, 4, 9, 3) | change))


def test_second_derivative_is_refused_with_the_way_out():
    u, *rest = scan_inputs(1, 2, 3, 2, extras=False).values()
    u.requires_grad_()
    grad, = torch.autograd.grad(selective_scan(u, *rest).square().sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match='no second derivative'):
        grad.sum().backward()
