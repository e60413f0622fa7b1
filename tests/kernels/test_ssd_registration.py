"""ssd and ssd_2d under torch.library, compile, export, script, FX, autocast and the FLOP counter."""
import shutil

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import visionssm_kernels
from visionssm_kernels import export_decompositions, ssd, ssd_2d, use_backend
from visionssm_kernels._testing import ssd_inputs

INF = float('inf')
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ('g++', 'clang++'))), reason='inductor needs a C++ compiler')


class Mixer(nn.Module):
    """Steps, B and C made from the input, as a model does; 4 heads of 2 channels, 2 groups, 3 states."""

    def __init__(self, reverse: bool):
        super().__init__()
        self.reverse = reverse
        self.proj = nn.Linear(8, 24)
        self.A = nn.Parameter(-torch.rand(4))
        self.D = nn.Parameter(torch.randn(4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, dt, B, C = self.proj(x).split([8, 4, 6, 6], dim=-1)
        y, _ = torch.ops.visionssm.ssd_with_state(
            x.unflatten(-1, (4, 2)), dt, self.A, B.unflatten(-1, (2, 3)), C.unflatten(-1, (2, 3)), self.D,
            z.unflatten(-1, (4, 2)), self.bias, True, [0.01, 2.], None, self.reverse)
        return y.flatten(-2)


class Mixer2d(nn.Module):
    """The same over a map along four routes, (B, 8, H, W)."""

    def __init__(self, routes: str):
        super().__init__()
        self.routes = routes
        self.proj = nn.Conv2d(8, 4 * 10, 1)
        self.A = nn.Parameter(-torch.rand(16))
        self.D = nn.Parameter(torch.randn(16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dt, B, C = self.proj(x).unflatten(1, (4, 10)).split([4, 3, 3], dim=2)
        y = torch.ops.visionssm.ssd_2d(
            x.unflatten(1, (4, 2)), dt, self.A, B, C, self.D, None, True, None, self.routes, 'mean')
        return y.flatten(1, 2)


CASES = {'forward': (lambda: Mixer(False), (2, 9, 8)), 'reverse': (lambda: Mixer(True), (2, 70, 8)),
         '2d': (lambda: Mixer2d('cross'), (2, 8, 4, 5)), '2d-object': (lambda: Mixer2d('snake'), (2, 8, 4, 5))}


@pytest.fixture(params=CASES)
def case(request) -> tuple[nn.Module, torch.Tensor]:
    """A module and its input."""
    torch.manual_seed(0)
    make, shape = CASES[request.param]
    return make(), torch.randn(shape)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=['fp32', 'fp64', 'bf16'])
@pytest.mark.parametrize('extras', [False, True], ids=['plain', 'extras'])
def test_opcheck(dtype, extras):
    inputs = {name: x.requires_grad_() for name, x in ssd_inputs(2, 9, 4, 3, 2, 5, extras, dtype).items()}
    primitive = [*inputs.values()] + [None] * (9 - len(inputs))
    torch.library.opcheck(torch.ops.visionssm.ssd_scan.default, (*primitive, extras, 0., INF, not extras))
    for op in (torch.ops.visionssm.ssd, torch.ops.visionssm.ssd_with_state):
        torch.library.opcheck(op, (), inputs | {'dt_softplus': True, 'dt_limit': [0., 2.]})


@pytest.mark.parametrize('extras', [False, True], ids=['plain', 'extras'])
def test_opcheck_of_the_backward_op(extras):
    inputs = [*ssd_inputs(2, 70, 4, 3, 2, 5, extras).values()]
    inputs += [None] * (9 - len(inputs))
    out, states, starts = torch.ops.visionssm.ssd_scan(*inputs, extras, 0., INF, False)
    arguments = (torch.randn_like(out), torch.randn_like(states) if extras else None, *inputs, starts, extras, 0., INF)
    torch.library.opcheck(torch.ops.visionssm.ssd_scan_backward.default, (*arguments, False))


@pytest.mark.parametrize('merge', ['sum', 'none'])
def test_opcheck_of_the_2d_scan(merge):
    inputs = {'x': (2, 4, 2, 3, 5), 'dt': (2, 4, 4, 3, 5), 'A': (16,), 'B': (2, 4, 3, 3, 5), 'C': (2, 4, 3, 3, 5),
              'D': (16,)}
    inputs = {name: torch.randn(shape, requires_grad=True) for name, shape in inputs.items()}
    torch.library.opcheck(torch.ops.visionssm.ssd_2d, (), inputs | {'dt_softplus': True, 'merge': merge})


@pytest.mark.parametrize(('case', 'backend'), [
    *((name, 'aot_eager') for name in CASES),
    # a minute each: the other two differ in constants of the op alone
    *(pytest.param(name, 'inductor', marks=[needs_compiler, pytest.mark.slow]) for name in ('forward', '2d'))],
    indirect=['case'])
def test_compiles_into_one_graph_with_its_gradients(case, backend):
    module, x = case
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), module(x), atol=1e-5, rtol=1e-5)
    gradients, expected = (
        torch.autograd.grad(forward(x).square().sum(), module.parameters(), allow_unused=True)
        for forward in (compiled, module))
    for actual, wanted in zip(gradients, expected):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_public_functions_compile(case):
    def function(x):
        heads = x.flatten(2).transpose(1, 2).unflatten(-1, (-1, 1)) if x.ndim == 4 else x.unflatten(-1, (-1, 1))
        y, state = ssd(heads, heads[..., 0], -torch.ones(heads.shape[2]), heads[:, :, :1], heads[:, :, :1],
                       dt_softplus=True, return_final_states=True)
        return y.sum() + state.square().sum()

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend='aot_eager')(case[1]), function(case[1]))


def test_2d_function_compiles_with_routes_as_objects():
    routes = visionssm_kernels.Routes((visionssm_kernels.ROUTES['snake'].paths[0],) * 2)
    x, dt, B = torch.randn(2, 3, 2, 4, 5), torch.randn(2, 2, 3, 4, 5), torch.randn(2, 2, 3, 4, 5)

    def function(x):
        return ssd_2d(x, dt, -torch.ones(6), B, B, dt_softplus=True, routes=routes)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend='aot_eager')(x), function(x))


def test_scripts_and_traces_through_fx(case):
    module, x = case
    assert torch.equal(torch.jit.script(module)(x), module(x))
    assert torch.equal(torch.fx.symbolic_trace(module)(x), module(x))


@pytest.mark.parametrize('length', [1, 9, 64, 131])
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_decomposes_into_aten_ops(length, reverse):
    module, x = Mixer(reverse).eval(), torch.randn(2, length, 8)
    program = torch.export.export(module, (x,)).run_decompositions(export_decompositions())
    assert 'visionssm' not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), module(x), atol=1e-5, rtol=1e-5)


def test_decomposition_takes_and_gives_states():
    inputs = ssd_inputs(2, 131, 4, 3, 2, 5, dtype=torch.float64)
    for limit in ((0., INF), (0.2, INF), (-INF, 1.)):
        flags = (True, *limit, True)
        actual = export_decompositions()[torch.ops.visionssm.ssd_scan.default](*inputs.values(), *flags)
        expected = torch.ops.visionssm.ssd_scan(*inputs.values(), *flags)
        torch.testing.assert_close(actual[:2], expected[:2], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('name', ['forward', 'reverse', '2d'])
def test_exports_with_dynamic_sizes(name):
    make, shape = CASES[name]
    module, x = make().eval(), torch.randn(shape)
    axes = {0: torch.export.Dim('batch'), **(
        {1: torch.export.Dim('length', max=4096)} if x.ndim == 3 else
        {2: torch.export.Dim('height', max=99), 3: torch.export.Dim('width', max=99)})}
    program = torch.export.export(module, (x,), dynamic_shapes=(axes,))
    decomposed = program.run_decompositions(export_decompositions())
    assert 'visionssm' not in decomposed.graph_module.code
    for length in (2, 64, 130):
        other = torch.randn(3, length, 8) if x.ndim == 3 else torch.randn(3, 8, length // 2, 3)
        torch.testing.assert_close(program.module()(other), module(other))
        torch.testing.assert_close(decomposed.module()(other), module(other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('backend', ['chunked', 'reference'])
def test_autocast_keeps_the_state_in_float32(backend):
    inputs = ssd_inputs(2, 70, 4, 3, 2, 5)
    half = {name: x.bfloat16() if x.ndim > 2 else x for name, x in inputs.items()}
    with use_backend(backend), torch.autocast('cpu', torch.bfloat16):
        y, state = ssd(**inputs, return_final_states=True, dt_softplus=True)
        y_half, state_half = ssd(**half, return_final_states=True, dt_softplus=True)
    with use_backend(backend):
        expected = ssd(**inputs, dt_softplus=True)
        expected_half = ssd(**{name: x.float() for name, x in half.items()}, dt_softplus=True)
    assert (y.dtype, state.dtype) == (torch.float32, torch.float32)
    assert (y_half.dtype, state_half.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, expected) and torch.equal(y_half, expected_half.bfloat16())


def test_2d_scan_of_half_precision_is_rounded_once():
    x, dt, B = torch.randn(2, 4, 2, 3, 5), torch.randn(2, 4, 4, 3, 5), torch.randn(2, 4, 3, 3, 5)
    half = [t.bfloat16() for t in (x, dt)]
    expected = ssd_2d(half[0].float(), half[1].float(), -torch.ones(16), B, B, dt_softplus=True)
    assert torch.equal(ssd_2d(*half, -torch.ones(16), B, B, dt_softplus=True), expected.bfloat16())


def test_flops_count_two_for_each_multiply_add():
    inputs = {name: x.requires_grad_() for name, x in ssd_inputs(2, 9, 4, 3, 2, 5).items()}
    with FlopCounterMode(display=False) as forward:
        y = ssd(**inputs)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    elements = 2 * 9 * 4 * 3
    assert forward.get_total_flops() == elements * (5 * 5 + 3)
    assert backward.get_total_flops() == elements * (15 * 5 + 7)


def test_second_derivative_is_refused_with_the_way_out():
    x, *rest = ssd_inputs(1, 3, 2, 2, 1, 2, extras=False).values()
    x.requires_grad_()
    grad, = torch.autograd.grad(ssd(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='no second derivative'):
        grad.sum().backward()
