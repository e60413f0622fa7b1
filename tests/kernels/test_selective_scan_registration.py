"""The scans as registered ops: opcheck, compile, export, scripting, tracing, autocast, FLOPs."""
import functools
import shutil

import pytest
import torch
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import visionssm_kernels
from visionssm_kernels import selective_scan, selective_scan_2d, use_backend
from visionssm_kernels._testing import assert_same_results, results_and_gradients, scan_inputs

K = 4
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ('g++', 'clang++'))), reason='inductor needs a C++ compiler')


def scan_2d_inputs(batch=2, dim=3, height=5, width=7, state=2):
    make = torch.randn
    return {'u': make(batch, dim, height, width), 'delta': make(batch, K, dim, height, width),
            'A': -torch.rand(K * dim, state), 'B': make(batch, K, state, height, width),
            'C': make(batch, K, state, height, width), 'D': make(K * dim), 'delta_bias': make(K * dim)}


class Scan(torch.nn.Module):
    def forward(self, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
                D: torch.Tensor, z: torch.Tensor, delta_bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.visionssm.selective_scan(u, delta, A, B, C, D, z, delta_bias, True)


class Scan2d(torch.nn.Module):
    def forward(self, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
                D: torch.Tensor, delta_bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.visionssm.selective_scan_2d(u, delta, A, B, C, D, delta_bias, True, 'rot90', 'mean')


CASES = {'1d': (Scan, functools.partial(scan_inputs, 2, 6, 70, 3)), '2d': (Scan2d, scan_2d_inputs)}


@pytest.mark.parametrize('extras', [True, False], ids=['extras', 'plain'])
def test_opcheck_of_the_1d_scan(extras):
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(2, 4, 9, 3, extras=extras).items()}
    torch.library.opcheck(torch.ops.visionssm.selective_scan, (), inputs | {'delta_softplus': True})
    torch.library.opcheck(torch.ops.visionssm.selective_scan_with_state, (), inputs)


@pytest.mark.parametrize('merge', ['sum', 'none'])
def test_opcheck_of_the_2d_scan(merge):
    inputs = {name: x.requires_grad_() for name, x in scan_2d_inputs().items()}
    torch.library.opcheck(torch.ops.visionssm.selective_scan_2d, (), inputs | {'merge': merge, 'routes': 'snake'})


@pytest.mark.parametrize('z', [True, False], ids=['gated', 'plain'])
def test_opcheck_of_the_primitive(z):
    make = torch.randn
    args = [make(2, 1, 3, 9), make(2, 2, 3, 9), -torch.rand(2, 3, 4), make(2, 2, 1, 4, 9), make(2, 3, 4),
            make(2, 3), make(2, 2, 3, 9) if z else None, None]
    args = [x if x is None else x.requires_grad_() for x in args]
    index = torch.stack([torch.randperm(9) for _ in range(2)]).int()
    torch.library.opcheck(torch.ops.visionssm.routed_scan, (*args, index, True, False, not z))


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=needs_compiler)])
@pytest.mark.parametrize('case', CASES)
def test_compiles_without_graph_breaks(case, backend):
    module, make = CASES[case]
    inputs = make()
    torch._dynamo.reset()
    compiled = torch.compile(module(), fullgraph=True, backend=backend)
    assert_same_results(results_and_gradients(compiled, inputs), results_and_gradients(module(), inputs), 1e-6, 1e-6)


def test_public_functions_compile_with_routes_as_objects():
    inputs = scan_2d_inputs()
    routes = visionssm_kernels.Routes((visionssm_kernels.ROUTES['snake'].paths[0],) * K)
    torch._dynamo.reset()
    scan = functools.partial(selective_scan_2d, routes=routes, delta_softplus=True)
    compiled = torch.compile(scan, fullgraph=True, backend='aot_eager')
    assert_same_results(results_and_gradients(compiled, inputs), results_and_gradients(scan, inputs), 1e-6, 1e-6)


@pytest.mark.parametrize('case', CASES)
def test_exports_with_dynamic_sizes_and_decomposes_to_aten(case):
    module, make = CASES[case]
    batch, height, width = (Dim(name, min=2, max=512) for name in ('batch', 'height', 'width'))
    if case == '1d':
        sizes = {name: None if name in ('A', 'D', 'delta_bias') else {0: batch, 2: width} for name in make()}
        others = [scan_inputs(3, 6, length, 3) for length in (2, 64, 131)]
    else:
        sizes = {name: {0: batch, x.ndim - 2: height, x.ndim - 1: width} if x.ndim > 2 else None
                 for name, x in make().items()}
        others = [scan_2d_inputs(3, height=h, width=w) for h, w in ((2, 2), (8, 8), (9, 16))]
    program = torch.export.export(module(), (), make(), dynamic_shapes=sizes)
    decomposed = program.run_decompositions(
        torch.export.default_decompositions() | visionssm_kernels.export_decompositions())
    assert not [node for node in decomposed.graph.nodes if 'visionssm' in str(node.target)]
    for inputs in others:
        expected = module()(**inputs)
        torch.testing.assert_close(program.module()(**inputs), expected)
        torch.testing.assert_close(decomposed.module()(**inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('case', CASES)
def test_scripts_and_traces(case):
    module, make = CASES[case]
    inputs = make()
    expected = module()(**inputs)
    assert torch.equal(torch.jit.script(module())(**inputs), expected)
    assert torch.equal(torch.fx.symbolic_trace(module())(**inputs), expected)


def test_autocast_keeps_the_state_in_float32(cpu_backend):
    inputs = scan_inputs(2, 6, 70, 3)
    half = {name: x.bfloat16() if name in ('u', 'delta', 'B', 'C', 'z') else x for name, x in inputs.items()}
    with use_backend(cpu_backend), torch.autocast('cpu', torch.bfloat16):
        y, state = selective_scan(**inputs, return_last_state=True, delta_softplus=True)
        y_half, state_half = selective_scan(**half, return_last_state=True, delta_softplus=True)
    with use_backend(cpu_backend):
        expected = selective_scan(**{name: x.float() for name, x in half.items()}, delta_softplus=True)
    assert (y.dtype, state.dtype) == (torch.float32, torch.float32)
    assert (y_half.dtype, state_half.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y_half, expected.bfloat16())


def test_flop_counter_sees_forward_and_backward():
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(2, 6, 70, 3).items()}
    with FlopCounterMode(display=False) as forward:
        y = selective_scan(**inputs)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * 6 * 70 * (6 * 3 + 3)
    assert backward.get_total_flops() == 2 * 6 * 70 * (18 * 3 + 7)
