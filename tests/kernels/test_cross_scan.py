"""Cross scan and cross merge as public functions: official numbers bit by bit, all forms of routes, torch's tools."""
import functools

import pytest
import torch
from safetensors import safe_open
from torch import nn

from visionssm_kernels import ROUTES, Routes, cross_merge, cross_scan, export_decompositions, get_routes
from visionssm_kernels.selective_scan_2d import reference
from visionssm_kernels.selective_scan_2d.routes import windows

# the official numbers of the four-way scans
MODES = {'0': 'cross', '1': 'unidirectional', '2': 'bidirectional', '3': 'rot90'}
BOTH = Routes((windows(2), windows(3, by_column=True)))


@pytest.fixture(params=['4x5', '6x6'])
def official(request, operator_fixture) -> dict[str, torch.Tensor]:
    """The tensors of an official fixture."""
    with safe_open(operator_fixture(f'cross_scan__{request.param}.safetensors'), 'pt') as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def forms(name: str, size: tuple[int, int]) -> tuple:
    """The routes by name, as an object and as a table."""
    return name, get_routes(name), get_routes(name).table(*size)


@pytest.mark.parametrize('mode', MODES)
def test_scan_and_its_gradient_are_the_official_ones(mode, official):
    x, x4 = official['in.x'], official['in.x4']
    for routes in forms(MODES[mode], x.shape[-2:]):
        compared = 0
        for kind, given in (('scan', x), ('scan1b1', x4)):
            for layout in ('cf2cf', 'cf2cl', 'cl2cf', 'cl2cl'):
                expected = official.get(f'out.{kind}.s{mode}.{layout}')
                if expected is None:
                    continue
                actual = cross_scan(given, routes)
                actual = actual if layout.endswith('cf') else actual.permute(0, 3, 1, 2)
                assert torch.equal(actual, expected), (kind, layout)
                compared += 1
        assert compared >= 6
        leaf = x.clone().requires_grad_()
        grad, = torch.autograd.grad(cross_scan(leaf, routes), leaf, official['in.grad_scan'])
        torch.testing.assert_close(grad, official[f'grad.scan.s{mode}.x'], atol=1e-6, rtol=0)


@pytest.mark.parametrize('mode', MODES)
def test_merge_is_the_official_one(mode, official):
    size, ys = official['in.ys'].shape[-2:], official['in.ys']
    for routes in forms(MODES[mode], size):
        for layout in ('cf2cf', 'cl2cl'):
            for given in (ys, ys.flatten(-2)):
                merged = cross_merge(given, routes, size=size).flatten(-2)
                apart = cross_merge(given, routes, 'none', size=size).flatten(-2)
                if layout == 'cl2cl':
                    merged, apart = merged.movedim(-1, 1), apart.movedim(-1, 1)
                torch.testing.assert_close(merged, official[f'out.merge.s{mode}.{layout}'], atol=1e-6, rtol=0)
                assert torch.equal(apart, official[f'out.merge1b1.s{mode}.{layout}'])


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (7, 3)], ids=lambda s: f'{s[0]}x{s[1]}')
@pytest.mark.parametrize('name', ROUTES)
def test_merge_undoes_and_transposes_the_scan(name, size):
    count = len(ROUTES[name])
    x, y = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(2, count, 3, *size, dtype=torch.float64)
    sequences = cross_scan(x, name)
    assert torch.equal(sequences, cross_scan(x, ROUTES[name].table(*size)))
    assert torch.equal(cross_merge(sequences, name, 'none', size), x[:, None].expand(-1, count, -1, -1, -1))
    torch.testing.assert_close(cross_merge(sequences, name, 'mean', size), x)
    torch.testing.assert_close((sequences * y.flatten(-2)).sum(), (x * cross_merge(y, name)).sum())
    assert torch.equal(cross_merge(y, name, 'step'), y.sum(1))


def test_other_types_and_shapes():
    pixels = torch.arange(12).view(1, 1, 3, 4)
    assert torch.equal(cross_scan(pixels, BOTH)[0, :, 0], BOTH.table(3, 4).long())
    assert cross_scan(torch.randn(0, 2, 3, 4)).shape == (0, 4, 2, 12)
    table = torch.stack([torch.randperm(12), torch.randperm(12)])
    y = torch.randn(1, 2, 3, 12)
    assert cross_merge(y, table).shape == (1, 3, 12)
    assert torch.equal(cross_merge(y, table, size=(3, 4)), cross_merge(y, table).unflatten(-1, (3, 4)))
    x = torch.randn(2, 3, 4, 5).bfloat16().transpose(-1, -2)
    assert torch.equal(cross_scan(x, 'cross'), cross_scan(x.contiguous(), 'cross'))


def test_results_do_not_share_memory_with_the_arguments():
    x = torch.randn(1, 2, 3, 4)
    for name in ('raster', 'unidirectional', 'raster_reverse', 'cross'):
        before = x.clone()
        cross_scan(x, name).zero_()
        cross_merge(x[:, None].repeat(1, len(ROUTES[name]), 1, 1, 1), name, 'none').zero_()
        assert torch.equal(x, before)


def test_the_reference_of_the_scan_over_maps_uses_the_same_code():
    assert reference.cross_scan is cross_scan and reference.cross_merge is cross_merge


class RoundTrip(nn.Module):
    """What a model does between the two."""

    def __init__(self, routes: str):
        super().__init__()
        self.routes = routes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.visionssm.cross_scan(x, self.routes).cumsum(-1)
        return torch.ops.visionssm.cross_merge(y.view(2, 4, 3, 4, 5), self.routes, 'sum')


@pytest.mark.parametrize('routes', ['cross', 'snake', 'unidirectional'])
def test_scripts_traces_and_exports(routes):
    module, x = RoundTrip(routes), torch.randn(2, 3, 4, 5)
    expected = module(x)
    assert torch.equal(torch.jit.script(module)(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(module)(x), expected)
    program = torch.export.export(module, (x,)).run_decompositions(export_decompositions())
    assert 'visionssm' not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.parametrize('routes', ['rot90', BOTH, torch.arange(20).flip(0)[None]], ids=['name', 'object', 'table'])
def test_compiles_with_dynamic_sizes(routes):
    def function(x):
        sequences = cross_scan(x, routes)
        return cross_merge(sequences.cumsum(-1), routes, 'mean', x.shape[-2:])

    torch._dynamo.reset()
    fixed = isinstance(routes, torch.Tensor)
    compiled = torch.compile(function, fullgraph=True, backend='aot_eager', dynamic=not fixed)
    sizes = [(4, 5)] if fixed else [(4, 5), (3, 7)]
    for size in sizes:
        x = torch.randn(2, 3, *size, requires_grad=True)
        grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, function)]
        torch.testing.assert_close(compiled(x), function(x))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize('routes', ['cross', 'bidirectional', 'raster', 'raster_reverse'])
def test_opcheck(routes):
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.visionssm.cross_scan, (x, routes))
    y = torch.randn(2, len(ROUTES[routes]), 3, 4, 5, requires_grad=True)
    for merge in ('sum', 'none', 'step'):
        torch.library.opcheck(torch.ops.visionssm.cross_merge, (y, routes, merge))


@pytest.mark.parametrize(('call', 'error', 'message'), [
    (lambda x: cross_scan(x[0]), ValueError, r'cross_scan: x must be \(B, D, H, W\).* got \(3, 4, 5\)'),
    (lambda x: cross_scan(x[:, None]), ValueError, r'x must be \(B, K, D, H, W\) = \(2, 4, 3, 4, 5\)'),
    (lambda x: cross_scan(x, 'spiral?'), ValueError, "unknown name 'spiral"),
    (lambda x: cross_scan(x, 7), TypeError, 'cross_scan: routes must be a name, a Routes object or a table'),
    (lambda x: cross_scan(x, torch.zeros(2, 20).int()), ValueError, r'rows \[0, 1\] of the table are no permutations'),
    (lambda x: cross_scan(x, torch.arange(19)[None]), ValueError, r'a table must be \(K, L\)'),
    (lambda x: cross_merge(x), ValueError, r'cross_merge: y is \(2, 3, 4, 5\).* give size=\(H, W\)'),
    (lambda x: cross_merge(x, ROUTES['cross']), ValueError, r'give size=\(H, W\)'),
    (lambda x: cross_merge(x, size=(2, 3)), ValueError, r'size \(2, 3\) does not fit the 5 steps of y'),
    (lambda x: cross_merge(x[:, None]), ValueError, r'y must be \(B, K, D, H \* W\) = \(2, 4, 3, 20\)'),
    (lambda x: cross_merge(x[:, None], merge='max'), ValueError, "merge must be one of .*, got 'max'"),
])
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        functools.partial(call, torch.randn(2, 3, 4, 5))()
