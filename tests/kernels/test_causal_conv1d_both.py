"""causal_conv1d_both: equal to two calls of causal_conv1d, in values, gradients, layouts, graphs and errors."""
import pytest
import torch

from visionssm_kernels import causal_conv1d, causal_conv1d_both, export_decompositions, use_backend

SHAPES = [(1, 1, 1, 4), (2, 5, 3, 4), (1, 24, 17, 3), (2, 33, 63, 4), (3, 7, 9, 6)]


def make(shape, dtype=torch.float64, last=True):
    """x, weight, bias, weight_back, bias_back; channels innermost in x, as models hand it, or positions."""
    batch, dim, length, width = shape
    x = torch.randn(batch, length, dim, dtype=dtype).transpose(1, 2) if last else torch.randn(
        batch, dim, length, dtype=dtype)
    filters = [torch.randn(dim, 1, width, dtype=dtype), torch.randn(dim, dtype=dtype),
               torch.randn(dim, width, dtype=dtype), torch.randn(dim, dtype=dtype)]
    return [tensor.requires_grad_() for tensor in (x, *filters)]


def one_by_one(x, weight, bias, weight_back, bias_back, activation=None):
    return torch.stack([causal_conv1d(x, weight, bias, activation),
                        causal_conv1d(x, weight_back, bias_back, activation, True)], dim=1)


@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('last', [False, True], ids=['positions innermost', 'channels innermost'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_equals_two_convolutions_in_values_and_gradients(shape, last, activation, cpu_backend):
    inputs = make(shape, last=last)
    with use_backend('reference'):
        expected = one_by_one(*inputs, activation)
    dout = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, dout)
    with use_backend(cpu_backend):
        out = causal_conv1d_both(*inputs, activation)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(out, inputs, dout), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize('layout', [
    lambda x: x[:, :1].expand_as(x), lambda x: x.mT.repeat_interleave(2, dim=-1)[..., ::2].mT,
    lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
], ids=['expanded over channels', 'every second channel', 'batch innermost'])
def test_strides_do_not_matter(layout, cpu_backend):
    x, *filters = (tensor.detach() for tensor in make((2, 6, 11, 4)))
    with use_backend(cpu_backend):
        torch.testing.assert_close(causal_conv1d_both(layout(x), *filters, 'silu'),
                                   causal_conv1d_both(layout(x).contiguous(), *filters, 'silu'), rtol=0, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_and_filters_without_bias(dtype, cpu_backend):
    x, weight, _, weight_back, _ = (tensor.detach() for tensor in make((2, 6, 9, 4), torch.float32))
    with use_backend(cpu_backend):
        out = causal_conv1d_both(x.to(dtype), weight, None, weight_back, None, 'silu')
        expected = one_by_one(x.to(dtype), weight, None, weight_back, None, 'silu')
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('last', [False, True])
def test_directions_are_slowest_in_memory_and_positions_are_laid_out_as_in_the_input(last):
    inputs = make((2, 6, 9, 4), last=last)
    out = causal_conv1d_both(*inputs)
    direction = out[:, 1]
    assert direction.permute(0, 2, 1).is_contiguous() if last else direction.is_contiguous()
    assert causal_conv1d_both(*(tensor.to('meta') for tensor in inputs)).stride() == out.stride()


def test_opcheck():
    torch.library.opcheck(torch.ops.visionssm.causal_conv1d_both.default, (*make((2, 3, 6, 4), torch.float32), 'silu'))


def test_an_empty_batch_gives_an_empty_result():
    x, *filters = make((1, 4, 5, 3))
    assert causal_conv1d_both(x[:0], *filters).shape == (0, 2, 4, 5)


def test_decomposes_into_aten_ops():

    class Both(torch.nn.Module):
        def forward(self, *tensors):
            return causal_conv1d_both(*tensors, 'silu')

    inputs = tuple(tensor.detach() for tensor in make((2, 5, 9, 4), torch.float32))
    program = torch.export.export(Both(), inputs).run_decompositions(export_decompositions())
    assert 'visionssm' not in program.graph_module.code
    torch.testing.assert_close(program.module()(*inputs), one_by_one(*inputs, 'silu'))


@pytest.mark.parametrize(('at', 'value', 'message'), [
    (3, torch.randn(4, 4), r'causal_conv1d_both: weight_back must be .* = \(5, 4\), got \(4, 4\)'),
    (4, torch.randn(4), r'causal_conv1d_both: bias_back must be \(D,\) = \(5\), got \(4\)'),
    (1, torch.randn(5), r'causal_conv1d_both: weight must be \(D, W\)')])
def test_filters_that_do_not_fit_are_named(at, value, message):
    inputs = make((2, 5, 9, 4), torch.float32)
    inputs[at] = value
    with pytest.raises(ValueError, match=message):
        causal_conv1d_both(*inputs)
