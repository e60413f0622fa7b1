"""nc_ssd: definition, gradients, official fixtures, backends against each other, layouts, dtypes, errors."""
import functools
import itertools

import pytest
import torch
from safetensors import safe_open

from visionssm_kernels import nc_ssd, set_strict, use_backend
from visionssm_kernels._testing import (
    assert_close_rms,
    assert_same_results,
    nc_ssd_inputs,
    relative_rms,
    results_and_gradients,
)

pytestmark = pytest.mark.usefixtures('poisoned_memory')

# B, L, M, P, G, N
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 17, 4, 5, 2, 3), (1, 63, 3, 8, 3, 4), (2, 49, 6, 7, 1, 9)]
BACKENDS = ('native', 'chunked', 'reference')


@pytest.fixture(autouse=True)
def _strict():
    set_strict(True)
    yield
    set_strict(None)


@pytest.fixture(params=[True, False], ids=['positive', 'negative'])
def positive(request) -> bool:
    return request.param


def shape_id(shape: tuple[int, ...]) -> str:
    return 'B{}-L{}-M{}-P{}-G{}-N{}'.format(*shape)


def mix(**options):
    return functools.partial(nc_ssd, **options)


def definition(x, dt, A, B, C, D, positive=True):
    """Attention of all positions to all: y_k = sum_l <C_k, B_l> w_l x_l + D x_k, head by head."""
    heads, groups, y = x.shape[2], B.shape[2], torch.empty_like(x)
    for m in range(heads):
        weights = dt[:, :, m] * (-A[m] if positive else A[m])
        scores = C[:, :, m % groups] @ B[:, :, m % groups].transpose(1, 2) * weights[:, None]
        y[:, :, m] = scores @ x[:, :, m] + D[m] * x[:, :, m]
    return y


@pytest.mark.parametrize('shape', SHAPES, ids=shape_id)
def test_all_positions_attend_to_all(shape, positive, cpu_backend):
    inputs = nc_ssd_inputs(*shape, dtype=torch.float64)
    with use_backend(cpu_backend):
        out = nc_ssd(**inputs, positive=positive)
    torch.testing.assert_close(out, definition(**inputs, positive=positive), atol=1e-10, rtol=1e-10)


def test_the_order_of_positions_does_not_matter(cpu_backend):
    inputs = nc_ssd_inputs(2, 17, 4, 5, 2, 3, dtype=torch.float64)
    order = torch.randperm(17)
    shuffled = {name: x[:, order] if x.ndim > 1 else x for name, x in inputs.items()}
    with use_backend(cpu_backend):
        torch.testing.assert_close(nc_ssd(**shuffled), nc_ssd(**inputs)[:, order], atol=1e-12, rtol=1e-12)


def test_gradients_of_the_reference_are_derivatives(positive):
    inputs = nc_ssd_inputs(2, 3, 4, 2, 2, 3, dtype=torch.float64)
    with use_backend('reference'):
        assert torch.autograd.gradcheck(mix(positive=positive), [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize('extras', [True, False], ids=['skip', 'plain'])
@pytest.mark.parametrize('shape', SHAPES, ids=shape_id)
def test_products_agree_with_the_reference_in_float64(shape, extras, positive):
    inputs = nc_ssd_inputs(*shape, extras, dtype=torch.float64)
    with use_backend('reference'):
        expected = results_and_gradients(mix(positive=positive), inputs)
    with use_backend('chunked'):
        assert_same_results(results_and_gradients(mix(positive=positive), inputs), expected, 1e-10, 1e-10)


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)],
                         ids=['fp32', 'bf16', 'fp16'])
def test_backend_agrees_with_float64_on_rounded_inputs(dtype, bound, cpu_backend):
    inputs = nc_ssd_inputs(2, 49, 4, 6, 2, 8, dtype=dtype)
    with use_backend('reference'):
        expected = results_and_gradients(nc_ssd, {name: x.double() for name, x in inputs.items()})
    with use_backend(cpu_backend):
        actual = results_and_gradients(nc_ssd, inputs)
    assert actual['out0'].dtype == dtype
    assert_same_results(actual, expected, bound, 2 * bound)


def test_float32_holds_over_long_inputs():
    inputs = nc_ssd_inputs(1, 50_000, 2, 4, 1, 4)
    inputs = {name: x.abs() if name in 'xB' else x for name, x in inputs.items()}  # sums that grow with the length
    wanted = ('x', 'dt', 'B', 'C')
    expected = results_and_gradients(nc_ssd, {name: x.double() for name, x in inputs.items()}, wanted)
    assert_same_results(results_and_gradients(nc_ssd, inputs, wanted), expected, 1e-5, 1e-5)


@pytest.mark.parametrize(('writer', 'reader'), [*itertools.permutations(BACKENDS, 2)])
def test_the_sum_of_one_backend_serves_another(writer, reader, needs_native):
    inputs = nc_ssd_inputs(2, 9, 6, 4, 3, 5)
    with use_backend('reference'):
        expected = results_and_gradients(nc_ssd, {name: x.double() for name, x in inputs.items()})
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with use_backend(writer):
        out = nc_ssd(**leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    with use_backend(reader):
        grads = torch.autograd.grad(out, list(leaves.values()), weights)
    for name, grad in zip(leaves, grads, strict=True):
        assert_close_rms(grad, expected[f'grad_{name}'], 1e-5, name)


LAYOUTS = {
    'positions last': lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    'half of a wider tensor': lambda x: torch.cat([x, x], dim=-1).chunk(2, dim=-1)[1],
    'expanded': lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_strides_do_not_matter(layout, cpu_backend):
    inputs = nc_ssd_inputs(2, 7, 4, 5, 2, 3, dtype=torch.float64)
    strided = {name: LAYOUTS[layout](x) if x.ndim > 1 else x for name, x in inputs.items()}
    plain = {name: x.contiguous() for name, x in strided.items()}
    with use_backend(cpu_backend):
        expected = results_and_gradients(nc_ssd, plain)
        assert_same_results(results_and_gradients(nc_ssd, strided), expected, 1e-12, 1e-12)
        assert nc_ssd(**strided).is_contiguous()


@pytest.mark.parametrize('wanted', [('x',), ('A',), ('B', 'C'), ('dt', 'D')], ids=str)
def test_any_subset_of_inputs_may_need_gradients(wanted, cpu_backend):
    inputs = nc_ssd_inputs(1, 9, 4, 5, 2, 3, dtype=torch.float64)
    with use_backend(cpu_backend):
        whole = results_and_gradients(nc_ssd, inputs)
        part = results_and_gradients(nc_ssd, inputs, wanted)
    assert all(torch.equal(x, whole[name]) for name, x in part.items())


def test_empty_batch_gives_empty_output_and_zero_gradients(cpu_backend):
    inputs = {name: x.requires_grad_() for name, x in nc_ssd_inputs(0, 9, 4, 5, 2, 3).items()}
    with use_backend(cpu_backend):
        out = nc_ssd(**inputs)
        out.sum().backward()
    assert out.shape == (0, 9, 4, 5)
    assert not inputs['A'].grad.any() and not inputs['D'].grad.any()


@pytest.mark.parametrize(('change', 'error', 'message'), [
    ({'x': torch.zeros(1, 6, 8)}, ValueError, r'x must be \(B, L, M, P\), got \(1, 6, 8\)'),
    ({'dt': torch.zeros(1, 6, 2)}, ValueError, r'dt must be \(B, L, M\) = \(1, 6, 4\), got \(1, 6, 2\)'),
    ({'A': torch.zeros(4, 1)}, ValueError, r'A must be \(M,\) = \(4\), got \(4, 1\)'),
    ({'C': torch.zeros(1, 6, 1, 3)}, ValueError, r'C must be \(B, L, G, N\) = \(1, 6, 2, 3\), got \(1, 6, 1, 3\)'),
    ({'B': torch.zeros(1, 6, 3, 3), 'C': torch.zeros(1, 6, 3, 3)}, ValueError, 'the 3 groups of B and C must divide'),
    ({'D': torch.zeros(3)}, ValueError, r'D must be \(M,\) = \(4\), got \(3\)'),
    ({'C': torch.zeros(1, 6, 2, 3).double()}, TypeError, 'C is float64, but x is float32'),
    ({'B': torch.zeros(1, 6, 2, 0)}, ValueError, 'N is 0'),
], ids=['x', 'dt', 'A', 'C', 'groups', 'D', 'float64', 'no states'])
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        nc_ssd(**(nc_ssd_inputs(1, 6, 4, 5, 2, 3) | change))


@pytest.mark.parametrize(('case', 'options'), [
    ('g1_L49', {'groups': 1, 'positive': True}), ('g2_neg_L30', {'groups': 2, 'positive': False})],
    ids=['one group', 'two groups, negative'])
@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=['fp64', 'fp32'])
def test_official_results_and_gradients(case, options, dtype, bound, cpu_backend, operator_fixture):
    with safe_open(operator_fixture(f'nc_ssd__{case}.safetensors'), 'pt') as file:
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}
    leaves = {name: tensors[f'in.{name}'].to(dtype).requires_grad_() for name in ('x', 'dt', 'A', 'B', 'C', 'D')}
    B, C = (leaves[name].unflatten(-1, (options['groups'], -1)) for name in 'BC')
    with use_backend(cpu_backend):
        out = nc_ssd(leaves['x'], leaves['dt'], leaves['A'], B, C, leaves['D'], options['positive'])
        (out * tensors['loss_weight']).sum().backward()
    assert relative_rms(out, tensors['out64.y']) <= bound
    for name, leaf in leaves.items():
        assert_close_rms(leaf.grad, tensors[f'grad64.{name}'], bound, name)
