"""Every config that ships can be found, read, checked and built, and its model answers."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from PIL import Image

from visionssm.openmmlab.check import ConfigError, check_config
from visionssm.openmmlab.data import build_transform
from visionssm.registry import HOOKS, METRICS, MODELS, PARAM_SCHEDULERS
from visionssm.utils import paths
from visionssm.utils.paths import config_root, find_config

CONFIGS = sorted(path.relative_to(config_root()).as_posix() for path in config_root().rglob('*.py')
                 if '_base_' not in path.parts)
# enough of an architecture's depth to run it: full widths, two blocks
SMALL = {'depth': 2}


def read(name: str) -> Config:
    cfg = Config.fromfile(str(config_root() / name))
    cfg.work_dir = 'work_dirs/test'
    return cfg


@pytest.fixture(autouse=True)
def _scope():
    with DefaultScope.overwrite_default_scope('visionssm'):
        yield


def test_there_are_configs():
    assert len(CONFIGS) >= 8


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_has_only_keys_that_something_reads(name):
    check_config(read(name))


@pytest.mark.parametrize('name', CONFIGS)
def test_a_training_step_and_a_prediction_run(name):
    cfg = read(name)
    cfg.model.model.update(SMALL)
    model = MODELS.build(cfg.model)
    augment = build_transform(cfg.train_dataloader.dataset.transform)
    channels = cfg.model.model.get('in_chans', 3)
    side = cfg.model.model.get('img_size', 224)
    image = Image.new('L' if channels == 1 else 'RGB', (side + 9 * (channels > 1), side))
    batch = {'inputs': torch.stack([augment(image)] * 2), 'labels': torch.tensor([1, 0])}
    assert batch['inputs'].shape == (2, channels, side, side)
    loss = model(**model.data_preprocessor(batch, training=True), mode='loss')['loss']
    loss.backward()
    assert torch.isfinite(loss)
    model.eval()
    with torch.inference_mode():
        test_image = build_transform(cfg.val_dataloader.dataset.transform)(image)[None]
        output = model(**model.data_preprocessor({'inputs': test_image}), mode='predict')[0]
    assert output['scores'].shape == (model.num_classes,)


@pytest.mark.parametrize('name', CONFIGS)
def test_the_optimizer_the_schedule_and_the_rest_build(name):
    cfg = read(name)
    cfg.model.model.update(SMALL, device='meta')
    model = MODELS.build(cfg.model)
    cfg.optim_wrapper.constructor = f'visionssm.{cfg.optim_wrapper.constructor}'
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    optimized = {id(p) for group in wrapper.param_groups for p in group['params']}
    assert {id(p) for p in model.parameters()} <= optimized
    for scheduler in cfg.param_scheduler:
        scheduler.pop('convert_to_iter_based', None)
        PARAM_SCHEDULERS.build(scheduler, default_args={'optimizer': wrapper})
    assert METRICS.build(cfg.val_evaluator).topk == (1, 5)
    assert [HOOKS.get(hook.type) is not None for hook in cfg.custom_hooks] == [True] * len(cfg.custom_hooks)


def test_the_official_recipe_of_vim_tiny():
    cfg = read('classification/vim-tiny_8xb128-300e_imagenet.py')
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay, optimizer.eps) == ('AdamW', 1e-3, 0.1, 1e-8)
    assert cfg.train_cfg.max_epochs == 300 and cfg.train_dataloader.batch_size * 8 == 1024
    assert cfg.train_dataloader.sampler.repeats == 3
    mixup = cfg.model.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.prob, mixup.switch_prob, mixup.label_smoothing) == (
        0.8, 1.0, 1.0, 0.5, 0.1)
    transform = cfg.train_dataloader.dataset.transform
    assert (transform.auto_augment, transform.re_prob, transform.re_mode) == ('rand-m9-mstd0.5-inc1', 0.25, 'pixel')
    assert cfg.custom_hooks[0].decay == 0.99996 and cfg.val_dataloader.dataset.transform.crop_pct == 0.875


def test_fine_tuning_at_stride_8_starts_from_stride_16_with_a_constant_rate():
    cfg = read('classification/vim-small-stride8_8xb128-30e_imagenet.py')
    assert cfg.load_from == 'visionssm://vim_small' and cfg.model.model.name == 'vim_small_stride8'
    assert cfg.param_scheduler == [] and cfg.train_cfg.max_epochs == 30
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-5, 1e-8)


def test_the_demo_uses_the_embedded_pictures_everywhere():
    cfg = read('classification/vim-pico_fashion-mnist.py')
    loaders = (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader)
    assert [loader.dataset.source for loader in loaders] == ['embedded'] * 3


@pytest.mark.parametrize('name', ['classification/vim-pico_fashion-mnist.py', 'vim-pico_fashion-mnist.py',
                                  'vim-pico_fashion-mnist', 'configs/classification/vim-pico_fashion-mnist.py'])
def test_configs_are_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == config_root() / 'classification/vim-pico_fashion-mnist.py'


def test_a_wheel_carries_configs_inside_the_package(tmp_path, monkeypatch):
    folder = tmp_path / 'visionssm' / 'configs'
    (folder / '_base_').mkdir(parents=True)
    (folder / 'classification').mkdir()
    (folder / 'classification' / 'mine.py').touch()
    monkeypatch.setattr(paths, 'PACKAGE', tmp_path / 'visionssm')
    assert find_config('mine') == folder / 'classification' / 'mine.py'


def test_an_unknown_config_names_the_nearest():
    with pytest.raises(FileNotFoundError, match='vim-tiny_8xb128-300e_imagenet.py'):
        find_config('classification/vim-tiny_8xb256-300e_imagenet.py')


def test_a_misspelt_key_is_named():
    cfg = read('classification/vim-pico_fashion-mnist.py')
    cfg.train_dataloader.batchsize = 3
    with pytest.raises(ConfigError, match='batch_size'):
        check_config(cfg)


def test_configs_stay_free_of_machine_paths():
    assert not [name for name in CONFIGS if '/work' in Path(config_root() / name).read_text()]
