"""What is Mamba2D's own: its mixers, scans from both corners, official names and files, both releases."""
import pytest
import timm
import torch
import torch.nn.functional as F

import visionssm
from visionssm.checkpoints import CheckpointError
from visionssm.models import Mamba2D
from visionssm.models.mamba2d import OFFICIAL, M2DMixer, MapAttention, StarReLU

BACKBONE = {
    'n_blocks': [2, 1], 'embed_dim': [8, 16], 'ds_stages': ['mf_stem', 'mf_2'], 'token_mixer': ['2D_local', '2D'],
    'res_scale_init_values': [1.0, None], 'inter_flip': True}
HEAD = {'dim': 16, 'n_classes': 3, 'mlp_ratio': 2}
BACKBONES = {
    'released': {},
    'attention': {'token_mixer': ['2D_local', 'RopeAttention']},
    'integer codes': {'ds_stages': [4, 2]},
    'no convolutions': {'ds_stages': ['mf_2', 1], 'token_mixer': ['2D', '2D']},
    'v1': {'token_mixer': ['2D_local', 'Attention']},
}


def lively(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def official_config(**backbone) -> dict:
    config = {**BACKBONE, **backbone}
    if 'Attention' in config['token_mixer']:
        del config['inter_flip']
    return {'backbone': config, 'head': HEAD}


def official_model(official_class: str = 'Mamba2DClassifier', **backbone) -> torch.nn.Module:
    build = visionssm.models._official.find_official('mamba2d').build
    return lively(build(official_class, official_config(**backbone)))


@pytest.mark.parametrize('official_class', ['Mamba2DClassifier', 'Mamba2D'])
@pytest.mark.parametrize('backbone', BACKBONES.values(), ids=BACKBONES)
def test_keys_tell_the_configuration(backbone: dict, official_class: str):
    model = official_model(official_class, **backbone)
    state_dict = visionssm.to_official('mamba2d', model)
    assert any(key.startswith('backbone.') for key in state_dict) == (official_class == 'Mamba2DClassifier')
    x = torch.randn(2, 3, 34, 43)
    for config in (None, official_config(**backbone)):
        other = visionssm.from_official('mamba2d', state_dict, config, official_class=official_class).eval()
        torch.testing.assert_close(other(x), model(x))


def test_a_flat_configuration_of_the_backbone_is_understood():
    model = official_model('Mamba2D')
    state_dict = visionssm.to_official('mamba2d', model)
    other = visionssm.from_official('mamba2d', state_dict, BACKBONE, official_class='Mamba2D').eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other(x), model(x))


def test_the_first_release_differs_as_documented():
    model = official_model(**BACKBONES['v1'])
    mixer = model.stages[0].blocks[1].mixer
    assert mixer.in_proj.out_features == 16 and mixer.x_proj.bias is not None and mixer.x_proj.out_features == 34
    assert not mixer.reverse
    keys = visionssm.to_official('mamba2d', model).keys()
    assert 'backbone.ds.ds1.pre_norm.norm.weight' in keys and 'backbone.stages.0.2.weight' not in keys


def test_every_second_block_of_a_stage_scans_from_the_other_corner():
    model = Mamba2D(depths=(3, 2), dims=(8, 8), mixers=('scan', 'scan_local'), downsamples=('conv7', 'conv3'),
                    residual_scales=(1., 1.), num_classes=0)
    assert [[block.mixer.reverse for block in stage.blocks] for stage in model.stages] == [
        [False, True, False], [False, True]]


def test_a_reversed_scan_turns_the_scan_but_not_the_local_path():
    reverse, plain = (M2DMixer(8, d_state=2, reverse=reverse) for reverse in (True, False))
    lively(plain)
    reverse.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 5, 8)
    local = plain.local_path(plain.local_norm(x))
    turned = x.flip(1, 2)
    scanned = (plain(turned) - plain.local_path(plain.local_norm(turned))).flip(1, 2)
    torch.testing.assert_close(reverse(x), scanned + local)


def test_a_block_scales_the_stream_and_not_the_branches():
    model = lively(Mamba2D(
        depths=(1,), dims=(32,), mixers=('rope_attention',), downsamples=('conv7',), residual_scales=(2.,),
        num_classes=0))
    block, x = model.stages[0].blocks[0], torch.randn(2, 3, 5, 32)
    assert block.res_scale1.init_values == 2.
    middle = x * block.res_scale1.gamma + block.mixer(block.norm1(x))
    torch.testing.assert_close(block(x), middle * block.res_scale2.gamma + block.mlp(block.norm2(middle)))


def test_attention_depends_on_relative_positions_alone():
    attention = MapAttention(32)
    q = torch.randn(1, 1, 1, 32).expand(1, 1, 12, 32)
    from visionssm.models.mamba2d import head_rotations
    table = head_rotations(q, 3, 4, attention.axis_dim)
    scores = torch.einsum('lc,mc->lm', *(2 * [q[0, 0] * table[0] + torch.stack(
        [-q[0, 0, :, 1::2], q[0, 0, :, 0::2]], -1).flatten(-2) * table[1]])).view(3, 4, 3, 4)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[1, 1, 2, 3])
    torch.testing.assert_close(scores[2, 0, 0, 1], scores[2, 2, 0, 3])


def test_attention_leaves_the_rest_of_a_head_unturned():
    attention = MapAttention(20, head_dim=14, rope_ratio=0.8)
    assert attention.axis_dim == 4 and attention.num_heads == 1 and attention.proj.in_features == 14
    assert attention(torch.randn(2, 3, 4, 20)).shape == (2, 3, 4, 20)


def test_star_relu_is_a_scaled_square_and_is_drawn_anew():
    act, x = StarReLU(), torch.randn(50)
    with torch.no_grad():
        act.scale.fill_(3.)
        act.bias.fill_(5.)
        expected = 3 * F.relu(x).square() + 5
        torch.testing.assert_close(act(x.clone()), expected)
    torch.testing.assert_close(act(x), expected)
    act.reset_parameters()
    assert act.bias.item() == 0.


def test_initial_steps_are_those_of_the_paper_and_equal_in_both_directions():
    mixer = timm.create_model('mamba2d_pico').stages[0].blocks[0].mixer
    steps = F.softplus(mixer.top.dt_bias)
    assert torch.equal(mixer.top.dt_bias, mixer.left.dt_bias)
    assert steps.min() >= 1e-3 - 1e-6 and steps.max() <= 0.1 + 1e-6
    torch.testing.assert_close(mixer.left.A_log.exp()[0], torch.arange(1., 9.))
    assert mixer.D.eq(1).all()


def test_weights_drawn_on_an_empty_model_are_like_those_of_a_new_one():
    model = timm.create_model('mamba2d_pico', device='meta').to_empty(device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.stages[0].blocks[0].res_scale1.gamma.eq(1).all()


def test_lightning_files_load_by_name(tmp_path):
    model = lively(timm.create_model('mamba2d_pico'))
    path = tmp_path / 'pico.ckpt'
    torch.save({'state_dict': visionssm.to_official('mamba2d', model), 'epoch': 3, 'global_step': 7}, path)
    x = torch.randn(1, 3, 32, 32)
    for loaded in (visionssm.create_model('mamba2d_pico', checkpoint_path=path),
                   timm.create_model('mamba2d_pico', pretrained=True, pretrained_cfg_overlay={'file': str(path)})):
        torch.testing.assert_close(loaded.eval()(x), model(x))
    finetuned = timm.create_model(
        'mamba2d_pico', pretrained=True, num_classes=4, pretrained_cfg_overlay={'file': str(path)}).eval()
    torch.testing.assert_close(finetuned.forward_features(x), model.forward_features(x))


def test_files_of_detectors_fit_the_backbone():
    """Downstream files hold the keys of the backbone alone, which a detector's `backbone` takes without its prefix."""
    model = lively(timm.create_model('mamba2d_pico'))
    official = visionssm.to_official('mamba2d', model)
    bare = {key.removeprefix('backbone.'): value for key, value in official.items() if key.startswith('backbone.')}
    other = timm.create_model('mamba2d_pico').eval()
    missing, unexpected = other.load_state_dict(bare, strict=False)
    assert not unexpected and all(key.startswith('head.') for key in missing)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other.forward_features(x), model.forward_features(x))


def test_the_head_is_replaced_with_its_pooling():
    model = timm.create_model('mamba2d_pico', num_classes=5).eval()
    x = torch.randn(2, 3, 32, 64)
    assert model(x).shape == (2, 5)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(4, 'max')
    assert model(x).shape == (2, 4) and model.get_classifier().out_features == 4
    model.reset_classifier(0, '')
    assert model(x).shape == (2, 1, 2, 96)
    with pytest.raises(ValueError, match='doubles the channels'):
        model.reset_classifier(4, 'catavgmax')


@pytest.mark.parametrize(('change', 'message'), [
    ({'double_scans': True}, 'double_scans'),
    ({'token_mixer': ['2D_dbl_scan', '2D']}, '2D_dbl_scan'),
    ({'token_mixer': ['3D', '2D']}, "token_mixer is .*'3D'.*; allowed are '2D'"),
    ({'ds_stages': ['mf_stem', 3]}, "ds_stages is 3; allowed are 'mf_stem'"),
    ({'embed_dim': [8, 24, 16]}, 'dims are .* give as many of one as of the other'),
    ({'embed_dim': [8, 24]}, 'head.dim is 16, but the last of embed_dim is 24'),
], ids=['double scans', 'double scan mixer', 'mixer', 'downsample', 'lengths', 'head'])
def test_configurations_without_a_counterpart_are_explained(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        official_model(**change)


def test_a_foreign_state_dict_is_refused_by_its_keys():
    with pytest.raises(ValueError, match='no ds.stem.conv.weight'):
        visionssm.from_official('mamba2d', {'patch_embed.weight': torch.zeros(1)})
    state_dict = visionssm.to_official('mamba2d', official_model())
    with pytest.raises(CheckpointError, match='stages.0.2.weight'):
        visionssm.from_official('mamba2d', state_dict, official_config(n_blocks=[1, 1]))


@pytest.mark.parametrize('shape', ['nested', 'flat'])
def test_keys_tell_the_release_where_arguments_do_not(shape: str):
    backbone = {'n_blocks': [1, 1], 'embed_dim': [8, 16], 'ds_stages': ['mf_stem', 'mf_2'],
                'token_mixer': ['2D_local', '2D'], 'res_scale_init_values': [1., 1.]}
    model = OFFICIAL.build('Mamba2D', {**backbone, 'inter_flip': False, 'recomp': 'full'}).eval()
    state_dict = visionssm.to_official('mamba2d', model)
    config = {'backbone': backbone} if shape == 'nested' else backbone
    back = visionssm.from_official('mamba2d', state_dict, config, official_class='Mamba2D').eval()
    x = torch.randn(1, 3, 32, 32)
    for actual, expected in zip(back(x), model(x), strict=True):
        torch.testing.assert_close(actual, expected)
