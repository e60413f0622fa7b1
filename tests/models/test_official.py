"""Conversion of official models: what is built, what is inferred, what is refused and how."""
import logging

import pytest
import timm
import torch

import visionssm
from visionssm.checkpoints import CheckpointError
from visionssm.models._official import rename_from_official, translate_keys
from visionssm.models.vim import OFFICIAL

PYRAMID = 'SimpleFeaturePyramid(VisionMambaDet)'
TRUNK = {'img_size': 32, 'patch_size': 8, 'stride': 8, 'embed_dim': 16, 'depth': 4, 'd_state': 4}
# Official class and constructor arguments, over the options of the official code.
CASES = {
    'released': ('VisionMamba', {**TRUNK, 'num_classes': 7}),
    'head-token-rope': ('VisionMamba', {**TRUNK, 'use_middle_cls_token': False, 'if_rope': True,
                                        'if_rope_residual': True}),
    'double-token': ('VisionMamba', {**TRUNK, 'use_double_cls_token': True}),
    'no-token-mean': ('VisionMamba', {**TRUNK, 'if_cls_token': False, 'final_pool_type': 'mean'}),
    'first-bidirectional': ('VisionMamba', {**TRUNK, 'if_bimamba': True}),
    'forward-only': ('VisionMamba', {**TRUNK, 'bimamba_type': 'none', 'if_divide_out': False}),
    'layernorm-scaled': ('VisionMamba', {**TRUNK, 'rms_norm': False, 'init_layer_scale': 0.1}),
    'rope-alone': ('VisionMamba', {**TRUNK, 'if_abs_pos_embed': False, 'if_rope': True, 'if_cls_token': False,
                                   'pt_hw_seq_len': 8}),
    'detection': ('VisionMambaDet', {**TRUNK, 'last_layer_process': 'add'}),
    'pyramid': (PYRAMID, {'net': {**TRUNK, 'last_layer_process': 'none'}, 'out_channels': 8}),
    'segmentation': ('VisionMambaSeg', {**TRUNK, 'patch_size': 16, 'stride': 16, 'bimamba_type': 'v2', 'rms_norm': True,
                                        'if_abs_pos_embed': True, 'out_indices': [0, 1, 2, 3]}),
    'segmentation-maps': ('VisionMambaSeg', {**TRUNK, 'out_indices': [1, 3], 'if_fpn': False,
                                             'use_residual_as_feature': True, 'last_layer_process': 'add & norm'}),
}


def official_weights(official_class: str, config: dict) -> dict[str, torch.Tensor]:
    """A state dict in official names that fits the configuration."""
    model = OFFICIAL.build(official_class, config)
    return visionssm.to_official('vim', model, official_class=official_class)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> tuple[str, dict, dict[str, torch.Tensor]]:
    official_class, config = request.param
    return official_class, config, official_weights(official_class, config)


def test_conversion_there_and_back_is_the_identity(case):
    official_class, config, weights = case
    model = visionssm.from_official('vim', weights, config, official_class=official_class)
    back = visionssm.to_official('vim', model, official_class=official_class)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())


def test_key_table_reads_both_ways(case):
    official_class, _, weights = case
    table = OFFICIAL.keys(official_class)
    assert list(translate_keys(translate_keys(weights, table), table, reverse=True)) == list(weights)


def test_our_names_pass_the_table_unchanged(case):
    official_class, config, _ = case
    keys = OFFICIAL.build(official_class, config).state_dict()
    assert list(translate_keys(keys, OFFICIAL.keys(official_class))) == list(keys)


def test_dense_classes_return_a_list_of_maps(case):
    official_class, config, weights = case
    model = visionssm.from_official('vim', weights, config, official_class=official_class).eval()
    out = model(torch.randn(2, 3, 32, 32))
    if official_class == 'VisionMamba':
        assert out.shape == (2, config.get('num_classes', 1000))
    else:
        assert isinstance(out, list) and all(m.ndim == 4 and m.shape[0] == 2 for m in out)


def test_dense_models_train_every_parameter_that_they_use(case):
    official_class, config, weights = case
    model = visionssm.from_official('vim', weights, config, official_class=official_class).train()
    out = model(torch.randn(2, 3, 64, 64))
    sum(m.square().sum() for m in (out if isinstance(out, list) else [out])).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_weights_alone_rebuild_a_model_of_the_same_shape(case):
    """What shapes cannot tell (pooling, division, taps) may differ; the official state dict must load all the same."""
    _, config, weights = case
    model = visionssm.from_official('vim', weights)
    assert len(getattr(model, 'backbone', model).blocks) == 4
    size = {key: value.shape for key, value in visionssm.to_official(
        'vim', model, official_class=model.official_class).items()}
    assert size == {key: value.shape for key, value in weights.items()}


@pytest.mark.parametrize(('size', 'patch', 'stride', 'words'), [
    (224, 16, 16, None),
    (224, 16, 8, 'tell 27 x 27 patches of 16 pixels, and not the stride'),
    (432, 16, 16, 'assumed are stride 8 and img_size 224. If'),
    (32, 8, 4, 'assumed are stride 8 and img_size 56. If'),
])
def test_a_guessed_stride_is_told(size, patch, stride, words, caplog):
    config = {**TRUNK, 'img_size': size, 'patch_size': patch, 'stride': stride, 'depth': 1}
    weights = official_weights('VisionMamba', config)
    assert visionssm.from_official('vim', weights).patch_embed.proj.kernel_size == (patch, patch)
    assert (words or '') in caplog.text and ('give config' in caplog.text) == (words is not None)
    caplog.clear()
    visionssm.from_official('vim', weights, config)
    rename_from_official('vim', weights)
    assert caplog.text == ''


def test_a_stride_is_guessed_aloud_where_no_table_tells_the_patches(caplog):
    config = {**TRUNK, 'if_abs_pos_embed': False, 'depth': 1}
    visionssm.from_official('vim', official_weights('VisionMamba', config))
    assert 'tell no number of patches of 8 pixels' in caplog.text


def test_every_difference_is_listed_in_official_names():
    _, config = CASES['released']
    weights = official_weights('VisionMamba', config)
    del weights['layers.1.mixer.A_b_log']
    weights['layers.9.norm.weight'] = torch.zeros(16)
    weights['pos_embed'] = torch.zeros(1, 26, 16)
    with pytest.raises(CheckpointError) as error:
        visionssm.from_official('vim', weights, config)
    message = str(error.value)
    assert '1 missing: layers.1.mixer.A_b_log' in message
    assert '1 unexpected: layers.9.norm.weight' in message
    assert '1 mis-shaped: pos_embed is (1, 26, 16), expected (1, 17, 16)' in message


def test_rotary_tables_of_another_configuration_are_refused():
    official_class, config = CASES['head-token-rope']
    weights = official_weights(official_class, config)
    with pytest.raises(CheckpointError, match='rope.freqs_cos differs'):
        visionssm.from_official('vim', weights, {**config, 'pt_hw_seq_len': 7})


def test_unknown_family_names_the_nearest():
    with pytest.raises(ValueError, match="Unknown family 'vin'. Did you mean 'vim'"):
        visionssm.from_official('vin', {})


def test_unknown_class_is_refused():
    with pytest.raises(ValueError, match="'VisionMambaCls' is no official class"):
        visionssm.from_official('vim', {}, TRUNK, official_class='VisionMambaCls')


def test_foreign_state_dict_is_recognised():
    with pytest.raises(ValueError, match='not the keys of an official Vim state dict'):
        visionssm.from_official('vim', {'conv1.weight': torch.zeros(1)})


@pytest.mark.parametrize('option', [{'if_bidirectional': True}, {'flip_img_sequences_ratio': 0.5}])
def test_options_that_are_not_ported_are_refused(option: dict):
    with pytest.raises(ValueError, match=f'{next(iter(option))}: .* not ported'):
        visionssm.from_official('vim', {}, {**TRUNK, **option}, official_class='VisionMamba')


def test_arguments_that_the_official_code_swallows_are_reported(caplog):
    _, config = CASES['released']
    with caplog.at_level(logging.WARNING, logger='visionssm'):
        visionssm.from_official('vim', official_weights('VisionMamba', config), {**config, 'if_mistyped': 1})
    assert 'if_mistyped' in caplog.text


def test_middle_token_with_rope_follows_the_official_count():
    """The official code leaves the first of an odd number of tokens unrotated, whatever it is."""
    config = {**TRUNK, 'if_rope': True, 'if_rope_residual': True, 'num_classes': 3}
    model = visionssm.from_official('vim', official_weights('VisionMamba', config), config)
    assert model.class_token == 'middle' and model.rope_official


def test_names_are_those_of_the_class_that_was_built(case):
    official_class, config, weights = case
    model = visionssm.from_official('vim', weights, config, official_class=official_class)
    assert visionssm.to_official('vim', model).keys() == weights.keys()


def test_unknown_class_is_refused_on_the_way_out():
    model = OFFICIAL.build('VisionMamba', TRUNK)
    with pytest.raises(ValueError, match="'VisionMambaCls' is no official class"):
        visionssm.to_official('vim', model, official_class='VisionMambaCls')


def test_a_path_is_no_state_dict():
    with pytest.raises(TypeError, match='load_state_dict'):
        visionssm.from_official('vim', 'vim_t.pth', TRUNK)


@pytest.mark.parametrize(('official_class', 'option'), [
    ('VisionMamba', {'if_cls_token': False, 'final_pool_type': 'median'}),
    ('VisionMambaSeg', {'last_layer_process': 'median'})])
def test_unknown_choices_are_named(official_class: str, option: dict):
    with pytest.raises(ValueError, match=f"{list(option)[-1]} is 'median'; allowed are"):
        visionssm.from_official('vim', {}, {**TRUNK, **option}, official_class=official_class)


@pytest.mark.parametrize(('entry', 'message'), [
    ({'model': {}}, "'model' is a dict.*load_state_dict"), ({'epoch': 3}, "'epoch' is a int"), ({3: None}, '3 is a ')])
def test_what_is_no_state_dict_is_refused(entry: dict, message: str):
    with pytest.raises(TypeError, match=message):
        visionssm.from_official('vim', entry)


def test_a_configuration_that_is_no_dictionary_is_refused():
    with pytest.raises(TypeError, match='config is a list'):
        visionssm.from_official('vim', {'a': torch.zeros(1)}, [1])


@pytest.mark.parametrize(('family', 'name', 'lost'), [
    ('vmamba', 'vmamba_pico', 'layers.0.blocks.0.op.in_proj.weight'),
    ('vmamba', 'vmamba_pico', 'layers.0.blocks.0.op.dt_projs_bias'),
    ('vssd', 'vssd_pico', 'layers.0.blocks.0.attn.in_proj.weight'),
    ('mamba2d', 'mamba2d_pico', 'backbone.ds.ds1.conv.weight')])
def test_keys_that_do_not_tell_the_configuration_are_one_clear_error(family: str, name: str, lost: str):
    state_dict = visionssm.to_official(family, timm.create_model(name))
    del state_dict[lost]
    with pytest.raises(CheckpointError, match='give config|With config'):
        visionssm.from_official(family, state_dict)


@pytest.mark.parametrize(('family', 'name', 'options'), [
    ('vmamba', 'vmamba_pico', {}), ('vssd', 'vssd_pico', {}), ('spatial_mamba', 'spatial_mamba_pico', {}),
    ('mamba2d', 'mamba2d_pico', {'d_state': 16})])
def test_models_without_a_classifier_come_back(family: str, name: str, options: dict):
    model = timm.create_model(name, num_classes=0, **options).eval()
    back = visionssm.from_official(family, visionssm.to_official(family, model)).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(back(x), model(x))


@pytest.mark.parametrize('model', [
    lambda: torch.nn.Linear(2, 2), lambda: timm.create_model('vim_pico', mixer='mamba2'),
    lambda: timm.create_model('mhs_vm_pico')], ids=['foreign', 'unported option', 'no official code'])
def test_models_without_a_counterpart_have_no_official_keys(model):
    with pytest.raises(ValueError, match='has no counterpart in the official code'):
        visionssm.to_official('vim', model())
