"""The adapter itself: maps of ours and timm's models, freezing, modes, and arguments that it refuses."""
import copy

import pytest
import torch
import torch.nn as nn
from timm.layers import LayerNorm2d

from visionssm.openmmlab.backbone import Backbone
from visionssm.registry import MODELS

PATCHES = dict(name='vim_pico', patch_size=16, stride=16)
OURS = [dict(name=f'{family}_pico') for family in ('vmamba', 'vssd', 'spatial_mamba', 'mamba2d', 'vim2')] + [
    dict(PATCHES, pyramid=dict(type='simple', out_channels=8)), dict(PATCHES, pyramid=dict(type='plain')),
    dict(name='vim_pico', out_indices=(1, -1))]
TIMM = [dict(name='test_resnet', out_indices=(1, 2, 3, 4)), dict(name='test_vit', dynamic_img_size=True),
        dict(name='test_convnext'), dict(name='swin_tiny_patch4_window7_224', img_size=(64, 96), depths=(1, 1, 1, 1)),
        dict(name='selecsls42')]


def label(kwargs):
    return kwargs['name'] + kwargs.get('pyramid', {}).get('type', '')


@pytest.mark.parametrize('kwargs', OURS + TIMM, ids=label)
def test_maps_have_the_channels_and_strides_that_it_says_and_all_parameters_train(kwargs):
    model = MODELS.build(dict(type='visionssm.Backbone', **kwargs)).train()
    maps = model(torch.randn(2, 3, 64, 96))
    assert isinstance(maps, tuple) and len(maps) == len(model.strides)
    for m, channels, stride in zip(maps, model.out_channels, model.strides, strict=True):
        assert m.shape[:2] == (2, channels)
        assert abs(m.shape[2] - 64 / stride) <= 1 and abs(m.shape[3] - 96 / stride) <= 1
    sum(m.square().mean() for m in maps).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize('name', ['vmamba_pico', 'vssd_pico', 'spatial_mamba_pico', 'mamba2d_pico', 'vim2_pico'])
def test_sizes_that_no_stride_divides_work(name):
    with torch.no_grad():
        maps = Backbone(name).eval()(torch.randn(1, 3, 75, 50))
    assert all(torch.isfinite(m).all() for m in maps)


def test_chosen_stages_and_channels():
    model = Backbone('vmamba_pico', out_indices=(2, 0), in_chans=4)
    assert [m.shape[1] for m in model(torch.randn(1, 4, 64, 64))] == model.out_channels == [16, 64]


@pytest.mark.parametrize(('name', 'own'), [('vmamba_pico', True), ('vim2_pico', True), ('mamba2d_pico', False)])
def test_taps_are_normalised_as_the_official_backbone_does(name, own):
    def norms(**kwargs):
        return sum(p.numel() > 0 for n, p in Backbone(name, **kwargs).named_parameters() if 'out_norms' in n)

    assert (norms(), norms(out_norms=False), norms(out_norms=True)) == (8 if own else 0, 0, 8)


def test_maps_of_timms_models_are_normalised_on_request():
    model = Backbone('test_resnet', out_indices=(2, 4), out_norms=True)
    assert all(isinstance(norm, LayerNorm2d) for norm in model.norms)
    a, b = model(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(b.mean(1), torch.zeros_like(b.mean(1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(('kwargs', 'trains', 'frozen'), [
    (dict(name='vssd_pico', frozen_stages=0), 'stages.0.', 'stem.'),
    (dict(name='vssd_pico', frozen_stages=1), 'stages.1.', 'stages.0.'),
    (dict(name='test_resnet', frozen_stages=2), 'layer3.', 'layer2.'),
    (dict(name='vim_pico', frozen_stages=0), 'blocks.0.', 'patch_embed.')], ids=str)
def test_frozen_stages_keep_their_weights_and_their_statistics(kwargs, trains, frozen):
    model = Backbone(**kwargs).eval().train()
    grads = {name: p.requires_grad for name, p in model.trunk.named_parameters()}
    assert all(grad for name, grad in grads.items() if name.startswith(trains))
    assert not any(grad for name, grad in grads.items() if name.startswith(frozen))
    before = {name: value.clone() for name, value in model.trunk.named_buffers() if name.startswith(frozen)}
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.trunk.named_buffers() if name in before)
    assert model.training and not model.get_submodule(model._frozen[0]).training


def test_batch_norm_stays_in_evaluation_mode():
    model = Backbone('vssd_pico', norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and model.trunk.stages[0].training


@pytest.mark.parametrize('kwargs', [OURS[0], OURS[5], TIMM[2]], ids=label)
def test_recomputed_blocks_give_the_same_gradients(kwargs):
    plain = Backbone(**kwargs)
    saving = Backbone(**kwargs, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 64)
    for model in (plain, saving):
        sum(m.square().mean() for m in model(image)).backward()
    assert saving.trunk.grad_checkpointing if hasattr(saving.trunk, 'grad_checkpointing') else True
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_a_copy_is_independent():
    model = Backbone('vmamba_pico', frozen_stages=1)
    twin = copy.deepcopy(model).train()
    nn.init.zeros_(twin.trunk.stages[3].blocks[0].norm1.weight)
    assert model.trunk.stages[3].blocks[0].norm1.weight.all() and not twin.trunk.stages[0].training


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(name='vmamba_picco'), "Unknown model 'vmamba_picco'.*'vmamba_pico'"),
    (dict(name='vmamba_pico', dims_=3), "no argument 'dims_'.*'dims'"),
    (dict(name='vmamba_pico', out_indices=(4,)), r'out_indices are \(4,\); choose among the stages 0 to 3'),
    (dict(name='vim_pico', out_indices=(7,)), r'out_indices are \(7,\); choose among the blocks 0 to 3'),
    (dict(name='test_resnet', out_indices=(9,)), r'test_resnet cannot return the maps out_indices=\(9,\)'),
    (dict(name='vmamba_pico', pyramid=dict(type='simple')), 'VMamba has maps of several sizes'),
    (dict(name='test_resnet', pyramid=dict(type='simple')), 'test_resnet offers none'),
    (dict(PATCHES, pyramid=dict(type='simpel')), "pyramid is 'simpel'; allowed are"),
    (dict(PATCHES, pyramid=dict(type='simple', out_chanels=3)), "'out_chanels'; allowed are 'type', 'out_channels'"),
    (dict(name='vim_pico', out_norms=True), 'the taps of Vim have no norms'),
    (dict(name='vim_pico', frozen_stages=1), 'vim_pico has no stages: only -1 and 0'),
    (dict(name='vmamba_pico', frozen_stages=5), 'frozen_stages is 5; vmamba_pico has 4 stages'),
    (dict(name='vmamba_pico', init_cfg=dict(type='Kaiming')), 'init_cfg is .*Kaiming.*timm initialises'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_arguments_that_make_no_sense_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Backbone(**kwargs)


def test_a_config_needs_the_scope_alone(run_python):
    code = ("from mmengine.registry import MODELS; "
            "print(MODELS.build(dict(type='visionssm.Backbone', name='vmamba_pico')).strides)")
    done = run_python('-c', code)
    assert done.stdout.strip() == '[4, 8, 16, 32]', done.stderr[-500:]
