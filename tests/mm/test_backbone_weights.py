"""Weights of any origin in the adapter: official backbones, classifiers, detectors; and what does not fit."""
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from safetensors import safe_open

import visionssm
from visionssm.checkpoints import CheckpointError, load_state_dict, save_safetensors
from visionssm.openmmlab.backbone import Backbone
from visionssm.openmmlab.checkpoint import export_best
from visionssm.openmmlab.classifier import ImageClassifier

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = [Path(os.environ.get('VISIONSSM_GOLDEN', ROOT.parent / 'shared' / 'golden')), ROOT / 'tests' / 'golden']
ONES = (1, 1, 1, 1)
VIM = dict(name='vim_pico', img_size=64, patch_size=16, stride=16, class_token='none', embed_dim=32, d_state=16,
           rope='both')
FIXTURES = {
    'vmamba/dense_s2_ln_nonsquare': dict(name='vmamba_pico', depths=ONES, dims=14, expand=2., mlp_ratio=4.),
    'vssd/dense_nonsquare': dict(name='vssd_tiny', depths=ONES, dims=12, num_heads=(1, 2, 4, 8), d_state=16),
    'spatial_mamba/dense_official_style': dict(name='spatial_mamba_tiny', depths=(1, 1, 2, 1), dims=12),
    'spatial_mamba/dense_two_levels_b2': dict(
        name='spatial_mamba_tiny', depths=ONES, dims=8, mlp_ratio=2., out_indices=(1, 3)),
    'mamba2d/dense_official_style': dict(name='mamba2d_tiny', depths=(2, 1, 1, 1), dims=(16, 24, 32, 64)),
    'mamba2d/dense_other_downsampling': dict(
        name='mamba2d_tiny', depths=(1, 1, 2, 1), dims=(12, 16, 16, 32), residual_scales=(None, 1., None, 1.),
        downsamples=('conv4', 'conv2', 'conv1', 'conv2'),
        mixers=('scan_local', 'scan', 'scan_local', 'rope_attention')),
    'vim/det_sfp_rope': dict(VIM, depth=4, pyramid=dict(type='simple', out_channels=24)),
    'vim/seg_small_mode': dict(VIM, depth=8, divide_output=False, out_indices=(1, 3, 5, 7), pyramid=dict(type='plain')),
}
SIMPLE, SEG = dict(type='simple'), dict(img_size=512, pyramid=dict(type='plain'))
ROPE = dict(rope='both', divide_output=False)
LISTED = {
    'vim/vimdet_tiny_cascade_mask_rcnn': dict(name='vim_tiny_rope', img_size=1024, pyramid=SIMPLE),
    'vim/vimdet_tiny_lite_cascade_mask_rcnn': dict(
        name='vim_tiny_rope', img_size=1024, pyramid=dict(type='simple', out_channels=192)),
    'vim/vimdet_small_cascade_mask_rcnn': dict(name='vim_small', img_size=1024, pyramid=SIMPLE, **ROPE),
    'vim/vimdet_base_cascade_mask_rcnn': dict(name='vim_base', img_size=1024, pyramid=SIMPLE, **ROPE),
    'vim/vimdet_base_mask_rcnn': dict(name='vim_base', img_size=1024, pyramid=SIMPLE, **ROPE),
    'vim/vimseg_tiny_upernet': dict(name='vim_tiny', out_indices=(5, 11, 17, 23), **SEG),
    'vim/vimseg_small_upernet': dict(name='vim_small', out_indices=(5, 11, 17, 23), **SEG, **ROPE),
    'vmamba/vmamba_tiny_s1l8_backbone': dict(name='vmamba_tiny'),
    'vmamba/vmamba_base_s2l15_backbone': dict(name='vmamba_base_s2l15'),
    'vmamba/vanilla_vmamba_small_backbone': dict(name='vmamba_small_v0'),
    'vssd/vssd_small_backbone': dict(name='vssd_small'),
    'spatial_mamba/spatial_mamba_base_backbone': dict(name='spatial_mamba_base'),
    'mamba2d/m2d_n_backbone': dict(name='mamba2d_nano'),
}


class Detector(BaseModule):
    """A backbone and something behind it, as MMEngine's runner sees a detector."""

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = Backbone(**kwargs)
        self.neck = nn.Linear(2, 2)

    def forward(self, x):
        return self.backbone(x)


def small(**kwargs):
    return {'name': 'vmamba_pico', **kwargs}


def initialised(**kwargs):
    model = Detector(**kwargs)
    model.init_weights()
    return model


@pytest.mark.parametrize('case', FIXTURES)
def test_official_detectors_load_and_give_the_official_maps(case):
    path = next((place / f'{case}.safetensors' for place in PLACES if (place / f'{case}.safetensors').is_file()), None)
    if path is None:
        pytest.skip('no such fixture here: set VISIONSSM_GOLDEN to the folder of fixtures')
    with safe_open(path, 'pt') as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    weights = {key.replace('state_dict.', 'backbone.', 1): value for key, value in tensors.items()
               if key.startswith('state_dict.')}
    model = Detector(**FIXTURES[case]).eval()
    weights.update({f'neck.{key}': value for key, value in model.neck.state_dict().items()})
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        maps = model(tensors['input'])
    wanted = [tensors[f'feature.{i}'] for i in range(len(maps))]
    assert [m.shape[1] for m in wanted] == model.backbone.out_channels
    for actual, expected in zip(maps, wanted, strict=True):
        torch.testing.assert_close(actual, expected, atol=float(meta['atol']), rtol=float(meta['rtol']))


@pytest.mark.parametrize('case', LISTED)
def test_released_detectors_have_the_keys_of_the_adapter(case):
    path = PLACES[0].parent / 'keys' / f'{case}.json'
    if not path.is_file():
        pytest.skip('no key lists here: they stand beside the folder of fixtures')
    prefix = 'backbone.' if case.startswith('vim/') else ''
    weights = {'backbone.' + key.removeprefix(prefix): torch.empty(entry['shape'], device='meta')
               for key, entry in json.loads(path.read_text())['keys'].items() if key.startswith(prefix)}
    with torch.device('meta'):
        model = nn.ModuleDict({'backbone': Backbone(**LISTED[case])})
    model.load_state_dict(weights, strict=True)


@pytest.mark.parametrize('layout', ['ours', 'official', 'trained', 'scheme'])
def test_classification_weights_start_a_detector(layout, tmp_path):
    net = visionssm.create_model('vmamba_pico', num_classes=5)
    state = net.state_dict()
    if layout == 'official':
        state = visionssm.to_official('vmamba', net)
    elif layout == 'trained':
        state = {f'model.{key}': value for key, value in state.items()}
    path = str(save_safetensors(state, tmp_path / 'weights.safetensors'))
    source = f'visionssm://{path}' if layout == 'scheme' else path
    model = initialised(**small(init_cfg=dict(type='Pretrained', checkpoint=source)))
    trunk = model.backbone.trunk.state_dict()
    assert len(trunk) > 50 and all(torch.equal(value, net.state_dict()[key]) for key, value in trunk.items())


@pytest.mark.parametrize('prefix', ['backbone', 'backbone.'])
def test_a_detector_starts_from_another_one(prefix, tmp_path):
    first = Detector(**small())
    nn.init.constant_(first.backbone.model.out_norms[0].bias, 3.)
    path = str(save_safetensors(first.state_dict(), tmp_path / 'detector.safetensors'))
    second = initialised(**small(init_cfg=dict(type='Pretrained', checkpoint=path, prefix=prefix)))
    for key, value in first.backbone.state_dict().items():
        assert torch.equal(second.backbone.state_dict()[key], value), key


@pytest.mark.parametrize('kwargs', [
    dict(name='vim_pico', patch_size=16, stride=16, pyramid=dict(type='simple', out_channels=8), img_size=64),
    dict(name='vim_pico', patch_size=16, stride=16, rope='both')], ids=['larger', 'same'])
def test_the_class_token_of_a_vim_goes_and_its_positions_fit(kwargs, tmp_path):
    options = {key: value for key, value in kwargs.items() if key not in ('pyramid', 'img_size', 'name')}
    net = visionssm.create_model('vim_pico', **options)
    path = str(save_safetensors(net.state_dict(), tmp_path / 'vim.safetensors'))
    trunk = initialised(**kwargs, init_cfg=dict(type='Pretrained', checkpoint=path)).backbone.trunk
    assert torch.equal(trunk.blocks[3].mixer.in_proj.weight, net.blocks[3].mixer.in_proj.weight)
    side = kwargs.get('img_size', 32) // 16
    assert trunk.pos_embed.shape == (1, side * side, 96) and trunk.cls_token is None
    if side == 2:  # two patches, the token, two patches
        torch.testing.assert_close(trunk.pos_embed[0], net.pos_embed[0, [0, 1, 3, 4]])


def test_a_folder_of_trained_weights_is_a_name(tmp_path):
    classifier = ImageClassifier(dict(name='vmamba_pico', num_classes=5, mlp_ratio=1.))
    export_best(classifier, classifier.state_dict(), tmp_path)
    backbone = Backbone(f'local-dir:{tmp_path}', pretrained=True, mlp_ratio=1.)
    assert backbone.trunk_name == 'backbone' and backbone.model.official_class == 'Backbone_VSSM'
    assert torch.equal(backbone.trunk.stages[0].blocks[0].mlp.fc1.weight,
                       classifier.model.stages[0].blocks[0].mlp.fc1.weight)


def test_a_training_checkpoint_of_mmengine_is_read_without_its_code(tmp_path):
    hub = MessageHub('checkpoint')
    hub.update_scalar('loss', 1.0)
    first = Detector(**small())
    path = tmp_path / 'epoch_1.pth'
    torch.save(dict(state_dict=first.state_dict(), message_hub=hub.state_dict(), meta={}), path)
    second = initialised(**small(init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone')))
    assert torch.equal(second.backbone.trunk.stem.conv1.weight, first.backbone.trunk.stem.conv1.weight)


def test_a_model_of_timm_starts_from_a_file(tmp_path):
    net = visionssm.create_model('test_convnext', num_classes=3)
    path = str(save_safetensors(net.state_dict(), tmp_path / 'timm.safetensors'))
    model = initialised(name='test_convnext', init_cfg=dict(type='Pretrained', checkpoint=path))
    assert torch.equal(model.backbone.trunk.stages[1].blocks[0].mlp.fc1.weight, net.stages[1].blocks[0].mlp.fc1.weight)
    whole = {f'backbone.{key}': value for key, value in net.state_dict().items()}
    missing, _ = Detector(name='test_convnext').load_state_dict(whole, strict=False)
    assert missing == ['neck.weight', 'neck.bias']


def test_init_weights_leaves_loaded_weights_alone():
    model = Detector(**small())
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    model.init_weights()
    model.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())


def test_pretrained_weights_survive_the_runners_initialisation(tmp_path):
    net = visionssm.create_model('vmamba_pico')
    path = save_safetensors(net.state_dict(), tmp_path / 'weights.safetensors')
    model = initialised(**small(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=1000)))
    assert torch.equal(model.backbone.trunk.stages[2].blocks[1].mlp.fc1.weight, net.stages[2].blocks[1].mlp.fc1.weight)


def test_its_own_state_comes_back(tmp_path):
    first, second = Detector(**small(out_indices=(1, 3))), Detector(**small(out_indices=(1, 3)))
    save_safetensors(first.state_dict(), tmp_path / 'a.safetensors')
    second.load_state_dict(load_state_dict(tmp_path / 'a.safetensors'), strict=True)
    image = torch.randn(1, 3, 64, 64)
    for a, b in zip(first.eval()(image), second.eval()(image), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda w: w.pop('stages.1.blocks.0.norm1.weight'), r'1 missing: stages.1.blocks.0.norm1.weight'),
    (lambda w: w.update({'stages.9.blocks.0.norm1.weight': torch.ones(2)}), 'stages.9.blocks.0.norm1.weight'),
    (lambda w: w.update({'stem.conv1.weight': torch.ones(2)}), 'stem.conv1.weight is'),
], ids=['missing', 'unexpected', 'mis-shaped'])
@pytest.mark.parametrize('official', [False, True], ids=['ours', 'official'])
def test_weights_that_do_not_fit_are_listed(change, message, official, tmp_path):
    net = visionssm.create_model('vmamba_pico')
    weights = net.state_dict()
    change(weights)
    if official:
        table = visionssm.models._official.find_official('vmamba').keys('VSSM')
        weights = visionssm.models._official.translate_keys(weights, table, reverse=True)
    path = str(save_safetensors(weights, tmp_path / 'weights.safetensors'))
    with pytest.raises(CheckpointError, match=message):
        initialised(**small(init_cfg=dict(type='Pretrained', checkpoint=path)))


def test_a_wrong_prefix_is_named(tmp_path):
    path = str(save_safetensors(Detector(**small()).state_dict(), tmp_path / 'detector.safetensors'))
    with pytest.raises(CheckpointError, match="no keys that start with 'bakbone.'"):
        initialised(**small(init_cfg=dict(type='Pretrained', checkpoint=path, prefix='bakbone')))


def test_a_missing_file_does_not_matter_before_training():
    model = Detector(**small(init_cfg=dict(type='Pretrained', checkpoint='not/there.pth')))
    with pytest.raises(FileNotFoundError, match='not/there.pth'):
        model.init_weights()
