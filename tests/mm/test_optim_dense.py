"""Parameter groups of detectors and segmenters: layers of the backbone, and the official recipes."""
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from visionssm.openmmlab.backbone import Backbone
from visionssm.openmmlab.classifier import ImageClassifier
from visionssm.openmmlab.optim import LayerDecayOptimConstructor, parameter_roles

ROOT = Path(__file__).resolve().parent.parent.parent
KEYS = Path(os.environ.get('VISIONSSM_GOLDEN', ROOT.parent / 'shared' / 'golden')).parent / 'keys'
SWIN = dict(official_names=True, force_decay=['*'], custom_keys={'*norm*': dict(decay_mult=0.)})
VIM_DET = dict(layer_decay=0.7, force_decay=['*'], custom_keys={'*pos_embed': dict(decay_mult=0.)})
VIM_SEG = dict(force_decay=['*pos_embed', '*.A_log'], custom_keys={
    'backbone.patch_embed*': dict(lr_mult=0.92 ** 25), 'backbone.pos_embed': dict(lr_mult=0.92 ** 25)})
VIM_TINY = dict(name='vim_tiny', out_indices=(5, 11, 17, 23))
LISTS = {  # the authors' names of all weights of a backbone, and the same backbone here
    'vmamba/vmamba_tiny_s1l8_backbone': dict(name='vmamba_tiny'),
    'vmamba/vanilla_vmamba_tiny_backbone': dict(name='vmamba_tiny_v0'),
    'vssd/vssd_tiny_backbone': dict(name='vssd_tiny'),
    'spatial_mamba/spatial_mamba_tiny_backbone': dict(name='spatial_mamba_tiny'),
    'mamba2d/m2d_t_backbone': dict(name='mamba2d_tiny'),
}


class Detector(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = Backbone(**kwargs)
        self.neck = nn.Conv2d(4, 4, 1)
        self.head = nn.ModuleDict({'norm': nn.LayerNorm(4), 'fc': nn.Linear(4, 4)})


def on_meta(**kwargs):
    with torch.device('meta'):
        return Detector(**kwargs)


def settings(model, paramwise, weight_decay=1.):
    """Rate and weight decay by the name of the parameter."""
    groups = LayerDecayOptimConstructor(dict(optimizer=dict(type='AdamW')), paramwise).param_groups(
        model, 1., weight_decay)
    by_id = {id(p): (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    return {name: by_id[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def official_names(model):
    return {name: role.label for name, role in parameter_roles(model, official_names=True).items()}


@pytest.mark.parametrize('case', LISTS)
def test_the_authors_names_are_those_of_their_checkpoints(case):
    path = KEYS / f'{case}.json'
    if not path.is_file():
        pytest.skip('no key lists here: they stand beside the folder of fixtures')
    stored = {f'backbone.{key}' for key in json.loads(path.read_text())['keys']}
    labels = official_names(on_meta(**LISTS[case]))
    ours = {label for label in labels.values() if label.startswith('backbone.')}
    assert ours <= stored
    buffers = ('running_mean', 'running_var', 'num_batches_tracked')
    assert not [name for name in stored - ours if not name.endswith(buffers)]


@pytest.mark.parametrize('name', ['vmamba_tiny', 'vmamba_tiny_v0', 'vssd_tiny', 'spatial_mamba_tiny', 'vim2_tiny'])
def test_the_swin_recipe_decays_all_but_what_the_authors_call_norm(name):
    model = on_meta(name=name)
    found = settings(model, SWIN)
    labels = official_names(model)
    assert all(found[key] == (1., 0. if 'norm' in labels[key] else 1.) for key in found)
    free = {labels[key] for key, (_, decay) in found.items() if decay == 0}
    assert 'head.norm.weight' in free and len(free) > 20


def test_names_that_differ_from_the_authors_decide_differently():
    vmamba, spatial = (official_names(on_meta(name=name)) for name in ('vmamba_tiny', 'spatial_mamba_tiny'))
    assert vmamba['backbone.model.backbone.stem.norm1.weight'] == 'backbone.patch_embed.2.weight'
    assert vmamba['backbone.model.out_norms.3.bias'] == 'backbone.outnorm3.bias'
    assert spatial['backbone.model.backbone.stages.0.blocks.0.norm1.weight'] == 'backbone.layers.0.blocks.0.ln_1.weight'


def test_mamba2ds_recipe_is_the_rule_without_options():
    """No decay for one dimension, for what the authors flag, and for names with bias, norm or scale."""
    model = on_meta(name='mamba2d_tiny')
    found, labels = settings(model, {}), official_names(model)
    for name, param in model.named_parameters():
        label = labels[name]
        free = param.ndim < 2 or label.endswith(('AT_log', 'AL_log', '.D')) or any(
            part in label for part in ('bias', 'norm', 'scale'))
        assert found[name] == (1., 0. if free else 1.), label


def test_vims_detector_decays_layers_and_all_but_the_positions():
    model = on_meta(name='vim_tiny_rope', img_size=64, pyramid=dict(type='simple', out_channels=16))
    for name, (rate, decay) in settings(model, VIM_DET).items():
        inner = name.removeprefix('backbone.model.backbone.')
        power = 0
        if inner.startswith(('pos_embed', 'patch_embed')):
            power = 25
        elif inner.startswith('blocks.'):
            power = 24 - int(inner.split('.')[1])
        assert rate == pytest.approx(0.7 ** power) and decay == (0. if inner == 'pos_embed' else 1.), name


def test_vims_segmenter_scales_the_embedding_alone():
    model = on_meta(**VIM_TINY, img_size=64, pyramid=dict(type='plain', residual_features=False))
    found = settings(model, VIM_SEG)
    assert 'backbone.model.backbone.norm.weight' not in found  # held by the official weights, used by nothing
    for name, param in model.named_parameters():
        if name in found:
            embedding = name.endswith('backbone.pos_embed') or '.patch_embed.' in name
            assert found[name] == (pytest.approx(0.92 ** 25 if embedding else 1.), 0. if param.ndim == 1 else 1.), name


@pytest.mark.parametrize('name', ['vmamba_pico', 'test_convnext', 'test_resnet'])
def test_rates_fall_from_the_head_to_the_input(name):
    model = Detector(name=name)
    found = settings(model, dict(layer_decay=0.5))
    assert found['neck.weight'][0] == found['head.fc.weight'][0] == 1.
    trunk = ('backbone.model.backbone.', 'backbone.model.model.')
    rates = [rate for key, (rate, _) in found.items() if key.startswith(trunk)]
    assert max(rates) == 0.5 and min(rates) < 0.1
    if name == 'vmamba_pico':
        assert found['backbone.model.out_norms.0.weight'][0] == 1.
        stem, first = (found[f'backbone.model.backbone.{key}'][0] for key in (
            'stem.conv1.weight', 'stages.0.blocks.0.mixer.in_proj.weight'))
        assert stem == first / 2


def test_the_state_has_no_weight_decay_under_the_prefix():
    found = settings(Detector(name='vmamba_pico'), {})
    assert {decay for key, (_, decay) in found.items() if key.endswith('.A_log')} == {0.}
    assert found['backbone.model.backbone.stages.0.blocks.0.mixer.in_proj.weight'][1] == 1.


def test_frozen_stages_are_left_out():
    found = settings(Detector(name='vmamba_pico', frozen_stages=1), dict(layer_decay=0.5))
    frozen = ('backbone.model.backbone.stem', 'backbone.model.out_norms.0')
    assert not [name for name in found if name.startswith(frozen)]


def test_layer_depth_as_mmpretrain_asks_for_it():
    backbone = Backbone('vmamba_pico')
    depths = [backbone.get_layer_depth(f'backbone.model.backbone.{name}')
              for name in ('stem.conv1.weight', 'stages.0.blocks.0.norm1.weight', 'stages.3.blocks.0.norm1.weight')]
    assert depths == [(0, 7), (1, 7), (5, 7)]
    assert backbone.get_layer_depth('head.fc.weight') == (6, 7)


def test_a_classifier_knows_the_authors_names_too():
    roles = parameter_roles(ImageClassifier(dict(name='vmamba_pico', num_classes=3)), official_names=True)
    assert roles['model.head.fc.weight'].label == 'classifier.head.weight'
    assert roles['model.stages.0.blocks.0.norm1.weight'].label == 'layers.0.blocks.0.norm.weight'
