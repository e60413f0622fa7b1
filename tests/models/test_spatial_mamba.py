"""What is Spatial-Mamba's own: its options, official names and arguments, and weights that are fetched by hand."""
import copy
import logging

import pytest
import timm
import torch

import visionssm
from visionssm.checkpoints import CheckpointError
from visionssm.models import SpatialMamba
from visionssm.models._official import find_official

TINY = {'depths': [1, 2], 'dims': 8, 'num_classes': 3}
CONFIGS = {
    'released': {},
    'listed widths': {'dims': [10, 20], 'mlp_ratio': 3},
    'odd ratio': {'mlp_ratio': 2.7},
    'headless': {'num_classes': 0},
    'one channel': {'in_chans': 1},
}


def official_state_dict(config: dict, official_class: str = 'SpatialMamba') -> dict[str, torch.Tensor]:
    """Random weights in the official names; the model behind them is built from the same configuration."""
    module = find_official('spatial_mamba').build(official_class, {**TINY, **config})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return visionssm.to_official('spatial_mamba', module, official_class=official_class)


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_keys_tell_the_configuration(config: dict):
    state_dict = official_state_dict(config)
    built = visionssm.from_official('spatial_mamba', state_dict, {**TINY, **config}).eval()
    inferred = visionssm.from_official('spatial_mamba', state_dict).eval()
    x = torch.randn(2, config.get('in_chans', 3), 17, 23)
    torch.testing.assert_close(inferred(x), built(x))
    assert visionssm.to_official('spatial_mamba', inferred).keys() == state_dict.keys()
    assert built(x).shape == (2, config.get('num_classes', 3) or 16)


@pytest.mark.parametrize('official_class', ['Backbone_SpatialMamba', 'MM_SpatialMamba'])
@pytest.mark.parametrize('taps', [[0, 1], [1]], ids=str)
def test_dense_classes_return_chosen_maps(official_class: str, taps: list[int]):
    state_dict = official_state_dict({'out_indices': taps}, official_class)
    x = torch.randn(1, 3, 21, 32)
    maps = visionssm.from_official('spatial_mamba', state_dict).eval()(x)
    assert [m.shape for m in maps] == [[(1, 8, 6, 8), (1, 16, 3, 4)][i] for i in taps]
    again = visionssm.from_official(
        'spatial_mamba', state_dict, {**TINY, 'out_indices': taps}, official_class=official_class).eval()(x)
    for a, b in zip(maps, again):
        assert torch.equal(a, b)


def test_arguments_without_effect_pass_and_unknown_ones_are_named(caplog: pytest.LogCaptureFixture):
    state_dict = official_state_dict({})
    harmless = {'img_size': 96, 'patch_size': 8, 'd_state': 1, 'patch_norm': False, 'use_checkpoint': True}
    with caplog.at_level(logging.WARNING, logger='visionssm'):
        visionssm.from_official('spatial_mamba', state_dict, {**TINY, **harmless})
        assert not caplog.records
        visionssm.from_official('spatial_mamba', state_dict, {**TINY, 'mlp_drop_rate': 0.5, 'depth': 3})
    assert 'depth, mlp_drop_rate' in caplog.text


@pytest.mark.parametrize(('config', 'message'), [
    ({'d_state': 16}, 'd_state is 16'),
    ({'dims': [8, 24]}, 'doubles the channels'),
    ({'dims': [8, 16, 32]}, 'as many of one as of the other'),
    ({'dt_init': 'ones'}, "dt_init is 'ones'; allowed are 'random', 'simple', 'zero'")])
def test_configurations_without_a_counterpart_are_refused(config: dict, message: str):
    with pytest.raises(ValueError, match=message):
        visionssm.from_official('spatial_mamba', {}, {**TINY, **config}, official_class='SpatialMamba')


def test_dense_classes_with_other_norms_are_refused():
    with pytest.raises(ValueError, match="norm_layer is 'bn'"):
        visionssm.from_official(
            'spatial_mamba', {}, {**TINY, 'norm_layer': 'bn'}, official_class='Backbone_SpatialMamba')


def test_foreign_state_dicts_are_refused():
    with pytest.raises(ValueError, match='not the keys of an official Spatial-Mamba'):
        visionssm.from_official('spatial_mamba', {'head.weight': torch.zeros(3, 4)})


def test_official_dropout_rates_reach_stem_and_mixer():
    model = find_official('spatial_mamba').build(
        'SpatialMamba', {**TINY, 'drop_rate': 0.25, 'attn_drop_rate': 0.5, 'drop_path_rate': 0.3})
    assert model.stages[0].downsample.p == 0.25
    block = model.stages[1].blocks[1]
    assert block.mixer.drop.p == 0.5 and block.drop_path.drop_prob == pytest.approx(0.3)
    assert block.mlp.drop1.p == 0. and model.head.drop.p == 0.


@pytest.mark.parametrize(('dt_init', 'low', 'high'), [
    ('random', 1e-4, 0.11), ('zero', 0.69, 0.75), ('simple', 0.5, 0.95)])
def test_steps_are_drawn_as_asked(dt_init: str, low: float, high: float):
    ssm = SpatialMamba(**TINY, dt_init=dt_init).stages[1].blocks[0].mixer.ssm
    steps = torch.nn.functional.softplus(ssm.dt_bias)
    assert low < steps.min() and steps.max() < high
    assert ssm.A_log.eq(0).all() and ssm.D.eq(1).all()
    assert all(parameter.eq(1).all() for parameter in ssm.fusion.parameters())


def test_evaluation_has_the_gradients_of_training():
    model = SpatialMamba(**TINY)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    x = torch.randn(2, 3, 32, 32)
    grads = []
    for mode in (True, False):
        twin = copy.deepcopy(model)
        for block in (block for stage in twin.stages for block in stage.blocks):
            block.train(mode)
        twin(x).square().sum().backward()
        grads.append([parameter.grad for parameter in twin.parameters()])
    for trained, evaluated in zip(*grads):
        assert torch.equal(trained, evaluated)


def test_the_state_parameters_are_not_decayed():
    names = SpatialMamba(**TINY).no_weight_decay()
    assert {name.rpartition('.')[2] for name in names} == {'A_log', 'D', 'dt_bias'}


@pytest.mark.parametrize('name', ['spatial_mamba_tiny', 'spatial_mamba_small.in1k', 'spatial_mamba_base'])
@pytest.mark.parametrize('create', [timm.create_model, visionssm.create_model], ids=['timm', 'visionssm'])
def test_weights_to_be_fetched_by_hand_are_said_to_be_so(name: str, create):
    with pytest.raises(CheckpointError) as caught:
        create(name, pretrained=True)
    message, architecture = str(caught.value), name.split('.')[0]
    assert f'No weights of {architecture}.in1k can be fetched automatically' in message
    assert 'https://drive.google.com/file/d/1' in message
    assert f'visionssm.create_model({architecture!r}, checkpoint_path=FILE)' in message


def test_a_fetched_file_loads(tmp_path):
    model = timm.create_model('spatial_mamba_pico', num_classes=3).eval()
    weights = visionssm.to_official('spatial_mamba', model)
    other = {key: torch.zeros_like(value) for key, value in weights.items()}
    path = tmp_path / 'official.pth'
    torch.save({'model': weights, 'model_ema': other, 'epoch': 299, 'max_accuray_ema': 83.5}, path)
    x = torch.randn(1, 3, 32, 32)
    for loaded in (
            visionssm.create_model('spatial_mamba_pico', num_classes=3, checkpoint_path=path),
            timm.create_model('spatial_mamba_pico', pretrained=True, num_classes=3,
                              pretrained_cfg_overlay={'file': str(path), 'num_classes': 3})):
        assert torch.equal(loaded.eval()(x), model(x))
