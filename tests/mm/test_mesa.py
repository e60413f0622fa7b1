"""Distillation from the averaged model (MESA): its loss, its start, resumption, many processes, and what it needs."""
import numpy as np
import pytest
import torch
from mmengine.hooks import Hook

from visionssm.openmmlab.classifier import ImageClassifier
from visionssm.registry import HOOKS

# batch normalisation, drop path and dropout: what an average and a teacher can get wrong
RESNET = dict(name='test_resnet', in_chans=1, num_classes=4, drop_path_rate=0.2, drop_rate=0.1)
MIXUP = dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1)
VIT = dict(name='test_vit', img_size=8, patch_size=4, in_chans=1, num_classes=4)
AVERAGE = dict(type='EMAHook', decay=0.9, update_buffers=True)


@HOOKS.register_module(force=True)
class NotesHook(Hook):
    """Keeps the losses of every step."""

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({name: value.item() for name, value in outputs.items()})


@pytest.fixture
def mesa_config(toy_config):
    """The toy run with a model that learns from its average in the last two of three epochs."""

    def make(name='run', mesa=None, model=RESNET, hooks=(), **overrides):
        cfg = toy_config(name, **overrides)
        cfg.model.model = dict(model)
        cfg.model.update(mixup=MIXUP, mesa=mesa or dict(weight=1.5, start=0.34))
        cfg.custom_hooks = [dict(AVERAGE), *hooks]
        return cfg

    return make


def losses_of(runner):
    return next(hook.losses for hook in runner.hooks if isinstance(hook, NotesHook))


def small_batch():
    torch.manual_seed(0)
    return dict(inputs=torch.rand(4, 1, 16, 16), labels=torch.arange(4))


def test_the_loss_adds_the_cross_entropy_to_the_teachers_probabilities():
    student, teacher = (ImageClassifier(dict(RESNET, drop_path_rate=0.0, drop_rate=0.0), mesa=dict(weight=2.0),
                                        data_preprocessor=dict(mean=[0.4], std=[0.2])) for _ in range(2))
    data = student.data_preprocessor(small_batch())
    student.set_teacher(teacher)
    losses = student(**data, mode='loss')
    logits, target = student(data['inputs']), teacher(data['inputs']).softmax(-1)
    expected = 2.0 * -(target * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(losses['loss_mesa'], expected)
    torch.testing.assert_close(losses['loss_cls'], torch.nn.functional.cross_entropy(logits, data['labels']))
    total, logged = student.parse_losses(losses)
    torch.testing.assert_close(total, losses['loss_cls'] + losses['loss_mesa'])
    assert list(logged) == ['loss', 'loss_cls', 'loss_mesa']
    total.backward()
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert all(p.grad is not None for p in student.parameters())


def test_a_teacher_is_no_part_of_the_model():
    student = ImageClassifier(RESNET, mesa=dict())
    before = list(student.state_dict())
    student.set_teacher(ImageClassifier(RESNET))
    assert list(student.state_dict()) == before
    assert student.train().training and not student.teacher.training


def test_it_starts_after_its_share_of_the_training(mesa_config, train_toy):
    losses = losses_of(train_toy(mesa_config(hooks=[dict(type='NotesHook')])))
    assert ['loss_mesa' in step for step in losses] == [False] * 8 + [True] * 16
    assert all(step['loss'] == pytest.approx(step['loss_cls'] + step['loss_mesa']) for step in losses[8:])
    assert list(losses[0]) == ['loss']


def test_it_starts_in_a_run_by_steps(mesa_config, train_toy):
    cfg = mesa_config(mesa=dict(start=0.5), hooks=[dict(type='NotesHook')], param_scheduler=None,
                      train_cfg=dict(by_epoch=False, max_iters=6))
    cfg.train_dataloader.sampler.infinite = True
    assert ['loss_mesa' in step for step in losses_of(train_toy(cfg))] == [False] * 3 + [True] * 3


def test_the_teacher_is_the_average_of_weights_and_statistics(mesa_config, train_toy):
    taught = []

    class Spy(Hook):
        priority = 'LOWEST'

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            taught.append(runner.bare_model.teacher)

    cfg = mesa_config(mesa=dict(start=0.0))
    HOOKS.register_module(name='SpyHook', module=Spy, force=True)
    cfg.custom_hooks.append(dict(type='SpyHook'))
    runner = train_toy(cfg)
    average = next(hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model'))
    assert {id(teacher) for teacher in taught} == {id(average.module)}
    own, mean = runner.bare_model.state_dict(), average.module.state_dict()
    statistics = [key for key in own if key.endswith('running_var')]
    assert statistics and not any(torch.equal(own[key], mean[key]) for key in statistics)
    assert runner.bare_model.teacher is None


def test_until_it_starts_nothing_changes(mesa_config, train_toy, tmp_path, assert_same_state):
    for name, mesa in (('later', dict(start=0.9)), ('off', None)):
        cfg = mesa_config(name)
        cfg.model.mesa = mesa
        train_toy(cfg)
    assert_same_state(*(tmp_path / name / 'epoch_2.pth' for name in ('later', 'off')))
    with pytest.raises(AssertionError):
        assert_same_state(*(tmp_path / name / 'epoch_3.pth' for name in ('later', 'off')))


@pytest.mark.parametrize(('by_epoch', 'interval', 'first', 'last'), [
    (True, 1, 'epoch_1', 'epoch_3'), (False, 5, 'iter_10', 'iter_24')], ids=['before-it-starts', 'while-it-teaches'])
def test_a_resumed_run_reaches_the_same_weights(mesa_config, train_toy, tmp_path, assert_same_state, by_epoch, interval,
                                                first, last):
    def config(name, **overrides):
        cfg = mesa_config(name, **overrides)
        cfg.default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=interval, by_epoch=by_epoch))
        return cfg

    train_toy(config('whole'))
    again = config('again', resume=True, load_from=str(tmp_path / 'whole' / f'{first}.pth'))
    assert train_toy(again).iter == 24
    assert_same_state(tmp_path / 'whole' / f'{last}.pth', tmp_path / 'again' / f'{last}.pth')


def test_it_works_in_mixed_precision_with_accumulated_gradients(mesa_config, train_toy):
    cfg = mesa_config(model=VIT, hooks=[dict(type='NotesHook')])
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bf16', accumulative_counts=2)
    losses = losses_of(train_toy(cfg))
    assert all(np.isfinite(step['loss']) for step in losses) and 'loss_mesa' in losses[-1]


WRAPPERS = {'ddp': None, 'fsdp': dict(type='FullyShard', min_params=1_000)}


@pytest.mark.slow
def test_two_processes_learn_like_one_and_resume_to_the_same_weights_and_statistics(
        mesa_config, train_toy, train_in_two, tmp_path, assert_same_state):
    def config(name, batch_size, wrapper=None):
        # no batch statistics and nothing random: only the teacher's part in the sum of gradients is compared
        overrides = {} if wrapper is None else dict(model_wrapper_cfg=wrapper)
        cfg = mesa_config(name, model=VIT, hooks=[dict(type='LossHook', path=str(tmp_path / f'{name}.npy'))],
                          **overrides)
        cfg.model.pop('mixup')
        cfg.train_dataloader.update(batch_size=batch_size)
        cfg.train_dataloader.dataset.update(size=32, transform=dict(type='ShiftFlip'))
        return cfg

    def random(name, **overrides):
        # sharded: whole files are resumed by every process alike
        cfg = mesa_config(name, model_wrapper_cfg=WRAPPERS['fsdp'], **overrides)
        cfg.train_dataloader.dataset.size = 32
        return cfg

    train_toy(config('one', 8))
    first = str(tmp_path / 'whole' / 'epoch_1.pth')
    train_in_two(*(config(kind, 4, wrapper) for kind, wrapper in WRAPPERS.items()), random('whole'),
                 random('again', resume=True, load_from=first))
    assert len(np.load(tmp_path / 'one.npy')) == 12
    one = torch.load(tmp_path / 'one' / 'epoch_3.pth', weights_only=False)
    for kind in WRAPPERS:
        np.testing.assert_allclose(np.load(tmp_path / f'{kind}.npy'), np.load(tmp_path / 'one.npy'), rtol=5e-6,
                                   err_msg=kind)
        two = torch.load(tmp_path / kind / 'epoch_3.pth', weights_only=False)
        for part in ('state_dict', 'ema_state_dict'):
            for key, value in one[part].items():
                torch.testing.assert_close(two[part][key], value, rtol=0, atol=6e-4, msg=f'{kind}: {key}')
    assert_same_state(tmp_path / 'whole' / 'epoch_3.pth', tmp_path / 'again' / 'epoch_3.pth')


def test_without_an_average_the_error_tells_what_to_add(mesa_config, train_toy):
    cfg = mesa_config()
    cfg.custom_hooks = []
    with pytest.raises(ValueError, match=r'model.mesa.*needs an EMAHook.*custom_hooks=\[dict\('):
        train_toy(cfg)


@pytest.mark.parametrize(('mesa', 'message'), [
    (dict(wieght=1.0), "no key 'wieght'.*'weight'"), (dict(weight=0), 'weight must be above 0, got 0'),
    (dict(start=1.0), r'start must be in \[0, 1\).*got 1.0')], ids=['key', 'weight', 'start'])
def test_a_wrong_option_is_named(mesa, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(RESNET, mesa=mesa)
