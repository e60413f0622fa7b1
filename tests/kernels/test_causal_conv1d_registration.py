"""causal_conv1d as an op of torch.library: opcheck, compile, export, script, trace, autocast, FLOPs."""
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionssm_kernels import causal_conv1d, export_decompositions


class Filter(nn.Module):
    """A module as models write it: the weights of an nn.Conv1d, our op."""

    def __init__(self, dim: int = 5, width: int = 4, reverse: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, width, groups=dim)
        self.reverse = reverse

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(x, self.conv.weight, self.conv.bias, 'silu', self.reverse)


@pytest.fixture(params=[False, True], ids=['causal', 'reverse'])
def module(request) -> Filter:
    torch.manual_seed(0)
    return Filter(reverse=request.param)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('options', [(None, None, False), ('bias', 'silu', True)], ids=['plain', 'all'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=['fp32', 'fp64', 'bf16'])
def test_opcheck_of_the_forward_op(options, dtype):
    bias = torch.randn(3, dtype=dtype, requires_grad=True) if options[0] else None
    x = torch.randn(2, 6, 3, dtype=dtype).transpose(1, 2).requires_grad_()
    weight = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.visionssm.causal_conv1d.default, (x, weight, bias, *options[1:]))


@pytest.mark.parametrize('bias', [False, True], ids=['plain', 'bias'])
def test_opcheck_of_the_backward_op(bias):
    dout, x = torch.randn(2, 2, 3, 6).unbind()
    arguments = (dout, x, torch.randn(3, 1, 4), torch.randn(3) if bias else None, 'silu', False)
    torch.library.opcheck(torch.ops.visionssm.causal_conv1d_backward.default, arguments)


def test_compiles_into_one_graph(module, x):
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), module(x))


def test_compiled_gradients_agree(module, x):
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    gradients, expected = (
        torch.autograd.grad(forward(x).square().sum(), module.parameters()) for forward in (compiled, module))
    torch.testing.assert_close(gradients, expected)


def test_scripts(module, x):
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))


def test_traces_through_fx(module, x):
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), module(x))


def test_exports_with_dynamic_batch_and_length(module, x):
    dynamic = {0: torch.export.Dim('batch'), 2: torch.export.Dim('length')}
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=(dynamic,))
    other = torch.randn(3, 5, 14)
    torch.testing.assert_close(program.module()(other), module(other))


def test_decomposes_into_aten_ops(module, x):
    program = torch.export.export(module.eval(), (x,)).run_decompositions(export_decompositions())
    assert 'visionssm' not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize('width', [1, 12], ids=['W1', 'W>L'])
def test_decomposition_is_right_for_extreme_widths(width, x):
    module = Filter(width=width).eval()
    program = torch.export.export(module, (x,)).run_decompositions(export_decompositions())
    torch.testing.assert_close(program.module()(x), module(x))


def test_autocast_keeps_the_dtype_of_the_input(module, x):
    with torch.autocast('cpu', torch.bfloat16):
        assert module(x).dtype == torch.float32
        assert module(x.bfloat16()).dtype == torch.bfloat16


def test_autocast_gradients_have_the_dtype_of_their_tensors(module, x):
    half = x.bfloat16().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        module(half).float().sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert module.conv.weight.grad.dtype == module.conv.bias.grad.dtype == torch.float32


def test_flops_count_two_for_each_multiply_add(module, x):
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 4


def test_second_derivative_raises_instead_of_being_zero(x):
    x.requires_grad_()
    y = causal_conv1d(x, torch.ones(5, 4))
    gradient, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='causal_conv1d has no second derivative'):
        gradient.sum().backward()
