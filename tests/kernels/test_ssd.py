"""The scan of Mamba-2: golden fixtures, gradcheck of the definition, every CPU backend against it, and the 2-D form."""
import functools
import json
import math

import pytest
import torch
from safetensors import safe_open

from visionssm_kernels import ROUTES, cross_merge, cross_scan, set_strict, ssd, ssd_2d, use_backend
from visionssm_kernels._testing import assert_close_rms, assert_same_results, results_and_gradients, ssd_inputs
from visionssm_kernels.ssd import chunked, reference

pytestmark = pytest.mark.usefixtures('poisoned_memory')

FIXTURES = ('basic_L48_c16', 'groups2_init_z_L37_c16', 'minimal_L32_c8')
# B, L, M, P, G, N
SIZES = [(1, 1, 1, 1, 1, 1), (2, 17, 4, 3, 2, 5), (1, 63, 6, 8, 3, 16), (2, 130, 3, 5, 1, 1), (1, 257, 2, 4, 2, 3)]
SEQUENCES = ('x', 'dt', 'B', 'C', 'z')


@pytest.fixture(params=['chunked', 'reference'])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on the CPU."""
    return request.param


@pytest.fixture(autouse=True)
def _strict():
    set_strict(True)
    yield
    set_strict(None)


def scan(**inputs):
    return ssd(**inputs, dt_softplus=True, return_final_states=True)


def plain_definition(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, dt_limit=(0., math.inf)):
    """The recurrence written out once more, apart from the package; differentiated by autograd."""
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    dt = torch.nn.functional.softplus(dt if dt_bias is None else dt + dt_bias).clamp(*dt_limit)
    state = torch.zeros_like(torch.einsum('bmp,bmn->bmpn', x[:, 0], B[:, 0]))
    state, ys = state if initial_states is None else initial_states, []
    for l in range(x.shape[1]):
        drive = torch.einsum('bm,bmp,bmn->bmpn', dt[:, l], x[:, l], B[:, l])
        state = torch.exp(dt[:, l] * A)[..., None, None] * state + drive
        ys.append(torch.einsum('bmpn,bmn->bmp', state, C[:, l]))
    y = torch.stack(ys, 1) + (0 if D is None else D.view(D.shape[0], -1) * x)
    return y if z is None else y * torch.nn.functional.silu(z), state


@pytest.mark.parametrize('name', FIXTURES)
@pytest.mark.parametrize('precision', ['float32', 'float64'])
def test_golden_fixture(name, precision, backend, operator_fixture):
    with safe_open(operator_fixture(f'ssd__{name}.safetensors'), 'pt') as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        meta = file.metadata()
    tolerance, config = json.loads(meta['tolerance']), json.loads(meta['config'])
    suffix, dtype = ('64', torch.float64) if precision == 'float64' else ('', torch.float32)
    inputs = {key[3:]: x.to(dtype).requires_grad_() for key, x in tensors.items() if key.startswith('in.')}
    low, high = config['dt_limit']
    with use_backend(backend):
        outputs = ssd(**inputs, dt_softplus=config['dt_softplus'], return_final_states=True,
                      dt_limit=(low, math.inf if high is None else high))
        weights = [tensors[f'loss_weight.{key}'].to(dtype) for key in ('y', 'final_states')]
        grads = torch.autograd.grad(outputs, list(inputs.values()), weights)
    atol, rtol = (1e-10, 0) if suffix else (tolerance['atol'], tolerance['rtol'])
    for key, out in zip(('y', 'final_states'), outputs):
        torch.testing.assert_close(out, tensors[f'out{suffix}.{key}'], atol=atol, rtol=rtol)
    for key, grad in zip(inputs, grads):
        expected = tensors[f'grad{suffix}.{key}']
        bound = 1e-10 if suffix else tolerance['grad_rel_to_max'] * expected.abs().max().item()
        torch.testing.assert_close(grad, expected, atol=bound, rtol=1e-10 if suffix else 0,
                                   msg=lambda m, key=key: f'{key}: {m}')


@pytest.mark.parametrize('extras', [True, False], ids=['extras', 'plain'])
def test_reference_gradcheck(extras):
    leaves = [x.requires_grad_() for x in ssd_inputs(2, 5, 4, 2, 2, 3, extras, torch.float64).values()]

    def function(x, dt, A, B, C, D=None, z=None, dt_bias=None, states=None):
        return ssd(x, dt, A, B, C, D, z, dt_bias, True, initial_states=states, return_final_states=True)

    with use_backend('reference'):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize('limit', [(0., math.inf), (0.3, 1.2)], ids=['free', 'clamped'])
@pytest.mark.parametrize('extras', [True, False], ids=['extras', 'plain'])
def test_every_backend_is_the_plain_definition(extras, limit, backend):
    inputs = ssd_inputs(2, 70, 6, 4, 3, 5, extras, torch.float64)
    if extras:
        inputs['D'] = inputs['D'][:, 0].clone()
    expected = results_and_gradients(functools.partial(plain_definition, dt_limit=limit), inputs)
    with use_backend(backend):
        actual = results_and_gradients(functools.partial(scan, dt_limit=limit), inputs)
    assert_same_results(actual, expected, 1e-12, 1e-12)


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=['f64', 'f32'])
@pytest.mark.parametrize('size', SIZES, ids=lambda s: 'B{}-L{}-M{}-P{}-G{}-N{}'.format(*s))
def test_chunks_agree_with_reference(size, dtype, bound):
    for extras, reverse in ((True, False), (False, True)):
        inputs = ssd_inputs(*size, extras, dtype)
        with use_backend('reference'):
            expected = results_and_gradients(functools.partial(scan, reverse=reverse), inputs)
        with use_backend('chunked'):
            actual = results_and_gradients(functools.partial(scan, reverse=reverse), inputs)
        assert_same_results(actual, expected, bound, bound)


@pytest.mark.parametrize('chunk', [1, 7, 16, 50])
def test_results_do_not_depend_on_the_length_or_grouping_of_chunks(chunk, monkeypatch):
    tensors = list(ssd_inputs(2, 50, 4, 3, 2, 5, dtype=torch.float64).values())
    flags = (True, 0.1, 3., False)
    dout, dstates = torch.randn_like(tensors[0]), torch.randn_like(tensors[8])
    results = []
    for size, elements in ((None, 1 << 20), (chunk, 2 * 2 * 4 * chunk ** 2)):
        monkeypatch.setattr(chunked, '_ELEMENTS', elements)  # two chunks at a time
        out, states, starts = chunked.forward(*tensors, *flags, chunk=size)
        results.append((out, states, *chunked.backward(dout, dstates, *tensors, starts, *flags, chunk=size)))
    for i, (actual, expected) in enumerate(zip(*results)):
        assert_close_rms(actual, expected, 1e-12, f'result {i}')


@pytest.mark.parametrize('length', [1, 63, 64, 65, 130, 197, 3136])
def test_chunks_are_of_like_length(length):
    size = reference.chunk_length(length)
    chunks = -(-length // size)
    assert size <= 64 and chunks == -(-length // 64) and chunks * size - length < chunks


def test_chunk_states_of_one_backend_serve_the_other():
    tensors, flags = list(ssd_inputs(2, 130, 4, 3, 2, 5, dtype=torch.float64).values()), (True, 0., math.inf, True)
    starts = [module.forward(*tensors, *flags)[2] for module in (chunked, reference)]
    assert_close_rms(*starts, 1e-12, 'starts')


@pytest.mark.parametrize(('dtype', 'out_bound', 'grad_bound'), [
    (torch.bfloat16, 5e-3, 1e-2), (torch.float16, 2e-3, 5e-3)], ids=['bf16', 'f16'])
def test_half_precision_accumulates_in_float32(dtype, out_bound, grad_bound, backend):
    inputs = ssd_inputs(2, 70, 4, 8, 2, 4, dtype=dtype)
    with use_backend('reference'):
        expected = results_and_gradients(scan, {name: x.float() for name, x in inputs.items()})
    with use_backend(backend):
        actual = results_and_gradients(scan, inputs)
    assert actual['out0'].dtype == dtype and actual['out1'].dtype == torch.float32
    assert {name: actual[f'grad_{name}'].dtype for name in inputs} == {name: x.dtype for name, x in inputs.items()}
    assert_same_results(actual, expected, out_bound, grad_bound)


def test_reverse_equals_flipping_everything(backend):
    inputs = ssd_inputs(2, 70, 4, 3, 2, 5, dtype=torch.float64)
    flipped = {name: x.flip(1) if name in SEQUENCES else x for name, x in inputs.items()}
    with use_backend(backend):
        y, state = scan(**inputs, reverse=True)
        y_flipped, state_flipped = scan(**flipped)
    assert_close_rms(y, y_flipped.flip(1), 1e-12, 'y')
    assert_close_rms(state, state_flipped, 1e-12, 'final_states')


def test_strides_do_not_matter(backend):
    inputs = ssd_inputs(2, 20, 4, 3, 2, 5, dtype=torch.float64)
    strided = {name: x.transpose(1, -1).contiguous().transpose(1, -1) if name in SEQUENCES else x
               for name, x in inputs.items()}
    strided['B'], inputs['B'] = inputs['B'][:, :1].expand(-1, 20, -1, -1), inputs['B'][:, :1].repeat(1, 20, 1, 1)
    with use_backend(backend):
        assert_same_results(results_and_gradients(scan, strided), results_and_gradients(scan, inputs), 1e-12, 1e-12)


@pytest.mark.parametrize('extreme', ['zero A', 'huge A', 'huge dt', 'very negative dt', 'one huge step', 'growth'])
def test_extreme_rates_agree_with_reference(extreme, backend):
    inputs = ssd_inputs(1, 66, 3, 4, 1, 3)
    if extreme == 'growth':
        inputs['A'] = -inputs['A'] / 40
    inputs['A'] = {'zero A': inputs['A'] * 0, 'huge A': inputs['A'] * 1e6}.get(extreme, inputs['A'])
    inputs['dt'] = {'huge dt': inputs['dt'].abs() * 1e4, 'very negative dt': -inputs['dt'].abs() * 1e4}.get(
        extreme, inputs['dt'])
    if extreme == 'one huge step':
        inputs['dt'][:, 5] = 1e6
    exact = {name: x.double() for name, x in inputs.items()}
    with use_backend('reference'):
        expected = results_and_gradients(scan, exact)
    with use_backend(backend):
        actual = results_and_gradients(scan, inputs)
    assert all(x.isfinite().all() for x in actual.values())
    assert_same_results(actual, expected, 1e-5, 2e-5)


def test_an_infinite_step_wipes_the_state_and_makes_no_nan(backend):
    inputs = ssd_inputs(1, 20, 2, 3, 1, 2, extras=False)
    inputs['A'] = torch.tensor([-1., -torch.inf])
    with use_backend(backend):
        assert ssd(**inputs, dt_softplus=True).isfinite().all()


@pytest.mark.parametrize('wanted', [('x',), ('A', 'D'), ('B', 'initial_states'), ('z', 'dt_bias')], ids='-'.join)
def test_gradients_of_a_subset_equal_those_of_all(wanted, backend):
    inputs = ssd_inputs(2, 20, 4, 3, 2, 5, dtype=torch.float64)
    with use_backend(backend):
        everything, subset = results_and_gradients(scan, inputs), results_and_gradients(scan, inputs, wanted)
    assert set(subset) == {'out0', 'out1', *(f'grad_{name}' for name in wanted)}
    assert all(torch.equal(x, everything[name]) for name, x in subset.items())


def test_a_sequence_in_two_parts_is_the_whole_one(backend):
    inputs = ssd_inputs(2, 90, 4, 3, 2, 5, dtype=torch.float64)
    first, second = ({name: x[:, part] if name in SEQUENCES else x for name, x in inputs.items()}
                     for part in (slice(0, 33), slice(33, None)))
    with use_backend(backend):
        y, state = scan(**inputs)
        y_first, middle = scan(**first)
        y_second, end = scan(**second | {'initial_states': middle})
    assert_close_rms(torch.cat([y_first, y_second], 1), y, 1e-12, 'y')
    assert_close_rms(end, state, 1e-12, 'final_states')


def test_empty_batch_gives_empty_results_and_zero_parameter_gradients():
    inputs = {name: x.requires_grad_() for name, x in ssd_inputs(0, 9, 4, 3, 2, 5).items()}
    y, state = scan(**inputs)
    (y.sum() + state.sum()).backward()
    assert y.shape == (0, 9, 4, 3) and state.shape == (0, 4, 3, 5)
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs.values())


@pytest.mark.parametrize(('change', 'error', 'message'), [
    ({'x': torch.zeros(2, 9, 4)}, ValueError, r'x must be \(B, L, M, P\), got \(2, 9, 4\)'),
    ({'dt': torch.zeros(2, 9, 3)}, ValueError, r'dt must be \(B, L, M\) = \(2, 9, 4\), got \(2, 9, 3\)'),
    ({'A': torch.zeros(3)}, ValueError, r'A must be \(M,\) = \(4\), got \(3\)'),
    ({'B': torch.zeros(2, 9, 3, 5)}, ValueError, 'the 3 groups of B and C must divide the 4 heads of x'),
    ({'C': torch.zeros(2, 9, 2, 4)}, ValueError, r'C must be \(B, L, G, N\) = \(2, 9, 2, 5\), got \(2, 9, 2, 4\)'),
    ({'D': torch.zeros(4, 2)}, ValueError, r'D must be \(M, P\) = \(4, 3\), got \(4, 2\)'),
    ({'initial_states': torch.zeros(2, 4, 5, 3)}, ValueError, r'initial_states must be \(B, M, P, N\) = '),
    ({'dt_limit': (2., 1.)}, ValueError, r'dt_limit must be \(smallest, largest step\), got \(2.0, 1.0\)'),
    ({'z': torch.zeros(2, 9, 4, 3).double()}, TypeError, 'z is float64, but x is float32'),
], ids=['x', 'dt', 'A', 'groups', 'C', 'D', 'states', 'limit', 'float64'])
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        ssd(**ssd_inputs(2, 9, 4, 3, 2, 5) | change)


def inputs_2d(batch=2, heads=4, channels=3, groups=2, state=2, size=(5, 6), routes=4, dtype=torch.float64):
    make = functools.partial(torch.randn, dtype=dtype)
    return {'x': make(batch, heads, channels, *size), 'dt': make(batch, routes, heads, *size),
            'A': -torch.rand(routes * heads, dtype=dtype), 'B': make(batch, routes, groups, state, *size),
            'C': make(batch, routes, groups, state, *size), 'D': make(routes * heads),
            'dt_bias': make(routes * heads)}


def route_by_route(x, dt, A, B, C, D, dt_bias, routes, merge='sum'):
    """The 2-D scan as one 1-D scan a route."""
    heads, channels, height, width = x.shape[1:]
    ys = []
    for k in range(routes.shape[0]):
        def read(t, k=k):
            return cross_scan(t.flatten(1, -3), routes[k:k + 1])[:, 0].movedim(-1, 1).unflatten(-1, t.shape[1:-2])

        rows = slice(k * heads, (k + 1) * heads)
        y = plain_definition(
            read(x), read(dt[:, k]), A[rows], read(B[:, k]), read(C[:, k]), D[rows], None, dt_bias[rows])[0]
        ys.append(y.flatten(2).movedim(1, -1))
    return cross_merge(torch.stack(ys, 1), routes, merge, (height, width)).unflatten(-3, (heads, channels))


@pytest.mark.parametrize(('routes', 'merge'), [
    ('cross', 'sum'), ('rot90', 'mean'), ('snake', 'none'), ('cross', 'step'), ('raster', 'sum'),
    ('raster_reverse', 'sum')])
def test_2d_scan_is_one_scan_a_route(routes, merge, backend):
    inputs = inputs_2d(routes=len(ROUTES[routes]))
    table = ROUTES[routes].table(5, 6)
    expected = results_and_gradients(functools.partial(route_by_route, routes=table, merge=merge), inputs)
    for given in (routes, ROUTES[routes], table):
        with use_backend(backend):
            function = functools.partial(ssd_2d, routes=given, merge=merge, dt_softplus=True)
            assert_same_results(results_and_gradients(function, inputs), expected, 1e-12, 1e-12)
