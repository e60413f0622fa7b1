"""Multi-head scan and the attention over its routes: definitions, edges of the range, every option."""
import pytest
import torch
import torch.nn.functional as F

from visionssm.layers import GatedMultiHeadScan, MultiHeadScan, scan_route_attention
from visionssm_kernels import get_routes


def official_fusion(y: torch.Tensor, threshold: float) -> torch.Tensor:
    """The formula as it is published, with PyTorch's own deviation."""
    variation = y.std(2) / ((y - y.min(2, keepdim=True).values).mean(2) + 1e-5)
    return y.sum(2) * F.relu(variation - threshold)


def lively(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize('threshold', [0., 0.4, 0.9])
def test_fusion_equals_the_formula_with_its_gradient(threshold: float):
    y = torch.randn(2, 3, 4, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 5, 3, 2, dtype=torch.float64)
    actual, expected = scan_route_attention(y, threshold), official_fusion(y, threshold)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad((out * weight).sum(), y)[0] for out in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)


@pytest.mark.parametrize('threshold', [-0.5, 0., 0.4])
@pytest.mark.parametrize('value', [0., 1.3, -1e30])
def test_routes_that_agree_have_the_official_finite_gradient(value: float, threshold: float):
    y = torch.full((1, 1, 4, 1, 1, 1), value, requires_grad=True)
    actual, expected = (torch.autograd.grad(fuse(y, threshold).sum(), y)[0]
                        for fuse in (scan_route_attention, official_fusion))
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('spread', [1e-30, 1e-8, 1e-3])
def test_routes_that_hardly_differ_have_finite_gradients(spread: float):
    y = (spread * torch.randn(2, 2, 4, 3, 2, 2)).requires_grad_()
    scan_route_attention(y, 0.4).sum().backward()
    assert y.grad.isfinite().all()


def test_four_routes_that_differ_pass_every_threshold_below_two_thirds():
    """Why the official thresholds up to 0.5 leave out only routes that agree to 1e-5."""
    y = torch.rand(50, 1, 4, 20, 3, 3, dtype=torch.float64)
    y[0, 0, :3], y[0, 0, 3] = 1, 0  # the least variation that four numbers can have
    assert (scan_route_attention(y, 0.66) != 0).all()
    assert (scan_route_attention(y[:1], 0.67) == 0).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_fusion_is_computed_in_float32(dtype: torch.dtype):
    y = torch.randn(1, 2, 4, 3, 2, 2).to(dtype)
    out = scan_route_attention(y, 0.4)
    assert out.dtype == torch.float32 and torch.equal(out, scan_route_attention(y.float(), 0.4))


def scan_by_hand(head: torch.nn.Module, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """One head of a map (D, L), step by step: (4, D, L)."""
    rank, state = head.dt_proj.shape[2], head.A_log.shape[1]
    out = []
    for k, route in enumerate(table.long()):
        rows = slice(k * head.dim, (k + 1) * head.dim)
        y, memory = torch.zeros_like(x), x.new_zeros(head.dim, state)
        for pixel in route:
            dt, B, C = (head.x_proj[k] @ x[:, pixel]).split([rank, state, state])
            delta = F.softplus(head.dt_proj[k] @ dt + head.dt_bias[k])[:, None]
            memory = torch.exp(-delta * head.A_log[rows].exp()) * memory + delta * B * x[:, pixel, None]
            y[:, pixel] = memory @ C + head.D[rows] * x[:, pixel]
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize(('dim', 'num_heads', 'project_out'), [(14, 4, True), (9, 3, False), (11, 3, True)])
def test_scan_is_what_its_description_says(dim: int, num_heads: int, project_out: bool):
    scan = lively(MultiHeadScan(dim, 3, num_heads, project_out, 0.2, dtype=torch.float64))
    x = torch.randn(1, dim, 3, 4, dtype=torch.float64)
    parts = (scan.proj.weight @ x[0].flatten(1)).chunk(num_heads)
    fused = []
    for (name, head), part in zip(scan.heads.items(), parts, strict=True):
        y = scan_by_hand(head, part, get_routes(f'mhs_{name.lower()}').table(3, 4))
        fused.append(official_fusion(y[None, None, ..., None], 0.2)[0, 0, ..., 0])
    expected = torch.cat(fused).t()
    if project_out:
        expected = F.layer_norm(expected, [len(expected[0])], scan.cat_norm.weight, scan.cat_norm.bias)
        expected = expected @ scan.out_proj.weight.t()
    torch.testing.assert_close(scan(x)[0].flatten(0, 1), expected, rtol=0, atol=1e-9)


def test_gate_and_convolution_stand_around_the_scan():
    mixer = lively(GatedMultiHeadScan(8, 4, dtype=torch.float64))
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    u, z = (x @ mixer.in_proj.weight.t()).chunk(2, -1)
    u = F.silu(F.conv2d(u.permute(0, 3, 1, 2), mixer.conv.weight, mixer.conv.bias, padding=1, groups=8))
    y = F.layer_norm(mixer.scan(u), [8], mixer.out_norm.weight, mixer.out_norm.bias)
    torch.testing.assert_close(mixer(x), y * F.silu(z), rtol=0, atol=1e-12)


def test_without_a_gate_the_convolution_reads_the_input():
    mixer = lively(GatedMultiHeadScan(8, 4, gated=False, dtype=torch.float64))
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    u = F.silu(F.conv2d(x.permute(0, 3, 1, 2), mixer.conv.weight, mixer.conv.bias, padding=1, groups=8))
    y = F.layer_norm(mixer.scan(u), [8], mixer.out_norm.weight, mixer.out_norm.bias)
    torch.testing.assert_close(mixer(x), y, rtol=0, atol=1e-12)
    assert 'in_proj.weight' not in mixer.state_dict()


@pytest.mark.parametrize('size', [(1, 1), (1, 6), (5, 1), (4, 7)], ids=lambda s: f'{s[0]}x{s[1]}')
@pytest.mark.parametrize('num_heads', [3, 4])
def test_any_map_gives_finite_values_and_gradients(num_heads: int, size: tuple[int, int]):
    mixer = GatedMultiHeadScan(13, 4, num_heads)
    x = torch.randn(2, *size, 13, requires_grad=True)
    mixer(x).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in mixer.parameters())


def test_an_empty_batch_stays_empty():
    assert GatedMultiHeadScan(12, 4, 3)(torch.zeros(0, 3, 4, 12)).shape == (0, 3, 4, 12)


def test_constant_maps_give_finite_gradients():
    """All routes of a map of zeros agree exactly."""
    scan = MultiHeadScan(8, 4)
    x = torch.zeros(1, 8, 3, 3, requires_grad=True)
    scan(x).sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in scan.parameters())


@pytest.mark.parametrize('project_out', [True, False], ids=['projected', 'bare'])
def test_scripts(project_out: bool):
    mixer = lively(GatedMultiHeadScan(12, 4, 4, project_out))
    x = torch.randn(2, 3, 4, 12)
    assert torch.equal(torch.jit.script(mixer)(x), mixer(x))


@pytest.mark.parametrize('project_out', [True, False], ids=['projected', 'bare'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_autocast_keep_their_types(dtype: torch.dtype, project_out: bool):
    mixer = GatedMultiHeadScan(12, 4, 4, project_out)
    x = torch.randn(2, 3, 4, 12)
    expected = mixer(x)
    with torch.autocast('cpu', dtype):
        torch.testing.assert_close(mixer(x).float(), expected, atol=0.2, rtol=0.1)
    out = mixer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and out.isfinite().all()


def test_scan_starts_like_every_selective_scan():
    scan = MultiHeadScan(32, 16)
    for head in scan.heads.values():
        torch.testing.assert_close(head.A_log, torch.arange(1., 17).log().expand(32, -1))
        assert (head.D == 1).all() and head.dt_proj.shape == (4, 8, 1)


@pytest.mark.parametrize(('options', 'message'), [
    ({'dim': 8, 'num_heads': 2}, 'num_heads is 2; paths are defined for 3 and 4'),
    ({'dim': 3}, 'dim is 3; 4 heads need at least 4 channels'),
    ({'dim': 10, 'project_out': False}, 'dim is 10, no multiple of the 4 heads'),
    ({'dim': 8, 'd_conv': 4}, 'd_conv is 4; an odd side'),
])
def test_impossible_options_are_explained(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GatedMultiHeadScan(**options)
