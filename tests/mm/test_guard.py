"""The guard against NaN names the first bad module and the step, and keeps bad values out of the weights."""
import pytest
import torch

from visionssm.openmmlab.hooks import NonFiniteError


def test_a_bad_loss_names_the_module_and_the_step(train_toy, toy_config):
    cfg = toy_config(custom_hooks=[dict(type='PoisonHook', step=11, module='model.blocks.3.mlp.fc1')])
    with pytest.raises(NonFiniteError, match=r'at step 11 \(epoch 2\); first bad module: model\.blocks\.3\.mlp\.fc1 '):
        train_toy(cfg)


def test_a_bad_gradient_names_the_place_and_the_step(train_toy, toy_config):
    cfg = toy_config(custom_hooks=[dict(type='PoisonHook', step=4, module='model.blocks.2.mlp', backward=True)])
    with pytest.raises(NonFiniteError, match=r'the gradient is .* at step 4 .*blocks\.2\.mlp\.fc2'):
        train_toy(cfg)


@pytest.mark.parametrize('backward', [False, True], ids=['loss', 'gradient'])
def test_the_weights_stay_finite(train_toy, toy_config, tmp_path, backward):
    from visionssm.openmmlab.runner import VisionRunner
    cfg = toy_config(custom_hooks=[dict(type='PoisonHook', step=4, module='model.blocks.2', backward=backward)])
    runner = VisionRunner.from_cfg(cfg)
    with pytest.raises(NonFiniteError):
        runner.train()
    assert all(bool(torch.isfinite(p).all()) for p in runner.model.parameters())


def test_a_bad_weight_is_named_as_such(train_toy, toy_config):
    from visionssm.openmmlab.runner import VisionRunner
    runner = VisionRunner.from_cfg(toy_config())
    with torch.no_grad():
        runner.model.model.blocks[1].attn.qkv.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r'the parameter model\.blocks\.1\.attn\.qkv\.weight is not finite'):
        runner.train()


def test_a_bad_image_is_named_as_such(train_toy, toy_config):
    cfg = toy_config(data_preprocessor=None)
    cfg.model.data_preprocessor = dict(mean=[0.3], std=[0.0])
    with pytest.raises(NonFiniteError, match=r"the images are not finite: \['toy/"):
        train_toy(cfg)


def test_the_guard_can_be_switched_off(train_toy, toy_config):
    cfg = toy_config(custom_hooks=[dict(type='PoisonHook', step=2, module='model.blocks.2')],
                     default_hooks=dict(nan_guard=None), train_cfg=dict(by_epoch=True, max_epochs=1))
    assert train_toy(cfg).iter == 8
