"""wavefront_scan_2d under torch.library, compile, export, script, FX, autocast and the FLOP counter."""
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionssm_kernels import export_decompositions, wavefront_scan_2d
from visionssm_kernels._testing import wavefront_inputs


class Mixer(nn.Module):
    """Steps, B and C made from the input, as a model does; 3 channels, 2 states."""

    def __init__(self, reverse: bool):
        super().__init__()
        self.reverse = reverse
        self.proj = nn.Conv2d(3, 12, 1)
        self.A = nn.Parameter(-torch.rand(3, 2))
        self.D = nn.Parameter(torch.randn(3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top, left, B_top, B_left, C = self.proj(x).split([3, 3, 2, 2, 2], dim=1)
        return torch.ops.visionssm.wavefront_scan_2d(
            x, top, left, self.A, 2 * self.A, B_top, B_left, C, self.D, self.bias, self.bias, True, self.reverse)


@pytest.fixture(params=[False, True], ids=['forward', 'reverse'])
def module(request) -> Mixer:
    torch.manual_seed(0)
    return Mixer(request.param)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 9, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=['fp32', 'fp64', 'bf16'])
@pytest.mark.parametrize('extras', [False, True], ids=['plain', 'extras'])
def test_opcheck(dtype, extras):
    inputs = [x.requires_grad_() for x in wavefront_inputs(2, 3, 4, 5, 2, extras, dtype).values()]
    inputs += [None] * (11 - len(inputs))
    for keep in (True, False):
        torch.library.opcheck(torch.ops.visionssm.wavefront_scan.default, (*inputs, extras, True, keep))
    torch.library.opcheck(torch.ops.visionssm.wavefront_scan_2d.default, (*inputs, extras, True))


@pytest.mark.parametrize('extras', [False, True], ids=['plain', 'extras'])
def test_opcheck_of_the_backward_op(extras):
    inputs = [*wavefront_inputs(2, 3, 9, 5, 2, extras).values()]
    inputs += [None] * (11 - len(inputs))
    out, checkpoints = torch.ops.visionssm.wavefront_scan(*inputs, extras, False, True)
    arguments = (torch.randn_like(out), *inputs, checkpoints, extras, False)
    torch.library.opcheck(torch.ops.visionssm.wavefront_scan_backward.default, arguments)


def test_compiles_into_one_graph_with_its_gradients(module, x):
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), module(x))
    gradients, expected = (
        torch.autograd.grad(forward(x).square().sum(), module.parameters()) for forward in (compiled, module))
    torch.testing.assert_close(gradients, expected)


def test_scripts_and_traces_through_fx(module, x):
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), module(x))


def test_exports_with_dynamic_sizes(module, x):
    dynamic = {0: torch.export.Dim('batch'), 2: torch.export.Dim('height'), 3: torch.export.Dim('width')}
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=(dynamic,))
    other = torch.randn(3, 3, 4, 7)
    torch.testing.assert_close(program.module()(other), module(other))


@pytest.mark.parametrize('size', [(9, 5), (1, 6), (4, 1)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_decomposes_into_aten_ops(size, module):
    x = torch.randn(2, 3, *size)
    program = torch.export.export(module.eval(), (x,)).run_decompositions(export_decompositions())
    assert 'visionssm' not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), module(x))


def test_decomposes_with_dynamic_batch_and_width(module, x):
    dynamic = {0: torch.export.Dim('batch'), 3: torch.export.Dim('width', max=1 << 16)}
    program = torch.export.export(module.eval(), (x[:, :, :3].contiguous(),), dynamic_shapes=(dynamic,))
    program = program.run_decompositions(export_decompositions())
    other = torch.randn(3, 3, 3, 11)
    torch.testing.assert_close(program.module()(other), module(other))


def test_a_symbolic_height_is_refused_with_a_reason(module, x):
    program = torch.export.export(module.eval(), (x,), dynamic_shapes=({2: torch.export.Dim('height')},))
    with pytest.raises(Exception, match='export with a fixed height'):
        program.run_decompositions(export_decompositions())


def test_autocast_keeps_dtypes_and_precision(module, x):
    with torch.autocast('cpu', torch.bfloat16):
        assert module(x).dtype == torch.float32
    inputs = wavefront_inputs(1, 3, 4, 5, 2)
    expected = wavefront_scan_2d(**inputs)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(wavefront_scan_2d(**inputs), expected)
        half = inputs['u'].bfloat16().requires_grad_()
        A = inputs['A_top'].requires_grad_()
        out = wavefront_scan_2d(**inputs | {'u': half, 'A_top': A})
        out.float().sum().backward()
    assert out.dtype == half.grad.dtype == torch.bfloat16 and A.grad.dtype == torch.float32


def test_flops_count_two_for_each_multiply_add():
    inputs = wavefront_inputs(2, 3, 4, 5, 6)
    with FlopCounterMode(display=False) as counter:
        wavefront_scan_2d(**{name: x.requires_grad_() for name, x in inputs.items()}).sum().backward()
    pixels = 2 * 3 * 4 * 5
    assert counter.get_total_flops() == pixels * (12 * 6 + 4) + pixels * (38 * 6 + 12)


def test_second_derivative_raises_instead_of_being_zero():
    inputs = {name: x.requires_grad_() for name, x in wavefront_inputs(1, 3, 4, 5, 2).items()}
    gradient, = torch.autograd.grad(wavefront_scan_2d(**inputs).square().sum(), inputs['u'], create_graph=True)
    with pytest.raises(NotImplementedError, match='wavefront_scan_2d has no second derivative'):
        gradient.sum().backward()
