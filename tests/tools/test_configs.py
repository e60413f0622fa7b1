"""Every config of classification can be found, read, checked and built, and its model answers."""
import inspect

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from PIL import Image

from visionssm.openmmlab.check import ConfigError, check_config
from visionssm.openmmlab.data import build_transform
from visionssm.openmmlab.optim import LayerDecayOptimConstructor
from visionssm.registry import HOOKS, METRICS, MODELS, PARAM_SCHEDULERS
from visionssm.utils import paths
from visionssm.utils.paths import config_root, find_config

CONFIGS = sorted(f'classification/{path.name}' for path in (config_root() / 'classification').glob('*.py'))
# enough of an architecture to run it: full widths, two blocks, or one a stage and small images
SMALL = {'depth': {'depth': 2}, 'depths': {'depths': (1, 1, 1, 1)}}
SMALL_SIDE = 64


def read(name: str) -> Config:
    cfg = Config.fromfile(str(config_root() / name))
    cfg.work_dir = 'work_dirs/test'
    return cfg


def read_small(name: str) -> Config:
    """The config with an architecture of few blocks, and with small images where the model takes any size."""
    cfg = read(name)
    if not timm.is_model(cfg.model.model.name):
        pytest.skip(f'{cfg.model.model.name} is not registered')
    known = inspect.signature(type(timm.create_model(cfg.model.model.name, device='meta')).__init__).parameters
    cfg.model.model.update(SMALL['depths' if 'depths' in known else 'depth'])
    if 'depths' in known and cfg.model.model.get('in_chans', 3) == 3:
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            loader.dataset.transform.input_size = SMALL_SIDE
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
    cfg = read_small(name)
    model = MODELS.build(cfg.model)
    augment = build_transform(cfg.train_dataloader.dataset.transform)
    channels = cfg.model.model.get('in_chans', 3)
    side = cfg.train_dataloader.dataset.transform.get('input_size', 28)
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
    cfg = read_small(name)
    cfg.model.model.device = 'meta'
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


# name of the recipe -> drop path, highest, first and lowest rate, and the factor of MESA, as the authors state them
SWIN_RECIPES = {
    'vmamba-tiny': ('vmamba_tiny', 0.2, 1e-3, 1e-6, 1e-5, None),
    'vmamba-small': ('vmamba_small', 0.3, 1e-3, 1e-6, 1e-5, None),
    'vmamba-base': ('vmamba_base', 0.5, 1e-3, 1e-6, 1e-5, None),
    'vmamba-tiny-s2l5': ('vmamba_tiny_s2l5', 0.2, 1e-3, 1e-6, 1e-5, None),
    'vmamba-small-s2l15': ('vmamba_small_s2l15', 0.3, 1e-3, 1e-6, 1e-5, None),
    'vmamba-base-s2l15': ('vmamba_base_s2l15', 0.6, 1e-3, 1e-6, 1e-5, None),
    'vmamba-tiny-v0': ('vmamba_tiny_v0', 0.2, 1e-3, 1e-6, 1e-5, None),
    'vmamba-small-v0': ('vmamba_small_v0', 0.3, 1e-3, 1e-6, 1e-5, None),
    'vmamba-base-v0': ('vmamba_base_v0', 0.5, 1e-3, 1e-6, 1e-5, None),
    'vssd-micro': ('vssd_micro', 0.2, 1e-3, 1e-6, 1e-5, None),
    'vssd-tiny': ('vssd_tiny', 0.2, 1e-3, 1e-6, 1e-5, None),
    'vssd-small': ('vssd_small', 0.4, 6e-4, 1e-6, 6e-6, None),
    'vssd-base': ('vssd_base', 0.6, 6e-4, 1e-6, 6e-6, None),
    'vssd-tiny-mesa': ('vssd_tiny', 0.2, 1e-3, 1e-6, 1e-5, 1.0),
    'vssd-small-mesa': ('vssd_small', 0.4, 6e-4, 1e-6, 6e-6, 1.5),
    'vssd-base-mesa': ('vssd_base', 0.6, 6e-4, 1e-6, 6e-6, 2.0),
    'spatial-mamba-tiny': ('spatial_mamba_tiny', 0.2, 1e-3, 1e-6, 1e-5, 1.0),
    'spatial-mamba-small': ('spatial_mamba_small', 0.3, 1e-3, 1e-6, 1e-5, 1.5),
    'spatial-mamba-base': ('spatial_mamba_base', 0.5, 1e-3, 1e-6, 1e-5, 2.0),
}


@pytest.mark.parametrize('name', SWIN_RECIPES)
def test_the_official_recipes_of_swin_type(name):
    cfg = read(f'classification/{name}_8xb128-300e_imagenet.py')
    model, drop_path, lr, first, last, mesa = SWIN_RECIPES[name]
    assert (cfg.model.model.name, cfg.model.model.drop_path_rate) == (model, drop_path)
    optimizer, (warmup, cosine) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', lr, 0.05)
    assert warmup.start_factor * lr == pytest.approx(first) and cosine.eta_min == last
    assert (warmup.end, cosine.begin, cosine.end, cfg.train_cfg.max_epochs) == (20, 20, 300, 300)
    assert warmup.convert_to_iter_based and cosine.convert_to_iter_based
    assert cfg.optim_wrapper.clip_grad.max_norm == 5.0 and cfg.train_dataloader.batch_size * 8 == 1024
    assert cfg.train_dataloader.sampler.repeats == 1 and cfg.train_dataloader.dataset.transform.color_jitter == 0.4
    assert (cfg.custom_hooks[0].decay, cfg.custom_hooks[0].update_buffers) == (0.9999, True)
    assert (cfg.model.get('mesa') or {}).get('weight') == mesa
    assert mesa is None or int(cfg.model.mesa.start * 300) == 75


@pytest.mark.parametrize(('size', 'drop_path', 'dropout', 'decay'), [
    ('nano', 0.0, 0.0, 0.025), ('tiny', 0.175, 0.15, 0.05), ('small', 0.4, 0.4, 0.05)])
def test_the_official_recipes_of_mamba2d(size, drop_path, dropout, decay):
    cfg = read(f'classification/mamba2d-{size}_8xb64-accum8-300e_imagenet.py')
    assert (cfg.model.model.drop_path_rate, cfg.model.model.drop_rate) == (drop_path, dropout)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (4e-3, decay)
    assert 8 * cfg.train_dataloader.batch_size * cfg.optim_wrapper.accumulative_counts == 4096
    warmup, cosine = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, cosine.eta_min) == (1e-4, 0.05 * 300, 1e-6)
    assert (cfg.custom_hooks[0].decay, cfg.custom_hooks[0].interval) == (0.999, 8)
    assert cfg.train_dataloader.dataset.transform.interpolation == 'random'
    assert cfg.test_dataloader.dataset.transform.crop_pct == 1.0


@pytest.mark.parametrize(('name', 'kinds'), [
    ('vmamba-tiny', {'A_log', 'dt_bias', 'x_proj', 'dt_proj'}), ('vssd-tiny', set()),
    ('spatial-mamba-tiny', {'A_log', 'x_proj', 'dt_proj', 'kernels'}), ('vim2-tiny', {'x_proj', 'dt_proj'})])
def test_weight_decay_falls_on_what_the_authors_decay(name, kinds):
    cfg = read_small(f'classification/{name}_8xb128-300e_imagenet.py')
    cfg.model.model.device = 'meta'
    model = MODELS.build(cfg.model)
    groups = LayerDecayOptimConstructor(cfg.optim_wrapper, cfg.optim_wrapper.get('paramwise_cfg')).param_groups(
        model, 1e-3, 0.05)
    decayed = {id(p) for group in groups if group['weight_decay'] for p in group['params']}
    named = [(key, p, id(p) in decayed) for key, p in model.named_parameters()]
    state = ('A_log', 'D', 'dt_bias', 'x_proj', 'dt_proj', 'alpha', 'kernels')
    found = {part for key, _, decays in named if decays for part in key.split('.') if part in state}
    assert found == kinds
    ordinary = [(key, p.ndim, decays) for key, p, decays in named if key.endswith(('.weight', '.bias'))]
    assert all(decays == (ndim > 1) for _, ndim, decays in ordinary)


PICO = [name for name in CONFIGS if '-pico' in name and read(name).train_cfg.max_epochs == 10]


def test_the_comparison_differs_in_the_model_only():
    assert len(PICO) == 7
    configs = [read(name).to_dict() for name in PICO]
    names = {cfg['model']['model'].pop('name') for cfg in configs}
    assert len(names) == 7 and all(name.endswith('_pico') for name in names)
    for cfg in configs:
        cfg['model']['model'].pop('img_size', None)
    assert all(cfg == configs[0] for cfg in configs)


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
    assert not [path for path in config_root().rglob('*.py') if '/work' in path.read_text()]
