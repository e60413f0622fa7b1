"""causal_conv1d: definition, gradients, backends against the reference, layouts, dtypes, errors."""
import itertools

import pytest
import torch
from torch.nn import functional as F

from visionssm_kernels import causal_conv1d, use_backend
from visionssm_kernels._native import native_why_not

_WHY_NOT = native_why_not('cpu')
NATIVE = pytest.param('native', marks=pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT)))
BACKENDS = ['reference', 'chunked', NATIVE]
SHAPES = [(1, 1, 1, 4), (2, 5, 3, 4), (1, 24, 17, 3), (2, 33, 63, 4), (1, 3, 257, 2), (2, 2, 6, 1), (3, 7, 9, 6)]


def shape_id(shape: tuple[int, ...]) -> str:
    return 'B{}-D{}-L{}-W{}'.format(*shape)


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Input (B, D, L), weight (D, W) and bias (D,), with gradients."""
    batch, dim, length, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, dim, length), (dim, width), (dim,)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def outputs_and_gradients(backend: str, inputs: list[torch.Tensor], *options: object) -> list[torch.Tensor]:
    """Output and the gradients of all inputs, for an upstream gradient that is the same every time."""
    with use_backend(backend):
        out = causal_conv1d(*inputs, *options)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


@pytest.fixture(params=[None, 'silu'], ids=['linear', 'silu'])
def activation(request) -> str | None:
    return request.param


@pytest.fixture(params=[False, True], ids=['causal', 'reverse'])
def reverse(request) -> bool:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize('shape', SHAPES, ids=shape_id)
def test_reference_is_a_padded_convolution(shape, activation):
    x, weight, bias = make_inputs(shape)
    expected = F.conv1d(F.pad(x, (shape[3] - 1, 0)), weight.unsqueeze(1), bias, groups=shape[1])
    expected = expected if activation is None else F.silu(expected)
    with use_backend('reference'):
        torch.testing.assert_close(causal_conv1d(x, weight, bias, activation), expected, atol=1e-12, rtol=0)


def test_reverse_is_the_flip_of_the_convolution_of_the_flip(backend, activation):
    x, weight, bias = make_inputs((2, 5, 9, 4))
    with use_backend(backend):
        flipped = causal_conv1d(x.flip(-1), weight, bias, activation).flip(-1)
        torch.testing.assert_close(
            causal_conv1d(x, weight, bias, activation, reverse=True), flipped, atol=1e-12, rtol=0)


@pytest.mark.parametrize('shape', [(2, 3, 5, 4), (1, 2, 2, 4)], ids=shape_id)
def test_gradients_of_the_reference_are_derivatives(shape, activation, reverse):
    with use_backend('reference'):
        assert torch.autograd.gradcheck(lambda *a: causal_conv1d(*a, activation, reverse), make_inputs(shape))


@pytest.mark.parametrize('shape', SHAPES, ids=shape_id)
@pytest.mark.parametrize('name', BACKENDS[1:])
def test_backend_agrees_with_the_reference_in_float64(name, shape, activation, reverse):
    inputs = make_inputs(shape)
    expected = outputs_and_gradients('reference', inputs, activation, reverse)
    for value, reference in zip(outputs_and_gradients(name, inputs, activation, reverse), expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-10, rtol=0)


@pytest.mark.parametrize('name', BACKENDS[1:])
@pytest.mark.parametrize('dtype,bound', [
    (torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)], ids=['fp32', 'bf16', 'fp16'])
def test_backend_agrees_with_float64_on_rounded_inputs(name, dtype, bound, activation, reverse):
    inputs = make_inputs((2, 24, 63, 4), dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = outputs_and_gradients('reference', exact, activation, reverse)
    for value, reference in zip(outputs_and_gradients(name, inputs, activation, reverse), expected, strict=True):
        assert value.dtype == dtype
        assert (value.double() - reference).norm() <= bound * reference.norm()


LAYOUTS = {
    'channel-last': lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    'half of a wider tensor': lambda x: torch.cat([x, x], dim=1).chunk(2, dim=1)[1],
    'every second position': lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    'expanded over the batch': lambda x: x[:1].expand_as(x),
    'expanded over positions': lambda x: x[..., :1].expand_as(x),
    'expanded over channels': lambda x: x[:, :1].expand_as(x),
    'every second channel of a channel-last tensor': lambda x: x.mT.repeat_interleave(2, dim=-1)[..., ::2].mT,
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_strides_do_not_matter(backend, layout, activation, reverse):
    x, weight, bias = make_inputs((2, 6, 11, 4))
    strided = LAYOUTS[layout](x.detach()).requires_grad_()
    plain = strided.detach().contiguous().requires_grad_()
    values = outputs_and_gradients(backend, [strided, weight, bias], activation, reverse)
    expected = outputs_and_gradients(backend, [plain, weight, bias], activation, reverse)
    for value, reference in zip(values, expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-12, rtol=0)


def test_strides_of_weight_and_bias_do_not_matter(backend, activation, reverse):
    x, weight, bias = (tensor.detach() for tensor in make_inputs((2, 6, 11, 4)))
    strided = [x, weight.t().contiguous().t(), bias[:1].expand(6)]
    values = outputs_and_gradients(backend, [t.requires_grad_() for t in strided], activation, reverse)
    plain = [t.detach().contiguous().requires_grad_() for t in strided]
    for value, reference in zip(values, outputs_and_gradients(backend, plain, activation, reverse), strict=True):
        torch.testing.assert_close(value, reference, atol=1e-12, rtol=0)


def test_upstream_gradient_may_be_expanded(backend):
    x, weight, bias = make_inputs((2, 6, 11, 4))
    with use_backend(backend):
        causal_conv1d(x, weight, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 22.))


@pytest.mark.parametrize('dims', [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)])
def test_output_and_gradient_are_laid_out_as_the_input(backend, dims):
    x, weight, bias = make_inputs((2, 6, 11, 4))
    back = sorted(range(3), key=dims.__getitem__)
    moved = x.detach().permute(dims).contiguous().permute(back).requires_grad_()
    with use_backend(backend):
        out = causal_conv1d(moved, weight, bias, 'silu')
        expected = causal_conv1d(x, weight, bias, 'silu')
        grad, expected_grad = (torch.autograd.grad(y.square().sum(), z)[0] for y, z in ((out, moved), (expected, x)))
    assert out.stride() == grad.stride() == moved.stride()
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=0)


def test_conv1d_layout_of_the_weight_is_accepted(backend):
    x, weight, bias = make_inputs((2, 5, 7, 4))
    wide = weight.detach().unsqueeze(1).requires_grad_()
    with use_backend(backend):
        (gradient,) = torch.autograd.grad(causal_conv1d(x, wide, bias, 'silu').sum(), wide)
        (expected,) = torch.autograd.grad(causal_conv1d(x, weight, bias, 'silu').sum(), weight)
    torch.testing.assert_close(gradient, expected.unsqueeze(1))


def test_swish_is_silu():
    inputs = make_inputs((1, 3, 5, 4))
    assert torch.equal(causal_conv1d(*inputs, 'swish'), causal_conv1d(*inputs, 'silu'))


def test_bias_may_be_absent(backend, activation, reverse):
    x, weight, _ = make_inputs((2, 5, 7, 4))
    with use_backend(backend):
        zero = causal_conv1d(x, weight, x.new_zeros(5), activation, reverse)
        torch.testing.assert_close(causal_conv1d(x, weight, None, activation, reverse), zero)


@pytest.mark.parametrize('subset', [s for n in (1, 2) for s in itertools.combinations(range(3), n)], ids=str)
def test_any_subset_of_inputs_may_need_gradients(backend, subset):
    inputs = make_inputs((2, 5, 7, 4))
    expected = outputs_and_gradients(backend, inputs, 'silu')[1:]
    partial = [tensor.detach().requires_grad_(i in subset) for i, tensor in enumerate(inputs)]
    dout = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with use_backend(backend):
        causal_conv1d(*partial, 'silu').backward(dout)
    for i, tensor in enumerate(partial):
        if i in subset:
            torch.testing.assert_close(tensor.grad, expected[i])
        else:
            assert tensor.grad is None


def test_second_backward_pass_gives_equal_gradients(backend):
    inputs = make_inputs((2, 33, 63, 4), torch.float32)
    with use_backend(backend):
        out = causal_conv1d(*inputs, 'silu')
        first, second = (torch.autograd.grad(out.square().sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize('name', BACKENDS[1:])
def test_number_of_threads_does_not_change_results(name):
    inputs = make_inputs((2, 129, 257, 4), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(name, inputs, 'silu'))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty_batch_gives_empty_output_and_zero_gradients(backend):
    x, weight, bias = make_inputs((0, 5, 7, 4))
    out, dx, dweight, dbias = outputs_and_gradients(backend, [x, weight, bias], 'silu')
    assert out.shape == dx.shape == (0, 5, 7)
    assert not dweight.any() and not dbias.any()


def test_large_inputs_saturate_without_nan(backend):
    x = torch.tensor([[[-1e4, -200., -90., 0., 90., 1e4]]], requires_grad=True)
    with use_backend(backend):
        out = causal_conv1d(x, torch.ones(1, 1), None, 'silu')
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, F.silu(x))
    assert dx.isfinite().all()


ERRORS = {
    'x of two dimensions': (((5, 7), (5, 4), (5,)), r'x must be \(B, D, L\), got \(5, 7\)'),
    'no positions': (((2, 5, 0), (5, 4), (5,)), 'L is 0'),
    'no taps': (((2, 5, 7), (5, 0), (5,)), 'W is 0'),
    'filters of other channels': (((2, 5, 7), (6, 4), (5,)), r'weight must be .* = \(5, 4\), got \(6, 4\)'),
    'filters over channels': (((2, 5, 7), (5, 5, 4), (5,)), r'weight must be .* = \(5, 1, 4\), got \(5, 5, 4\)'),
    'bias of other channels': (((2, 5, 7), (5, 4), (4,)), r'bias must be \(D,\) = \(5\), got \(4\)'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_wrong_shapes_are_named(case):
    shapes, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        causal_conv1d(*(torch.randn(shape) for shape in shapes))


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="'silu', 'swish'.*got 'gelu'"):
        causal_conv1d(torch.randn(1, 2, 3), torch.randn(2, 4), None, 'gelu')


def test_mixed_float64_is_refused():
    with pytest.raises(TypeError, match='weight is float64, but x is float32'):
        causal_conv1d(torch.randn(1, 2, 3), torch.randn(2, 4).double())


def test_integers_are_refused():
    with pytest.raises(TypeError, match='x must be floating point.*got int64'):
        causal_conv1d(torch.ones(1, 2, 3, dtype=torch.int64), torch.randn(2, 4))
