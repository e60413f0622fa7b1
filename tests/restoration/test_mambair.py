"""MambaIR in both versions: what the fixtures of the official code hold beyond plain outputs, options, odd inputs."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import visionssm
from visionssm.checkpoints import CheckpointError
from visionssm.restoration import MambaIR, MambaIRUNet, MambaIRv2
from visionssm.restoration.heads import pad_to_multiple

ROOT = Path(__file__).resolve().parent.parent.parent
OUTER = ROOT.parent / 'shared' / 'golden' / 'mambair'
OWN = ROOT / 'tests' / 'golden' / 'mambair'
NOISY = sorted(path.stem for path in (OUTER if OUTER.is_dir() else OWN).glob('mambairv2*.safetensors'))
FULL = sorted((OUTER / 'full').glob('*.safetensors'))
MODELS = ['mambair_pico', 'mambairv2_pico']


def read(path: Path) -> tuple[dict, dict]:
    with safe_open(path, 'pt') as file:
        return dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}


def from_fixture(meta: dict, state_dict: dict) -> torch.nn.Module:
    return visionssm.from_official(meta['family'], state_dict, json.loads(meta['config']),
                                   official_class=meta['official_class']).eval()


@pytest.mark.parametrize('case', NOISY)
def test_recorded_noise_gives_what_the_official_code_gave(case):
    meta, tensors = read((OUTER if OUTER.is_dir() else OWN) / f'{case}.safetensors')
    model = from_fixture(meta, {key[11:]: value for key, value in tensors.items() if key.startswith('state_dict.')})
    noise = [tensors[f'gumbel.{i}'] for i in range(sum(key.startswith('gumbel.') for key in tensors))]
    x = tensors['input'].clone().requires_grad_()
    out = model(x, noise)
    assert (out - tensors['output_noisy']).abs().max() <= float(meta['atol'])
    assert not torch.allclose(tensors['output'], tensors['output_noisy'], atol=1e-3)
    (out * tensors['loss_weight']).sum().backward()
    expected = tensors['grad_noisy.input']
    assert (x.grad - expected).abs().max() <= float(meta['grad_rtol']) * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize('path', FULL or [pytest.param(None, marks=pytest.mark.skip(reason='no outer fixtures here'))],
                         ids=lambda path: path.stem if path else 'absent')
def test_released_sizes_compute_what_the_official_code_computes(path):
    spec = importlib.util.spec_from_file_location('recipe', path.parent / 'recipe.py')
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    meta, tensors = read(path)
    model = visionssm.create_model(path.stem)
    weights = recipe.fill(visionssm.to_official(meta['family'], model))
    model = from_fixture(meta, weights)
    with torch.no_grad():
        out = model(tensors['input'])
    assert (out - tensors['output64'].float()).abs().max() <= float(meta['atol'])


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('size', [(1, 1), (3, 50), (17, 16)])
def test_any_size_is_restored(name, size):
    model = visionssm.create_model(name).eval()
    assert model(torch.rand(1, 3, *size)).shape == (1, 3, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize('name', MODELS)
def test_every_parameter_learns_and_checkpointing_changes_nothing(name):
    torch.manual_seed(0)
    model = visionssm.create_model(name).eval()
    x = torch.rand(2, 3, 8, 9)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_half_precision_stays_finite_and_close(name):
    torch.manual_seed(0)
    model = visionssm.create_model(name).eval()
    x = torch.rand(1, 3, 16, 16)
    wide = model(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        narrow = model(x).float()
    assert torch.isfinite(narrow).all()
    assert (narrow - wide).abs().mean() < 0.05 * wide.abs().mean()
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_the_choice_of_kinds_is_random_in_training_only():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16)
    model = visionssm.create_model('mambairv2_pico')
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    always = visionssm.create_model('mambairv2_pico', route_noise='always').eval()
    assert not torch.equal(always(x), always(x))
    never = visionssm.create_model('mambairv2_pico', route_noise='never').train()
    assert torch.equal(never(x), never(x))


def test_padding_mirrors_with_the_edge_pixel_however_small_the_image():
    row = torch.arange(3.).view(1, 1, 1, 3)
    assert pad_to_multiple(row, 8).shape == (1, 1, 8, 8)
    assert pad_to_multiple(row, 8)[0, 0, 0].tolist() == [0, 1, 2, 2, 1, 0, 0, 1]


@pytest.mark.parametrize('upsampler', ['residual', 'pixelshuffle', 'pixelshuffledirect', 'nearest+conv'])
def test_every_head_builds_and_its_weights_come_back_under_official_names(upsampler):
    scale = 1 if upsampler == 'residual' else 4
    model = MambaIRv2(embed_dim=12, depths=(1,), num_heads=2, window_size=8, d_state=2, inner_rank=2, num_tokens=4,
                      upsampler=upsampler, upscale=scale).eval()
    official = visionssm.to_official('mambairv2', model)
    back = visionssm.from_official('mambairv2', official).eval()
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(back(x), model(x)) and model(x).shape[-1] == 8 * scale


def test_the_unet_takes_sides_that_eight_does_not_divide():
    model = MambaIRUNet(dim=32, depths=(1, 1, 1, 1), refinement=1, d_state=2)
    assert model(torch.rand(1, 3, 13, 7)).shape == (1, 3, 13, 7)


@pytest.mark.parametrize(('build', 'message'), [
    (lambda: MambaIR(embed_dim=20, depths=(1,)), 'at least 30'),
    (lambda: MambaIR(embed_dim=32, depths=()), 'at least one block'),
    (lambda: MambaIR(embed_dim=32, depths=(1,), upscale=2), "'residual' keeps the size"),
    (lambda: MambaIR(embed_dim=32, depths=(1,), upscale=5, upsampler='pixelshuffle'), 'upscale is 5'),
    (lambda: MambaIR(embed_dim=32, depths=(1,), upsampler='pixelshufle'), 'pixelshuffle'),
    (lambda: MambaIRv2(embed_dim=12, depths=(1,), num_heads=5), 'must divide'),
    (lambda: MambaIRv2(embed_dim=12, depths=(1, 1), num_heads=(2,)), 'one a group'),
    (lambda: MambaIRv2(embed_dim=12, depths=(1,), num_heads=2, window_size=7), 'even number'),
    (lambda: visionssm.create_model('mambair_pico')(torch.rand(1, 1, 8, 8)), r'\(B, 3, H, W\)'),
])
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_weights_of_another_scale_are_refused(tmp_path):
    path = tmp_path / 'x4.pth'
    official = visionssm.to_official('mambair', visionssm.create_model('mambair_pico', upscale=4))
    torch.save({'params_ema': official}, path)
    model = visionssm.create_model('mambair_pico', upscale=4, checkpoint_path=path)
    assert model.upscale == 4
    with pytest.raises(CheckpointError, match='head.upsample.0.weight'):
        visionssm.create_model('mambair_pico', checkpoint_path=path)
