"""dilated_conv2d: definition, gradients, backends, layouts, dtypes, errors, and what it is to graphs and exporters."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from visionssm_kernels import dilated_conv2d, export_decompositions, use_backend
from visionssm_kernels._native import INSTRUCTION_SETS, native_why_not

_WHY_NOT = native_why_not('cpu')
NATIVE = pytest.param('native', marks=pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT)))
BACKENDS = ['reference', 'chunked', NATIVE]
# sizes B, D, H, W and S, with the dilations
CASES = [((1, 1, 1, 1, 3), (1, 3, 5)), ((2, 19, 7, 5, 3), (1, 3, 5)), ((1, 33, 3, 13, 3), (4, 1)),
         ((2, 3, 9, 1, 5), (2,)), ((3, 8, 4, 6, 1), (1, 2)), ((1, 16, 2, 3, 3), (5,)), ((1, 5, 12, 9, 7), (1, 2, 3, 1))]
ALL = (1, 3, 5)


def case_id(case: tuple) -> str:
    return 'B{}-D{}-H{}-W{}-S{}'.format(*case[0])


def make_inputs(
        shape: tuple[int, ...] = (2, 19, 7, 6, 3),
        filters: int = 3,
        dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    """Map (B, D, H, W) and filters (M, D, S, S), with gradients."""
    batch, dim, height, width, side = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, dim, height, width), (filters, dim, side, side)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def outputs_and_gradients(backend: str, inputs: list[torch.Tensor], dilations: tuple[int, ...]) -> list[torch.Tensor]:
    """Output and the gradients of both inputs, for an upstream gradient that is the same every time."""
    with use_backend(backend):
        out = dilated_conv2d(*inputs, dilations)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def test_dilations_far_beyond_the_map_take_no_more_memory_than_its_size(backend):
    inputs = make_inputs((1, 5, 4, 6, 3), 2)
    values = outputs_and_gradients(backend, inputs, (1, 2 ** 31))
    for value, expected in zip(values, outputs_and_gradients('reference', inputs, (1, 6)), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_reference_is_a_sum_of_convolutions_of_padded_maps(case):
    shape, dilations = case
    x, weight = make_inputs(shape, len(dilations))
    expected = sum(
        F.conv2d(F.pad(x, [d * (shape[4] // 2)] * 4, 'replicate'), filters.unsqueeze(1), dilation=d, groups=shape[1])
        for d, filters in zip(dilations, weight))
    with use_backend('reference'):
        torch.testing.assert_close(dilated_conv2d(x, weight, dilations), expected, atol=1e-12, rtol=0)


def test_gradients_of_the_reference_are_derivatives():
    with use_backend('reference'):
        assert torch.autograd.gradcheck(lambda *a: dilated_conv2d(*a, (1, 2)), make_inputs((2, 2, 3, 4, 3), 2))


@pytest.mark.parametrize('case', CASES, ids=case_id)
@pytest.mark.parametrize('name', BACKENDS[1:])
def test_backend_agrees_with_the_reference_in_float64(name, case):
    shape, dilations = case
    inputs = make_inputs(shape, len(dilations))
    expected = outputs_and_gradients('reference', inputs, dilations)
    for value, reference in zip(outputs_and_gradients(name, inputs, dilations), expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-10, rtol=0)


@pytest.mark.parametrize('name', BACKENDS[1:])
@pytest.mark.parametrize('dtype,bound', [
    (torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)], ids=['fp32', 'bf16', 'fp16'])
def test_backend_agrees_with_float64_on_rounded_inputs(name, dtype, bound):
    inputs = make_inputs(dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = outputs_and_gradients('reference', exact, ALL)
    for value, reference in zip(outputs_and_gradients(name, inputs, ALL), expected, strict=True):
        assert value.dtype == dtype
        assert (value.double() - reference).norm() <= bound * reference.norm()


@pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))
@pytest.mark.parametrize('isa', INSTRUCTION_SETS)
@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_every_instruction_set_agrees_with_float64(isa, case, monkeypatch):
    monkeypatch.setenv('VISIONSSM_NATIVE_ISA', isa)
    shape, dilations = case
    inputs = make_inputs(shape, len(dilations), torch.float32)
    expected = outputs_and_gradients('reference', [x.detach().double().requires_grad_() for x in inputs], dilations)
    for value, reference in zip(outputs_and_gradients('native', inputs, dilations), expected, strict=True):
        assert (value.double() - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize('name', BACKENDS[1:])
def test_maps_of_many_slabs_agree_with_the_reference(name):
    inputs = make_inputs((1, 3, 61, 301, 3), dtype=torch.float32)
    expected = outputs_and_gradients('reference', [x.detach().double().requires_grad_() for x in inputs], ALL)
    for value, reference in zip(outputs_and_gradients(name, inputs, ALL), expected, strict=True):
        assert (value.double() - reference).norm() <= 1e-5 * reference.norm()


LAYOUTS = {
    'channels-last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'half of the channels': lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[1],
    'turned over': lambda x: x.mT.contiguous(memory_format=torch.channels_last).mT,
    'every second pixel': lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    'expanded over the batch': lambda x: x[:1].expand_as(x),
    'expanded over pixels': lambda x: x[..., :1, :1].expand_as(x),
    'one image as sequences have it': lambda x: x[:1].flatten(2).mT.contiguous().mT.unflatten(2, x.shape[2:]),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_strides_do_not_matter(backend, layout):
    x, weight = make_inputs()
    strided = LAYOUTS[layout](x.detach()).requires_grad_()
    plain = strided.detach().contiguous().requires_grad_()
    filters = weight.detach().mT.contiguous().mT.requires_grad_()
    values = outputs_and_gradients(backend, [strided, filters], ALL)
    for value, expected in zip(values, outputs_and_gradients(backend, [plain, weight], ALL), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize('size', [(2, 5, 4, 3), (1, 5, 1, 3), (1, 1, 4, 3), (2, 1, 1, 1)], ids=str)
def test_output_is_channels_last_and_the_gradient_laid_out_as_the_input(backend, size):
    x, weight = make_inputs((*size, 3))
    with use_backend(backend):
        out = dilated_conv2d(x, weight, ALL)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert out.stride() == torch.empty(size, memory_format=torch.channels_last).stride()
    assert grad.stride() == x.stride()


def test_upstream_gradient_may_be_expanded(backend):
    x, weight = make_inputs()
    with use_backend(backend):
        grad, = torch.autograd.grad(dilated_conv2d(x, torch.ones_like(weight), ALL).sum(), x)
    torch.testing.assert_close(grad.sum(), grad.new_tensor(27. * x.numel()))


@pytest.mark.parametrize('subset', [(0,), (1,)], ids=['map', 'filters'])
def test_one_input_alone_may_need_gradients(backend, subset):
    inputs = [x.detach().requires_grad_(i in subset) for i, x in enumerate(make_inputs())]
    with use_backend(backend):
        dilated_conv2d(*inputs, ALL).sum().backward()
    assert [x.grad is not None for x in inputs] == [i in subset for i in range(2)]


@pytest.mark.parametrize('name', [NATIVE])
def test_number_of_threads_does_not_change_results(name):
    inputs = make_inputs((2, 65, 31, 17, 3), dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(name, inputs, ALL))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty_batch_gives_empty_output_and_zero_gradients(backend):
    out, dx, dweight = outputs_and_gradients(backend, make_inputs((0, 5, 7, 4, 3)), ALL)
    assert out.shape == dx.shape == (0, 5, 7, 4)
    assert not dweight.any()


def test_an_infinite_pixel_reaches_its_neighbours_alone(backend):
    x = torch.zeros(1, 2, 9, 11)
    x[0, 0, 4, 5] = torch.inf
    with use_backend(backend):
        out = dilated_conv2d(x, torch.ones(1, 2, 3, 3), [2])
    assert out[0, 0].isinf().nonzero().tolist() == [[i, j] for i in (2, 4, 6) for j in (3, 5, 7)]
    assert not out[0, 1].any() and not out.isnan().any()


ERRORS = {
    'map of three dimensions': (((5, 7, 7), (1, 5, 3, 3), [1]), r'x must be \(B, D, H, W\), got \(5, 7, 7\)'),
    'no pixels': (((1, 5, 0, 7), (1, 5, 3, 3), [1]), 'H is 0'),
    'filters of other channels': (((1, 5, 7, 7), (1, 4, 3, 3), [1]), r'= \(1, 5, 3, 3\), got \(1, 4, 3, 3\)'),
    'a filter too few': (((1, 5, 7, 7), (1, 5, 3, 3), [1, 2]), r'= \(2, 5, 3, 3\), got \(1, 5, 3, 3\)'),
    'oblong filters': (((1, 5, 7, 7), (1, 5, 1, 3), [1]), r'= \(1, 5, 3, 3\), got \(1, 5, 1, 3\)'),
    'filters without a middle': (((1, 5, 7, 7), (1, 5, 4, 4), [1]), '4 taps a side'),
    'no dilations': (((1, 5, 7, 7), (0, 5, 3, 3), []), r'dilations are \[\]'),
    'a dilation of zero': (((1, 5, 7, 7), (2, 5, 3, 3), [1, 0]), r'dilations are \[1, 0\]'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_senseless_arguments_are_named(case):
    (*shapes, dilations), message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        dilated_conv2d(*(torch.randn(shape) for shape in shapes), dilations)


def test_mixed_float64_is_refused():
    with pytest.raises(TypeError, match='weight is float64, but x is float32'):
        dilated_conv2d(torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3).double(), [1])


class Filters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.visionssm.dilated_conv2d(x, self.weight, [1, 3])


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 9, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=['fp32', 'fp64', 'bf16'])
@pytest.mark.parametrize('batch', [1, 2])
def test_opcheck_of_both_ops(dtype, batch):
    x, weight = make_inputs((batch, 3, 4, 1, 3), 2, dtype)
    torch.library.opcheck(torch.ops.visionssm.dilated_conv2d.default, (x, weight, [1, 3]))
    arguments = (torch.randn_like(x), x.detach(), weight.detach(), [1, 3])
    torch.library.opcheck(torch.ops.visionssm.dilated_conv2d_backward.default, arguments)


def test_compiles_into_one_graph_with_gradients(x):
    module = Filters()
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), module(x))
    gradients, expected = (
        torch.autograd.grad(forward(x).square().sum(), module.parameters()) for forward in (compiled, module))
    torch.testing.assert_close(gradients, expected)


def test_scripts_and_traces_through_fx(x):
    module = Filters()
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), module(x))


def test_exports_for_any_size_and_decomposes_into_aten_ops(x):
    module = Filters().eval()
    dynamic = {0: torch.export.Dim('batch'), 2: torch.export.Dim('height'), 3: torch.export.Dim('width')}
    program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,))
    other = torch.randn(3, 5, 6, 7)
    torch.testing.assert_close(program.module()(other), module(other))
    program = torch.export.export(module, (x,)).run_decompositions(export_decompositions())
    assert 'visionssm' not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), module(x))


def test_flops_count_two_for_each_multiply_add(x):
    with FlopCounterMode(display=False) as counter:
        Filters()(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 18


def test_second_derivative_raises_instead_of_being_zero(x):
    x.requires_grad_()
    gradient, = torch.autograd.grad(Filters()(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='dilated_conv2d has no second derivative'):
        gradient.sum().backward()
