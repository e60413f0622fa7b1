"""What every backbone of the zoo promises, checked on its smallest variant; a new family is tested for being listed."""
import copy
import math
import shutil
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import visionssm

NAMES = visionssm.list_models('classification')
PICOS = [name for name in NAMES if name.endswith('_pico')]
# Families whose official recipe peaks elsewhere than at 1e-3, the value of all others.
PEAK_LEARNING_RATES = {'mamba2d_pico': 4e-3}
# Vim is no hierarchy: its maps all have the stride of its patches.
STRIDES = {'vim_pico': [4, 4, 4, 4]}
pico = pytest.mark.parametrize('name', PICOS)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ('g++', 'clang++'))), reason='inductor needs a C++ compiler')


def make(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options)


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Move every parameter off its initial value, so that zeros and ones hide nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_every_family_has_a_pico():
    families = {timm.models.model_entrypoint(name).__module__ for name in NAMES}
    assert {timm.models.model_entrypoint(name).__module__ for name in PICOS} == families


@pytest.mark.parametrize('name', NAMES)
def test_every_model_is_built_by_name_on_the_meta_device(name: str):
    model = visionssm.create_model(name, device='meta', num_classes=7)
    channels, height, width = model.default_cfg['input_size']
    assert model(torch.empty(2, channels, height, width, device='meta')).shape == (2, 7)


@pico
@pytest.mark.parametrize('size', [(33, 47), (64, 64), (40, 24)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_any_image_size_gives_maps_of_its_shape(name: str, size: tuple[int, int]):
    model = make(name).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert model(x).shape == (2, 5)
        maps = model.forward_intermediates(x, intermediates_only=True)
    for info, tap in zip(model.feature_info, maps):
        stride = info['reduction']
        assert tap.shape[:2] == (2, info['num_chs'])
        # floor or ceil of the strides: what the official convolutions give
        assert all(length / stride - 2 < n <= math.ceil(length / stride) for n, length in zip(tap.shape[2:], size))


@pico
def test_batches_are_independent_and_may_be_empty(name: str):
    model = lively(make(name)).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together = model(x)
        torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), together, atol=1e-5, rtol=1e-4)
        assert model(x[:0]).shape == (0, 5)


@pico
@pytest.mark.parametrize('shape', [(3, 32, 32), (2, 4, 32, 32)], ids=['no batch', 'four channels'])
def test_images_of_another_shape_are_refused_clearly(name: str, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match='dimensions' if len(shape) == 3 else 'channels'):
        make(name).eval()(torch.zeros(shape))


@pico
def test_a_tiny_image_gives_a_result_or_a_clear_error(name: str):
    model = make(name).eval()
    for side in (1, 2, 3, 5):
        try:
            assert model(torch.zeros(1, 3, side, side)).shape == (1, 5)
        except ValueError as error:
            assert f'{side} x {side}' in str(error), error


@pico
def test_features_have_the_strides_that_detectors_expect(name: str):
    extractor = timm.create_model(name, features_only=True)
    strides = STRIDES.get(name, [4, 8, 16, 32])
    assert extractor.feature_info.reduction() == strides
    maps = extractor(torch.randn(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == extractor.feature_info.channels()
    if name not in STRIDES:
        assert [tuple(m.shape[2:]) for m in maps] == [(64 // s, 96 // s) for s in strides]


@pico
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_autocast_stays_near_float32(name: str, dtype: torch.dtype):
    model = make(name).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_features(x)
        with torch.autocast('cpu', dtype):
            out = model.forward_features(x)
            assert model(x).isfinite().all()
    assert (out.float() - expected).norm() / expected.norm() < (0.05 if dtype == torch.bfloat16 else 0.01)


@pico
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_twenty_steps_at_the_official_peak_learning_rate_stay_finite(name: str, dtype: torch.dtype):
    model = make(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATES.get(name, 1e-3), weight_decay=0.05)
    scaler = torch.amp.GradScaler('cpu', enabled=dtype == torch.float16)
    x, y = torch.randn(5, 3, 32, 32), torch.arange(5)
    losses = []
    for _ in range(20):
        with torch.autocast('cpu', dtype):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses), losses
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert min(losses[-5:]) < 0.7 * losses[0], losses


@pico
def test_gradients_reach_every_parameter_with_checkpointing_too(name: str):
    x = torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model = lively(make(name)).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(x).square().mean().backward()
        grads.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert [key for key, grad in grads[0].items() if grad is None or not grad.isfinite().all()] == []
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6, rtol=1e-4)


@pico
def test_weights_can_be_drawn_after_to_empty(name: str):
    model = make(name, device='meta', dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())
    model = model.to_empty(device='cpu').eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
    model.init_weights()
    assert [n for n, p in [*model.named_parameters(), *model.named_buffers()] if not p.isfinite().all()] == []
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).isfinite().all()


@pico
def test_low_precision_weights_give_low_precision_outputs(name: str):
    model = make(name).eval().to(torch.bfloat16)
    out = model(torch.randn(2, 3, 32, 32).bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pico
def test_copies_and_state_dicts_are_independent(name: str):
    model = lively(make(name)).eval()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    fresh = make(name).eval()
    with torch.no_grad():
        expected = model(x)
        lively(twin)
        assert torch.equal(model(x), expected) and not torch.allclose(twin(x), expected)
        fresh(x)  # nothing that a forward pass may have kept outlives new weights
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), expected)


@pico
def test_exported_program_equals_the_model(name: str, shallow: Callable[[str], dict]):
    model = lively(make(name, **shallow(name))).eval()
    x = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},)).module()
    for batch in (1, 2, 3):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-4)


@pico
def test_compiles_into_one_graph_for_every_batch_size(name: str, shallow: Callable[[str], dict]):
    model = lively(make(name, **shallow(name))).train()
    model.requires_grad_(True)
    for module in model.modules():  # batch statistics would differ between the two passes
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    torch._dynamo.reset()
    backend = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 32, 32)
        torch._dynamo.mark_dynamic(x, 0)  # compiling raises where the graph would hold for one size only
        actual, expected = (
            torch.autograd.grad(call(x).square().mean(), list(model.parameters())) for call in (compiled, model))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-3)
    assert backend.frame_count == 1


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize('name', ['vmamba_pico', 'vssd_pico'])  # a minute each; without a compiler all are above
def test_inductor_gives_the_same_output(name: str, shallow: Callable[[str], dict]):
    model = lively(make(name, **shallow(name))).eval()
    x = torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-3)
