"""Mamba-YOLO's recipe: parameter groups, warm-up, schedule, averaging, and the end of mosaic."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('mmdet', reason='needs the extra [det]')

from mmengine.config import Config  # noqa: E402
from mmengine.optim import LinearLR  # noqa: E402

import visionssm  # noqa: E402
import visionssm.openmmlab.detection  # noqa: E402, F401
from visionssm.models._official import to_official  # noqa: E402
from visionssm.openmmlab.detection.recipe import (  # noqa: E402
    CloseMosaicHook,
    YOLOOptimConstructor,
    YOLOWarmupHook,
    parameter_groups,
)
from visionssm.registry import HOOKS  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
KEYS = ROOT.parent / 'shared' / 'keys' / 'mamba_yolo'
SCHEDULE = ROOT / 'configs' / '_base_' / 'schedules' / 'yolo_sgd_300e.py'
SGD = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.937, nesterov=True, weight_decay=5e-4))
OFFICIAL_NAMES = {'bias': 'bias_no_decay', 'norm': 'norm_weight_no_decay', 'weight': 'decay'}


@pytest.mark.parametrize('letter, name', [('t', 'tiny'), ('b', 'base'), ('l', 'large')])
def test_groups_are_the_official_ones(letter, name):
    path = KEYS / f'mamba_yolo_{letter}.json'
    if not path.is_file():
        pytest.skip(f'{path} is missing')
    official = json.loads(path.read_text())['param_group_of_key']
    with torch.device('meta'):
        model = visionssm.create_model(f'mamba_yolo_{name}')
    # a number in the place of each parameter's values tells which official name it gets
    model = model.to_empty(device='cpu')
    for number, param in enumerate(model.parameters()):
        param.data = torch.tensor(float(number)).expand(param.shape)
    theirs = {int(value.flatten()[0]): key for key, value in to_official('mamba_yolo', model).items()
              if key in official}
    numbers = {own: number for number, (own, _) in enumerate(model.named_parameters())}
    found = {theirs[numbers[own]]: OFFICIAL_NAMES[kind] for kind, params in parameter_groups(model).items()
             for own, _ in params}
    # frozen: the numbers 0 to 15 of the head
    assert official.pop('model.21.dfl.conv.weight') == 'decay'
    assert found == official
    if letter == 't':
        assert [len(params) for params in parameter_groups(model).values()] == [166, 167, 71]


def test_weight_decay_grows_with_the_images_of_a_step():
    model = visionssm.create_model('mamba_yolo_pico', num_classes=3)
    model.accumulation = 1
    build = YOLOOptimConstructor(dict(SGD, accumulative_counts=4), dict(batch_size=32, nominal_batch_size=64))
    groups = {group['name']: group for group in build(model).optimizer.param_groups}
    assert groups['weight']['weight_decay'] == pytest.approx(5e-4 * 32 * 4 / 64)
    assert groups['bias']['weight_decay'] == groups['norm']['weight_decay'] == 0
    assert model.accumulation == 4
    plain = {group['name']: group for group in YOLOOptimConstructor(SGD)(model).optimizer.param_groups}
    assert plain['weight']['weight_decay'] == 5e-4


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match='nominal_batch_size'):
        YOLOOptimConstructor(SGD, dict(nominal_batch=64))
    with pytest.raises(ValueError, match='needs an optimizer'):
        YOLOOptimConstructor({})


def fake_runner(steps=50, **kwargs):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    wrapper = YOLOOptimConstructor(SGD)(model)
    return SimpleNamespace(optim_wrapper=wrapper, train_dataloader=range(steps), iter=0, **kwargs)


def rates(runner):
    return {group['name']: (group['lr'], group['momentum']) for group in runner.optim_wrapper.optimizer.param_groups}


def test_warm_up_values():
    runner, hook = fake_runner(steps=50), YOLOWarmupHook(epochs=3, bias_lr=0.1, momentum=0.8)
    expected = {0: (0.1, 0.0, 0.8), 75: (0.055, 0.005, 0.8685), 149: (0.1 - 0.09 * 149 / 150, 0.01 * 149 / 150,
                                                                    0.8 + 0.137 * 149 / 150), 150: (0.01, 0.01, 0.937)}
    for runner.iter, (bias_lr, lr, momentum) in expected.items():
        hook.before_train_iter(runner, 0)
        found = rates(runner)
        assert found['bias'] == pytest.approx((bias_lr, momentum))
        assert found['weight'] == found['norm'] == pytest.approx((lr, momentum))
        hook.after_train_iter(runner, 0)
        assert set(rates(runner).values()) == {(0.01, 0.937)}


def test_warm_up_lasts_a_hundred_steps_at_least_and_can_be_off():
    runner, hook = fake_runner(steps=5), YOLOWarmupHook(epochs=3)
    runner.iter = 99
    hook.before_train_iter(runner, 0)
    assert rates(runner)['weight'][0] == pytest.approx(0.01 * 0.99)
    hook.after_train_iter(runner, 0)
    runner.iter = 0
    YOLOWarmupHook(epochs=0).before_train_iter(runner, 0)
    assert rates(runner)['bias'] == (0.01, 0.937)


def test_schedule_is_the_official_one_and_ignores_the_warm_up():
    cfg = Config.fromfile(SCHEDULE)
    runner, hook = fake_runner(), YOLOWarmupHook(epochs=3)
    options = {key: value for key, value in cfg.param_scheduler[0].items() if key != 'type'}
    scheduler = LinearLR(runner.optim_wrapper, **options)
    for epoch in range(300):
        hook.before_train_iter(runner, 0)
        hook.after_train_iter(runner, 0)
        assert rates(runner)['weight'][0] == pytest.approx(0.01 * ((1 - epoch / 300) * 0.99 + 0.01), rel=1e-6)
        scheduler.step()
        runner.iter += 50


def test_average_decays_as_the_official_one():
    cfg = Config.fromfile(SCHEDULE)
    hook = HOOKS.build(next(item for item in cfg.custom_hooks if item['type'].endswith('EMAHook')))
    model = torch.nn.BatchNorm1d(1)
    hook.before_run(SimpleNamespace(model=model))
    expected = None
    for step in range(1, 6):
        model.weight.data.fill_(float(step))
        model.running_mean.fill_(-float(step))
        hook.after_train_iter(SimpleNamespace(iter=step, epoch=0), 0)
        decay = 0.9999 * (1 - math.exp(-step / 2000))
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    assert hook.ema_model.module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert hook.ema_model.module.running_mean.item() == pytest.approx(-expected, rel=1e-6)


class Mixing:
    closed = False

    def close_mosaic(self, closed):
        self.closed = closed


@pytest.mark.parametrize('wrapped', [False, True])
def test_mosaic_closes_for_the_last_epochs(wrapped):
    dataset = Mixing()
    loader = SimpleNamespace(dataset=SimpleNamespace(dataset=dataset) if wrapped else dataset)
    logged = []
    runner = SimpleNamespace(train_dataloader=loader, max_epochs=12, epoch=0,
                             logger=SimpleNamespace(info=logged.append))
    hook = CloseMosaicHook(epochs=10)
    for runner.epoch in (0, 1, 2, 11, 1):
        hook.before_train_epoch(runner)
        assert dataset.closed == (runner.epoch >= 2)
    assert len(logged) == 1


def test_mosaic_that_cannot_be_closed_is_an_error():
    runner = SimpleNamespace(train_dataloader=SimpleNamespace(dataset=[1]), max_epochs=12, epoch=0)
    with pytest.raises(ValueError, match='close_mosaic'):
        CloseMosaicHook().before_train_epoch(runner)
