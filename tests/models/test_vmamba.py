"""What is VMamba's own: its options, its official names and files, old and new, and what they tell."""
import json
import logging

import pytest
import timm
import torch
import torch.nn.functional as F

import visionssm
from visionssm.checkpoints import CheckpointError
from visionssm.layers import ss2d_options
from visionssm.models import VMamba

TINY = {'dims': 8, 'depths': [1, 1], 'ssm_d_state': 2, 'num_classes': 3, 'imgsize': 16}
RELEASED = {
    'ssm_d_state': 1, 'ssm_ratio': 1., 'forward_type': 'v05_noz', 'ssm_conv_bias': False, 'downsample_version': 'v3',
    'patchembed_version': 'v2'}
VANILLA = {
    'forward_type': 'v0', 'mlp_ratio': 0., 'downsample_version': 'v1', 'patchembed_version': 'v1', 'ssm_d_state': 4}
CONFIGS = {
    'released': RELEASED,
    'ln2d': {**RELEASED, 'norm_layer': 'ln2d'},
    'batchnorm': {**RELEASED, 'norm_layer': 'bn', 'downsample_version': 'v1'},
    'vanilla': VANILLA,
    'gated mlp': {**RELEASED, 'gmlp': True, 'mlp_ratio': 1.5, 'mlp_act_layer': 'silu'},
    'listed widths': {**RELEASED, 'dims': [8, 20], 'ssm_ratio': 1.3, 'ssm_dt_rank': 3},
    'no norms': {**RELEASED, 'patch_norm': False, 'forward_type': 'v05_onnone', 'ssm_conv': 1},
    'convolved': {'forward_type': 'v04_oncnorm_nozact_oact', 'posembed': True, 'ssm_conv': 5, 'patch_size': 2},
    'convolved only': {**RELEASED, 'forward_type': 'v3_ondwconv3_noz', 'patch_size': 8},
    'mamba-2': {**RELEASED, 'forward_type': 'm0_noz', 'ssm_init': 'v2', 'ssm_act_layer': 'gelu'},
    'cascade': {**RELEASED, 'forward_type': 'v052dc_noz'},
}


def official_state_dict(config: dict, official_class: str = 'VSSM') -> dict[str, torch.Tensor]:
    """Random weights in the official names; the model behind them is built from the same configuration."""
    module = visionssm.models._official.find_official('vmamba').build(official_class, {**TINY, **config})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return visionssm.to_official('vmamba', module, official_class=official_class)


def rebuilt(state_dict: dict, config: dict, official_class: str = 'VSSM') -> torch.nn.Module:
    return visionssm.from_official('vmamba', state_dict, {**TINY, **config}, official_class=official_class).eval()


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_keys_tell_the_configuration(config: dict):
    state_dict = official_state_dict(config)
    model = rebuilt(state_dict, config)
    inferred = visionssm.from_official('vmamba', state_dict).eval()
    assert visionssm.to_official('vmamba', inferred).keys() == state_dict.keys()
    hidden = 'mlp_act_layer' in config or any(code in config['forward_type'] for code in ('_nozact', '_oact', 'v052dc'))
    if not hidden:  # activations and routes leave no trace in keys
        x = torch.randn(2, 3, 17, 23)
        torch.testing.assert_close(inferred(x), model(x))


@pytest.mark.parametrize('norm_layer', ['layernorm', 'batchnorm'])
def test_maps_of_odd_size_run_through_every_layer_between_stages(norm_layer: str):
    for downsample in ('v1', 'v2', 'v3'):
        model = VMamba(depths=(1, 1, 1), dims=8, downsample=downsample, norm_layer=norm_layer, num_classes=3).eval()
        shapes = [tuple(m.shape[1:]) for m in model.forward_intermediates(
            torch.randn(2, 3, 49, 83), intermediates_only=True)]
        assert shapes == [(8, 13, 21), *([(16, 6, 10), (32, 3, 5)] if downsample == 'v2' else
                                         [(16, 7, 11), (32, 4, 6)])]


def test_a_block_adds_mixer_and_mlp():
    model = VMamba(depths=(1,), dims=8, num_classes=0).double().eval()
    block = model.stages[0].blocks[0]
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    middle = x + block.mixer(F.layer_norm(x, [8]))
    hidden = F.gelu(F.linear(F.layer_norm(middle, [8]), block.mlp.fc1.weight, block.mlp.fc1.bias))
    expected = middle + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


def test_batch_norm_of_a_map_is_that_of_an_image():
    config = {**RELEASED, 'norm_layer': 'bn'}
    model = rebuilt(official_state_dict(config), config).train()
    norm = model.stages[0].blocks[0].norm1
    plain = torch.nn.BatchNorm2d(8)
    plain.load_state_dict(norm.state_dict())
    x = 2 * torch.randn(3, 4, 5, 8) + 1
    torch.testing.assert_close(norm(x), plain(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value)
    torch.testing.assert_close(norm.eval()(x), plain.eval()(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def old(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in the names of January 2024, with the weights of a channel-first network."""
    names = (('patch_embed.0.', 'patch_embed.proj.'), ('patch_embed.2.', 'patch_embed.norm.'),
             ('.op.', '.self_attention.'), ('classifier.norm.', 'norm.'), ('classifier.head.', 'head.'))
    renamed = {}
    for key, value in state_dict.items():
        for new, was in names:
            key = key.replace(new, was)
        if '.blocks.' in key:
            key = key.replace('.norm.', '.ln_1.')
        renamed[key] = value[..., None, None] if key.endswith(('_proj.weight', 'head.weight')) else value
    return renamed


def test_old_names_and_shapes_load_like_new_ones():
    state_dict = official_state_dict(VANILLA)
    model, x = rebuilt(state_dict, VANILLA), torch.randn(2, 3, 16, 16)
    before = old(state_dict)
    assert 'layers.0.blocks.0.self_attention.x_proj_weight' in before and 'layers.1.blocks.0.ln_1.bias' in before
    assert before['layers.0.blocks.0.self_attention.in_proj.weight'].ndim == 4
    assert torch.equal(rebuilt(before, VANILLA)(x), model(x))
    assert torch.equal(visionssm.from_official('vmamba', before).eval()(x), model(x))
    fresh = rebuilt(official_state_dict(VANILLA), VANILLA)
    fresh.load_state_dict(before)
    assert torch.equal(fresh(x), model(x))


def test_a_checkpoint_of_another_depth_is_refused_by_its_keys():
    with pytest.raises(CheckpointError, match='layers.1.blocks.1.op.A_logs'):
        rebuilt(official_state_dict(RELEASED), {**RELEASED, 'depths': [1, 2]})
    with pytest.raises(ValueError, match='not the keys of an official VMamba'):
        visionssm.from_official('vmamba', {'layers.0.mixer.A_log': torch.zeros(2, 2)})


def test_swallowed_arguments_are_named(caplog):
    config = {**RELEASED, 'window_size': 7, 'embed_dims': 96, 'use_checkpoint': False}
    with caplog.at_level(logging.WARNING, 'visionssm'):
        rebuilt(official_state_dict(RELEASED), config)
    assert 'embed_dims, window_size' in caplog.text and 'use_checkpoint' not in caplog.text


@pytest.mark.parametrize(('change', 'message'), [
    ({'forward_type': 'v05_oact_noz'}, 'wrong place or repeated _oact'),
    ({'norm_layer': 'rms'}, "norm_layer is 'rms'"),
    ({'downsample_version': 'v4'}, "downsample is 'v4'"),
    ({'patchembed_version': 'v3'}, "stem is 'v3'"),
    ({'dims': [8, 16, 32]}, 'as many of one as of the other')])
def test_options_without_a_counterpart_are_named(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        rebuilt({}, {**RELEASED, **change})


def test_dense_class_never_adds_its_position_embedding():
    config = {**RELEASED, 'posembed': True, 'out_indices': [0, 1]}
    state_dict = official_state_dict(config, 'Backbone_VSSM')
    assert 'pos_embed' in state_dict and 'outnorm1.weight' in state_dict
    x, other = torch.randn(1, 3, 16, 16), {**state_dict, 'pos_embed': torch.randn(1, 8, 4, 4)}
    maps = rebuilt(state_dict, config, 'Backbone_VSSM')(x)
    assert [m.shape for m in maps] == [(1, 8, 4, 4), (1, 16, 2, 2)]
    for a, b in zip(maps, rebuilt(other, config, 'MM_VSSM')(x)):
        assert torch.equal(a, b)


def test_taps_of_a_dense_class_are_told_by_its_norms():
    config = {**RELEASED, 'out_indices': [1]}
    state_dict = official_state_dict(config, 'Backbone_VSSM')
    assert 'outnorm0.weight' not in state_dict
    (tap,) = visionssm.from_official('vmamba', state_dict)(torch.randn(1, 3, 16, 16))
    assert tap.shape == (1, 16, 2, 2)


def test_position_embedding_of_a_checkpoint_is_resampled(tmp_path):
    def model(size: int, **options) -> torch.nn.Module:
        return timm.create_model('vmamba_pico', pos_embed=True, img_size=size, num_classes=3, **options).eval()

    small = model(32)
    path = tmp_path / 'official.pth'
    torch.save({'model': visionssm.to_official('vmamba', small), 'max_accuracy': 1.}, path)
    large = model(48, pretrained=True, pretrained_cfg_overlay={'file': str(path), 'num_classes': 3})
    expected = F.interpolate(small.stem.pos_embed, size=(12, 12), mode='bicubic', align_corners=False)
    torch.testing.assert_close(large.stem.pos_embed, expected)
    assert torch.equal(large.stages[0].blocks[0].mixer.ssm.A_log, small.stages[0].blocks[0].mixer.ssm.A_log)
    assert 'stem.pos_embed' in small.no_weight_decay()


def test_every_form_is_an_option_of_the_registered_models():
    x = torch.randn(1, 3, 32, 32)
    for code in ('v0', 'v051d_noz', 'v052dc_nozact_oact', 'v3_onsigmoid'):
        assert timm.create_model('vmamba_pico', num_classes=3, **ss2d_options(code)).eval()(x).shape == (1, 3)


def test_configurations_name_the_published_files():
    for name in visionssm.list_models('classification'):
        if name.startswith('vmamba') and name not in ('vmamba_pico',) and not name.endswith('_m2'):
            cfg = timm.models.get_pretrained_cfg(f'{name}.in1k')
            assert cfg.url.startswith('https://github.com/MzeroMiko/VMamba/releases/download/%23v'), json.dumps(cfg.url)
            assert (cfg.crop_pct, cfg.interpolation, cfg.license) == (0.875, 'bicubic', 'mit')
