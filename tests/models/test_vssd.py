"""What is VSSD's own: the forms of its mixer, its official names and files, and what they tell."""
import json
import math
import os
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open

import visionssm
from visionssm.checkpoints import CheckpointError
from visionssm.models import VSSD
from visionssm.models._official import find_official, translate_key, translate_keys
from visionssm.models.vssd import _MIXER_KEYS, SSDMixer

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = [Path(os.environ.get('VISIONSSM_GOLDEN', '')), ROOT.parent / 'shared' / 'golden', ROOT / 'tests' / 'golden']
TINY = {'embed_dim': 8, 'depths': [1, 1], 'num_heads': [2, 4], 'd_state': 3, 'num_classes': 3,
        'attn_types': ['mamba2', 'standard']}
CONFIGS = {
    'released': {},
    'simple': {'simple_patch_embed': True, 'simple_downsample': True, 'mlp_ratio': 1.5},
    'attention first': {'attn_types': ['standard', 'mamba2'], 'in_chans': 2},
    'one group a head': {'ssd_ngroups': -1, 'attn_types': ['mamba2', 'mamba2'], 'ssd_expansion': 3},
    'initial states': {'linear_attn_duality': False, 'learnable_init_states': True, 'ssd_ngroups': 2},
    'no classifier': {'num_classes': 0},
}


def operator_fixture(name: str) -> Path:
    return next(place / 'ops' / name for place in PLACES if (place / 'ops' / name).exists())


def official_state_dict(config: dict, official_class: str = 'VMAMBA2') -> dict[str, torch.Tensor]:
    """Random weights in the official names."""
    module = find_official('vssd').build(official_class, {**TINY, **config})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return visionssm.to_official('vssd', module, official_class=official_class)


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_keys_tell_the_configuration(config: dict):
    state_dict = official_state_dict(config)
    model = visionssm.from_official('vssd', state_dict, {**TINY, **config}).eval()
    inferred = visionssm.from_official('vssd', state_dict).eval()
    assert visionssm.to_official('vssd', inferred).keys() == state_dict.keys()
    x = torch.randn(2, model.in_chans, 17, 23)
    torch.testing.assert_close(inferred(x), model(x))


def test_foreign_keys_are_refused():
    with pytest.raises(ValueError, match='not the keys of an official VSSD'):
        visionssm.from_official('vssd', {'cls_token': torch.zeros(1)})


def test_the_dense_class_taps_stages():
    config = {'out_indices': [1]}
    state_dict = official_state_dict(config, 'MM_VSSD')
    assert not any(key.startswith(('norm.', 'head.')) for key in state_dict)
    model = visionssm.from_official('vssd', state_dict, {**TINY, **config}, official_class='MM_VSSD').eval()
    assert [tuple(m.shape) for m in model(torch.randn(2, 3, 33, 47))] == [(2, 16, 5, 6)]


def test_averaged_weights_are_taken_from_files_named_so():
    model = timm.create_model('vssd_pico')
    plain = model.state_dict()
    averaged = {key: value + 1 for key, value in plain.items()}
    checkpoint = {'model': plain, 'model_ema': averaged}
    filtered = {}
    for name in ('vssd_tiny_best_ema.pth', 'vssd_micro_best.pth'):
        model.pretrained_cfg = {**model.pretrained_cfg, 'url': f'https://huggingface.co/{name}'}
        filtered[name] = visionssm.models.vssd.checkpoint_filter_fn(checkpoint, model)['head.fc.bias']
    assert torch.equal(filtered['vssd_tiny_best_ema.pth'], averaged['head.fc.bias'])
    assert torch.equal(filtered['vssd_micro_best.pth'], plain['head.fc.bias'])
    with pytest.raises(CheckpointError, match='does not fit'):
        visionssm.models.vssd.checkpoint_filter_fn({'model': {'stem.wrong': torch.zeros(1)}}, model)


@pytest.mark.parametrize(('options', 'message'), [
    ({'scan': 'both'}, 'needs an even number'),
    ({'scan': 'none', 'learn_initial_states': True}, "only scan='forward' has an initial state"),
    ({'num_groups': 3}, 'must divide the 4 heads'),
    ({'num_heads': 3}, 'must divide the 16 inner channels'),
    ({'scan': 'backward'}, "allowed are 'none', 'forward', 'both'"),
], ids=['odd groups', 'no state', 'groups', 'heads', 'scan'])
def test_options_that_do_not_go_together_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SSDMixer(8, **{'num_heads': 4, **options})


def test_as_many_heads_as_stages():
    with pytest.raises(ValueError, match='give as many of one as of the other'):
        VSSD(depths=(1, 1), num_heads=(2,), mixers=('ssd', 'ssd'))


@pytest.mark.parametrize('case', ['nc_g1', 'causal_g2'])
def test_official_mixers(case: str):
    with safe_open(operator_fixture(f'vssd_mixer__{case}.safetensors'), 'pt') as file:
        config = json.loads(file.metadata()['config'])
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}
    mixer = SSDMixer(
        config['d_model'], config['expand'] * config['d_model'] // config['headdim'], config['d_state'],
        config['expand'], config['ngroups'], 'none' if config['linear_attn_duality'] else 'forward').double()
    mixer.load_state_dict(translate_keys(
        {key[11:]: x for key, x in tensors.items() if key.startswith('state_dict.')}, _MIXER_KEYS))
    x = tensors['input'].unflatten(1, (config['H'], config['W'])).requires_grad_()
    out = mixer(x).flatten(1, 2)
    assert (out - tensors['output64']).abs().max() <= 1e-12
    (out * tensors['loss_weight']).sum().backward()
    grads = {'input': x.grad.flatten(1, 2), **{name: p.grad for name, p in mixer.named_parameters()}}
    for key, grad in tensors.items():
        if key.startswith('grad.'):
            gap = (grads[translate_key(key[5:], _MIXER_KEYS)] - grad).abs().max()
            assert gap <= 1e-5 * grad.abs().max(), key


def written_out(mixer: SSDMixer, x: torch.Tensor, halves: int, limit: tuple[float, float]) -> torch.Tensor:
    """The mixer step by step: heads of each half scan the pixels in their order, one after the other."""
    inner, heads, groups, state = mixer.inner, mixer.heads, mixer.groups, mixer.d_state
    z, u, dt = mixer.in_proj(x).split([inner, inner + 2 * groups * state, heads], dim=-1)
    u = F.silu(mixer.conv(u.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)
    v, B, C = u.split([inner, groups * state, groups * state], dim=-1)
    v, B, C = v.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
    dt = F.softplus(dt.flatten(1, 2) + mixer.dt_bias).clamp(*limit)
    y = torch.empty_like(v)
    for m in range(heads):
        group = m // (heads // groups)
        order = range(v.shape[1]) if halves == 1 or m < heads // 2 else reversed(range(v.shape[1]))
        h = v.new_zeros(len(x), v.shape[3], state)
        h = h if mixer.initial_states is None else h + mixer.initial_states[m]
        for l in order:
            step = dt[:, l, m, None, None]
            h = torch.exp(-step * mixer.A_log[m].exp()) * h + step * v[:, l, m, :, None] * B[:, l, group, None]
            y[:, l, m] = (h * C[:, l, group, None]).sum(-1) + mixer.D[m] * v[:, l, m]
    y = F.layer_norm(y.flatten(2), [inner], mixer.out_norm.weight, mixer.out_norm.bias, 1e-5)
    return mixer.out_proj(y.reshape_as(z) * z)


@pytest.mark.parametrize('options', [
    {'scan': 'forward', 'num_groups': 2, 'learn_initial_states': True, 'dt_limit': (0.01, 0.05)},
    {'scan': 'forward', 'num_groups': -1},
    {'scan': 'both', 'num_groups': 2, 'dt_limit': (0.02, math.inf)},
    {'scan': 'both', 'num_groups': 4},
], ids=['states and limits', 'a group a head', 'both', 'both, a group a head'])
def test_scans_follow_the_equations(options: dict):
    mixer = SSDMixer(6, 4, 3, expand=2, **options).double()
    if mixer.initial_states is not None:
        torch.nn.init.normal_(mixer.initial_states)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = written_out(mixer, x, 2 if mixer.scan == 'both' else 1, options.get('dt_limit', (0., math.inf)))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('positive', [True, False])
def test_heads_of_the_sum_take_groups_in_turn(positive: bool):
    mixer = SSDMixer(6, 4, 3, num_groups=2, positive=positive).double()
    v, dt = torch.randn(2, 7, 4, 3, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    B, C = torch.randn(2, 2, 7, 2, 3, dtype=torch.float64)
    y = mixer.read_sum(v, dt, B, C)
    for m in range(4):
        weights = F.softplus(dt[:, :, m] + mixer.dt_bias[m]) * mixer.A_log[m].exp() * (1 if positive else -1)
        total = torch.einsum('bl,bln,blp->bnp', weights, B[:, :, m % 2], v[:, :, m])
        expected = torch.einsum('bln,bnp->blp', C[:, :, m % 2], total) + mixer.D[m] * v[:, :, m]
        torch.testing.assert_close(y[:, :, m], expected, rtol=1e-10, atol=1e-10)


def test_large_maps_stay_finite_under_float16():
    mixer = SSDMixer(8, 2, 16)
    x = 40 * torch.randn(1, 40, 40, 8)
    with torch.autocast('cpu', torch.float16), torch.no_grad():
        assert mixer(x).isfinite().all()


def test_gradients_of_a_single_image_are_derivatives():
    """What the official layout, which `from_official` keeps, gets wrong on a CPU; see docs/models/vssd.md."""
    model = timm.create_model('vssd_pico', num_classes=3).double().eval()
    dense = visionssm.models._hierarchy.DenseBackbone(model)
    x, v = torch.randn(2, 1, 3, 64, 96, dtype=torch.float64)
    weights = torch.randn(1, 128, 2, 3, dtype=torch.float64)
    x.requires_grad_()
    slope = (torch.autograd.grad((dense(x)[-1] * weights).sum(), x)[0] * v).sum()
    with torch.no_grad():
        high, low = ((dense(x + step * v)[-1] * weights).sum() for step in (1e-6, -1e-6))
    torch.testing.assert_close(slope, (high - low) / 2e-6, rtol=1e-5, atol=1e-7)
