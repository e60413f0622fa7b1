"""DiS: guidance as the official code computes it, conditions, odd inputs; outputs and gradients stand in parity."""
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import visionssm
from visionssm.diffusion import DiS
from visionssm.diffusion.dis import timestep_embedding

ROOT = Path(__file__).resolve().parent.parent.parent
OUTER, OWN = ROOT.parent / 'shared' / 'golden' / 'dis', ROOT / 'tests' / 'golden' / 'dis'
FOLDER = OUTER if OUTER.is_dir() else OWN
CASES = sorted(path.stem for path in FOLDER.glob('*p2.safetensors'))


@pytest.fixture
def pico() -> DiS:
    torch.manual_seed(0)
    return visionssm.create_model('dis_pico').eval()


@pytest.mark.parametrize('case', CASES)
def test_guidance_equals_the_official_one(case):
    with safe_open(FOLDER / f'{case}.safetensors', 'pt') as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    state = {key.removeprefix('state_dict.'): value for key, value in tensors.items() if key.startswith('state_dict.')}
    model = visionssm.from_official('dis', state, json.loads(meta['config'])).eval()
    x, t = (tensors.get(f'cfg.{ours}', tensors[theirs]) for ours, theirs in (('input', 'input'), ('t', 'input.t')))
    with torch.no_grad():
        out = model.forward_with_cfg(x, t, tensors.get('cfg.y'), float(meta.get('cfg_scale', 1.5)))
    torch.testing.assert_close(out, tensors['cfg.output'], atol=float(meta['atol']), rtol=float(meta['rtol']))


def test_time_is_a_cosine_and_a_sine_of_each_frequency():
    table = timestep_embedding(torch.tensor([0, 5]), 7)
    assert table.shape == (2, 7) and table.dtype == torch.float32
    assert table[0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    torch.testing.assert_close(table[1, 0], torch.tensor(5.).cos())
    torch.testing.assert_close(table[1, 4], (5 * torch.tensor(10000.) ** (-1 / 3)).sin())


def test_classes_matter_and_are_hidden_in_training_only(pico):
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 700])
    zero, one = (pico(x, t, torch.full((2,), label)) for label in (0, 1))
    assert zero.shape == (2, 2, 28, 28) and not torch.allclose(zero, one)
    assert torch.equal(zero, pico(x, t, torch.zeros(2, dtype=torch.long)))
    hidden = DiS(img_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=2, class_dropout_prob=1.0,
                 drop_path_rate=0.).train()
    x, t = torch.randn(1, 1, 4, 4), torch.tensor([1])
    assert torch.equal(hidden(x, t, torch.tensor([0])), hidden(x, t, torch.tensor([3])))


def test_all_parameters_learn_and_checkpointing_changes_nothing(pico):
    pico.train()
    pico.class_dropout_prob = 0.
    for block in pico.modules():
        if hasattr(block, 'drop_prob'):
            block.drop_prob = 0.
    x, t, y = torch.randn(2, 1, 28, 28), torch.tensor([3, 700]), torch.tensor([1, 2])
    gradients = []
    for enable in (False, True):
        pico.set_grad_checkpointing(enable)
        pico.zero_grad()
        pico(x, t, y).square().sum().backward()
        gradients.append([p.grad.clone() for p in pico.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-5)


def test_half_precision_stays_finite(pico):
    x, t, y = torch.randn(2, 1, 28, 28), torch.tensor([0, 999]), torch.tensor([0, 10])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = pico(x, t, y)
    wide = pico(x, t, y)
    assert torch.isfinite(out).all() and (out.float() - wide).abs().mean() < 0.05 * wide.abs().mean()
    assert pico.bfloat16()(x.bfloat16(), t, y).dtype == torch.bfloat16


def test_an_empty_batch_passes(pico):
    assert pico(torch.empty(0, 1, 28, 28), torch.empty(0), torch.empty(0, dtype=torch.long)).shape == (0, 2, 28, 28)


@pytest.mark.parametrize(('call', 'message'), [
    (lambda model: model(torch.randn(1, 1, 32, 32), torch.zeros(1), torch.zeros(1)), r'\(B, 1, 28, 28\)'),
    (lambda model: model(torch.randn(1, 4, 28, 28), torch.zeros(1), torch.zeros(1)), 'in_chans'),
    (lambda model: model(torch.randn(2, 1, 28, 28), torch.zeros(1), torch.zeros(2)), 'one time step an image'),
    (lambda model: model(torch.randn(1, 1, 28, 28), torch.zeros(1)), '0 to 9, or 10 for none'),
    (lambda model: model(torch.randn(2, 1, 28, 28), torch.zeros(2), torch.zeros(1).long()), 'one class an image'),
    (lambda model: model.forward_with_cfg(torch.randn(3, 1, 28, 28), torch.zeros(3)), 'two halves'),
    (lambda model: DiS(img_size=9, patch_size=2), 'multiple of patch_size'),
    (lambda model: DiS(depth=1), 'depth is 1'),
    (lambda model: DiS(img_size=8, num_classes=0, embed_dim=16, depth=2)(
        torch.randn(1, 4, 8, 8), torch.zeros(1), torch.zeros(1).long()), 'takes no classes'),
])
def test_wrong_inputs_are_named(pico, call, message):
    with pytest.raises(ValueError, match=message):
        call(pico)
