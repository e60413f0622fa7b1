"""Parameter groups follow timm's rules, and optimizers are found by name."""
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from visionssm.openmmlab.classifier import ImageClassifier
from visionssm.openmmlab.optim import LayerDecayOptimConstructor


def build(optimizer=None, paramwise=None, **wrapper):
    torch.manual_seed(0)
    model = ImageClassifier(dict(name='test_vit', img_size=32, num_classes=5))
    cfg = dict(optimizer={'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 0.05, **(optimizer or {})}, **wrapper)
    return model, LayerDecayOptimConstructor(cfg, paramwise)(model)


def by_parameter(groups):
    return {id(p): (group['lr'], group['weight_decay']) for group in groups for p in group['params']}


@pytest.mark.parametrize('decay', [1.0, 0.65])
def test_groups_equal_those_of_timm(decay):
    model, wrapper = build(paramwise=dict(layer_decay=decay))
    net = model.model
    theirs = param_groups_layer_decay(net, 0.05, net.no_weight_decay(), layer_decay=decay)
    theirs = {id(p): (1e-3 * group['lr_scale'], group['weight_decay']) for group in theirs for p in group['params']}
    ours = by_parameter(wrapper.optimizer.param_groups)
    assert ours.keys() == theirs.keys()
    assert all(ours[key] == pytest.approx(theirs[key]) for key in ours)


def test_rates_of_the_first_layers_do_not_fall_below_their_floor():
    groups = build(paramwise=dict(layer_decay=0.1, min_lr_scale=0.05))[1].optimizer.param_groups
    assert {round(group['lr_scale'], 9) for group in groups} == {0.05, 0.1, 1.0}


def test_custom_keys_scale_rate_and_decay():
    model, wrapper = build(paramwise=dict(custom_keys={'head.*': dict(lr_mult=10, decay_mult=0.5)}))
    assert by_parameter(wrapper.optimizer.param_groups)[id(model.model.head.weight)] == pytest.approx((1e-2, 0.025))


def test_forced_patterns_decay_although_the_model_exempts_them():
    model, wrapper = build(paramwise=dict(force_decay=['pos_embed']))
    groups = by_parameter(wrapper.optimizer.param_groups)
    assert groups[id(model.model.pos_embed)][1] == 0.05
    assert groups[id(model.model.cls_token)][1] == 0.0


def test_frozen_parameters_are_left_out():
    model = ImageClassifier(dict(name='test_vit', img_size=32, num_classes=5))
    model.model.patch_embed.requires_grad_(False)
    wrapper = LayerDecayOptimConstructor(dict(optimizer=dict(type='SGD', lr=0.1)))(model)
    frozen = {id(p) for p in model.model.patch_embed.parameters()}
    assert not frozen & by_parameter(wrapper.optimizer.param_groups).keys()


@pytest.mark.parametrize(('name', 'expected'), [('AdamW', 'AdamW'), ('lamb', 'Lamb'), ('lion', 'Lion'),
                                                ('SGD', 'SGD')])
def test_optimizers_of_torch_and_timm_go_by_name(name, expected):
    _, wrapper = build(dict(type=name))
    assert type(wrapper.optimizer).__name__ == expected


def test_rates_follow_the_scheduler_in_proportion(train_toy, toy_config):
    cfg = toy_config(train_cfg=dict(by_epoch=True, max_epochs=1))
    cfg.optim_wrapper.paramwise_cfg = dict(layer_decay=0.5)
    groups = train_toy(cfg).optim_wrapper.optimizer.param_groups
    rates = {group['lr_scale']: group['lr'] for group in groups}
    assert len(rates) > 2
    assert all(lr == pytest.approx(rates[1.0] * scale) for scale, lr in rates.items())


@pytest.mark.parametrize(('optimizer', 'paramwise', 'message'), [
    (dict(type='AdmaW'), None, "Unknown optimizer 'AdmaW'.*'AdamW'"),
    (None, dict(layerdecay=0.5), "no key 'layerdecay'.*'layer_decay'"),
    (None, dict(layer_decay=1.5), 'layer_decay must be in'),
    (dict(lr=None), dict(layer_decay=0.5), 'give optimizer.lr'),
], ids=['optimizer', 'key', 'range', 'no-rate'])
def test_errors_name_the_mistake(optimizer, paramwise, message):
    with pytest.raises(ValueError, match=message):
        build(optimizer, paramwise)


def test_all_parameters_of_a_timm_model_without_layers_are_trained():
    net = timm.create_model('test_resnet', num_classes=3)
    wrapper = LayerDecayOptimConstructor(dict(optimizer=dict(type='SGD', lr=0.1)))(net)
    assert len(by_parameter(wrapper.optimizer.param_groups)) == len(list(net.parameters()))
