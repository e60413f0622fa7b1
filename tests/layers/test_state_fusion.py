"""The fusion of states against its definition in plain loops, on maps of any size, and after every change of weights.

Fixtures of the official layer: tests/parity/test_spatial_mamba.py.
"""
import copy

import pytest
import torch
from timm.models._features_fx import create_feature_extractor
from torch import nn

from visionssm.layers import StateFusion
from visionssm_kernels._testing import relative_rms

SIZES = [(1, 1), (2, 3), (1, 9), (7, 3), (12, 13)]


def lively(
        dim: int = 3, dilations: tuple[int, ...] = (1, 3, 5), merged: bool = False, **dd) -> StateFusion:
    layer = StateFusion(dim, dilations, merged, **dd)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def fused_by_hand(layer: StateFusion, h: torch.Tensor) -> torch.Tensor:
    height, width = h.shape[2:]
    out = torch.zeros_like(h)
    for i in range(height):
        for j in range(width):
            for alpha, kernel, distance in zip(layer.alpha, layer.kernels, layer.dilations):
                for u in (-1, 0, 1):
                    for v in (-1, 0, 1):
                        row, column = i + u * distance, j + v * distance
                        neighbour = h[:, :, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
                        out[:, :, i, j] += alpha * kernel[:, 0, u + 1, v + 1] * neighbour
    return out


@pytest.mark.parametrize('merged', [False, True], ids=['dilated', 'merged'])
@pytest.mark.parametrize('size', SIZES, ids=lambda s: f'{s[0]}x{s[1]}')
@pytest.mark.parametrize('dilations', [(1, 3, 5), (2,), (4, 1)], ids=str)
def test_equals_its_definition_with_all_gradients(size: tuple[int, int], dilations: tuple[int, ...], merged: bool):
    layer = lively(dilations=dilations, merged=merged, dtype=torch.float64).eval()
    h = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    tensors = [h, *layer.parameters()]
    out, expected = layer(h), fused_by_hand(layer, h)
    weight = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for actual, wanted in zip(
            torch.autograd.grad(out, tensors, weight), torch.autograd.grad(expected, tensors, weight), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def test_training_and_evaluation_are_the_same():
    layer, h = lively(), torch.randn(2, 3, 7, 5)
    assert torch.equal(layer.train()(h), layer.eval()(h))


def test_the_merged_kernel_serves_evaluation_alone(monkeypatch):
    from visionssm.layers import state_fusion
    calls = []
    merge = state_fusion.merge_kernels
    monkeypatch.setattr(state_fusion, 'merge_kernels', lambda *args: calls.append(1) or merge(*args))
    layer, h = lively(merged=True), torch.randn(2, 3, 7, 5)
    trained = layer.train()(h)
    assert not calls
    torch.testing.assert_close(layer.eval()(h), trained, rtol=1e-5, atol=1e-5)
    assert calls


def load(layer: StateFusion) -> None:
    layer.load_state_dict(lively().state_dict())


def step(layer: StateFusion) -> None:
    layer(torch.randn(1, 3, 4, 4)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def edit(layer: StateFusion) -> None:
    with torch.no_grad():
        layer.kernels[1].mul_(-2)


def swap(layer: StateFusion) -> None:
    for parameter, other in zip(layer.parameters(), lively().parameters()):
        parameter.data = other.data


@pytest.mark.parametrize('merged', [False, True], ids=['dilated', 'merged'])
@pytest.mark.parametrize('change', [load, step, edit, swap])
def test_nothing_outlives_a_change_of_the_weights(change, merged: bool):
    layer, h = lively(merged=merged).eval(), torch.randn(2, 3, 6, 7)
    with torch.no_grad():
        before = layer(h)
    change(layer)
    with torch.no_grad():
        after = layer(h)
        torch.testing.assert_close(after, fused_by_hand(layer, h), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-2)


def test_copies_and_conversions_follow_their_own_weights():
    layer, h = lively().eval(), torch.randn(2, 3, 6, 7)
    layer(h)
    twin = copy.deepcopy(layer)
    edit(twin)
    torch.testing.assert_close(layer(h), fused_by_hand(layer, h), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twin(h), fused_by_hand(twin, h), rtol=1e-5, atol=1e-5)
    layer.double()
    torch.testing.assert_close(layer(h.double()), fused_by_hand(layer, h.double()), rtol=1e-10, atol=1e-10)
    assert layer.to('meta')(h.to('meta')).shape == h.shape


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
@pytest.mark.parametrize('wrap', [
    pytest.param(lambda layer: layer, id='module'),
    pytest.param(torch.jit.script, id='script'),
    pytest.param(lambda layer: torch.compile(layer, fullgraph=True, backend='aot_eager'), id='compile')])
def test_autocast_leaves_states_in_float32(wrap, dtype: torch.dtype):
    layer, h = lively(), torch.randn(2, 3, 6, 7)
    expected = layer(h)
    torch._dynamo.reset()
    wrapped = wrap(layer)
    with torch.autocast('cpu', dtype):
        out = wrapped(h)
    assert out.dtype == torch.float32
    assert relative_rms(out, expected) < 1e-6


def test_half_precision_weights_and_states_are_summed_in_float32():
    layer, h = lively().bfloat16(), torch.randn(2, 3, 6, 7).bfloat16()
    out = layer(h)
    assert out.dtype == torch.float32
    assert relative_rms(out, fused_by_hand(copy.deepcopy(layer).double(), h.double())) < 1e-6


@pytest.mark.parametrize('merged', [False, True], ids=['dilated', 'merged'])
def test_scripts_traces_and_exports(merged: bool):
    layer, h = lively(merged=merged).eval(), torch.randn(2, 3, 6, 7)
    expected = layer(h)
    torch.testing.assert_close(torch.jit.script(layer)(h), expected)
    net = create_feature_extractor(nn.Sequential(layer, nn.Identity()), ['0'])
    torch.testing.assert_close(net(h)['0'], expected)
    program = torch.export.export(layer, (h,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},))
    assert 'autocast' not in str(program.graph)
    torch.testing.assert_close(program.module()(h[:1]), expected[:1])


def test_empty_batches_and_strided_maps_pass():
    layer, h = lively(), torch.randn(2, 6, 7, 3)
    assert layer(h[:0].permute(0, 3, 1, 2)).shape == (0, 3, 6, 7)
    torch.testing.assert_close(layer(h.permute(0, 3, 1, 2)), layer(h.permute(0, 3, 1, 2).contiguous()))


@pytest.mark.parametrize('dilations', [(), (0, 1)])
def test_senseless_dilations_are_refused(dilations: tuple[int, ...]):
    with pytest.raises(ValueError, match='dilations are'):
        StateFusion(3, dilations)
