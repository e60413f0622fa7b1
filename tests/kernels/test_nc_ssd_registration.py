"""nc_ssd under torch.library, compile, export, script, FX, autocast and the FLOP counter."""
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionssm_kernels import export_decompositions, nc_ssd
from visionssm_kernels._testing import nc_ssd_inputs


class Mixer(nn.Module):
    """Steps, B and C made from the input, as a model does; 4 heads of 3 channels, 2 groups of 5 states."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 4 * 3 + 4 + 2 * 2 * 5)
        self.A_log = nn.Parameter(torch.rand(4))
        self.D = nn.Parameter(torch.randn(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, dt, B, C = self.proj(tokens).split([12, 4, 10, 10], dim=-1)
        y = torch.ops.visionssm.nc_ssd(
            x.unflatten(-1, (4, 3)), nn.functional.softplus(dt), -self.A_log.exp(), B.unflatten(-1, (2, 5)),
            C.unflatten(-1, (2, 5)), self.D)
        return y.flatten(-2)


@pytest.fixture
def module() -> Mixer:
    torch.manual_seed(0)
    return Mixer()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=['fp32', 'fp64', 'bf16'])
@pytest.mark.parametrize('extras', [False, True], ids=['plain', 'skip'])
def test_opcheck(dtype, extras):
    inputs = [x.requires_grad_() for x in nc_ssd_inputs(2, 5, 4, 3, 2, 3, extras, dtype).values()]
    inputs += [None] * (6 - len(inputs))
    torch.library.opcheck(torch.ops.visionssm.nc_ssd_with_state.default, (*inputs, extras))
    torch.library.opcheck(torch.ops.visionssm.nc_ssd.default, (*inputs, extras))


@pytest.mark.parametrize('extras', [False, True], ids=['plain', 'skip'])
def test_opcheck_of_the_backward_op(extras):
    inputs = [*nc_ssd_inputs(2, 5, 4, 3, 2, 3, extras).values()]
    inputs += [None] * (6 - len(inputs))
    out, state = torch.ops.visionssm.nc_ssd_with_state(*inputs, True)
    torch.library.opcheck(
        torch.ops.visionssm.nc_ssd_backward.default, (torch.randn_like(out), *inputs, state, True))


def test_compiles_into_one_graph_with_its_gradients(module, tokens):
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(tokens), module(tokens))
    gradients, expected = (
        torch.autograd.grad(forward(tokens).square().sum(), module.parameters()) for forward in (compiled, module))
    torch.testing.assert_close(gradients, expected)


def test_scripts_and_traces_through_fx(module, tokens):
    torch.testing.assert_close(torch.jit.script(module)(tokens), module(tokens))
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(tokens), module(tokens))


@pytest.mark.parametrize('decompose', [False, True], ids=['op', 'aten'])
def test_exports_with_dynamic_sizes(decompose, module, tokens):
    dynamic = {0: torch.export.Dim('batch'), 1: torch.export.Dim('length')}
    program = torch.export.export(module.eval(), (tokens,), dynamic_shapes=(dynamic,))
    if decompose:
        program = program.run_decompositions(export_decompositions())
        assert 'visionssm' not in program.graph_module.code
    other = torch.randn(3, 13, 6)
    torch.testing.assert_close(program.module()(other), module(other))


def test_autocast_keeps_dtypes_and_precision(module, tokens):
    with torch.autocast('cpu', torch.bfloat16):
        assert module(tokens).dtype == torch.bfloat16
    inputs = nc_ssd_inputs(1, 9, 4, 3, 2, 5)
    expected = nc_ssd(**inputs)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(nc_ssd(**inputs), expected)
        half, A = inputs['x'].bfloat16().requires_grad_(), inputs['A'].requires_grad_()
        out = nc_ssd(**inputs | {'x': half, 'A': A})
        out.float().sum().backward()
    assert out.dtype == half.grad.dtype == torch.bfloat16 and A.grad.dtype == torch.float32


def test_flops_count_two_for_each_multiply_add():
    inputs = nc_ssd_inputs(2, 7, 4, 3, 2, 5)
    with FlopCounterMode(display=False) as counter:
        nc_ssd(**{name: x.requires_grad_() for name, x in inputs.items()}).sum().backward()
    forward, backward = 4 * 5 * 3 + 3 + 1 + 2 * 3, 8 * 5 * 3 + 4 * 3 + 4 + 4 * 3
    assert counter.get_total_flops() == 2 * 7 * 4 * (forward + backward)


def test_second_derivative_raises_instead_of_being_zero():
    inputs = {name: x.requires_grad_() for name, x in nc_ssd_inputs(1, 5, 4, 3, 2, 5).items()}
    gradient, = torch.autograd.grad(nc_ssd(**inputs).square().sum(), inputs['x'], create_graph=True)
    with pytest.raises(NotImplementedError, match='nc_ssd has no second derivative'):
        gradient.sum().backward()
