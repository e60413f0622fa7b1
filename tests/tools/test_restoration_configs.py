"""The official recipes of restoration: their numbers, their models, and runs on tiny data in the layouts they name."""
import copy
import functools
import json
import re
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')
scipy_io = pytest.importorskip('scipy.io', reason='needs the extra [restoration]')

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from PIL import Image  # noqa: E402

import visionssm.openmmlab.restoration  # noqa: E402, F401
from visionssm.openmmlab.check import ConfigError, check_config  # noqa: E402
from visionssm.openmmlab.evaluate import evaluate  # noqa: E402
from visionssm.openmmlab.restoration.restorer import ImageRestorer  # noqa: E402
from visionssm.openmmlab.runner import VisionRunner  # noqa: E402
from visionssm.registry import HOOKS, METRICS, MODELS, PARAM_SCHEDULERS  # noqa: E402
from visionssm.restoration.degradations import shrink_bicubic  # noqa: E402
from visionssm.utils.paths import config_root  # noqa: E402

SCHEDULES = Path(__file__).resolve().parents[3] / 'shared/golden/mambair/train/lr_schedules.json'
# parameters as counted with the official code
COUNTS = {
    'mambair_sr': (20_421_863, 20_606_503, 20_569_575), 'mambair_light_sr': (905_016, 913_131, 924_492),
    'mambairv2_small_sr': (9_621_935, 9_806_575, 9_769_647), 'mambairv2_base_sr': (22_903_001, 23_087_641, 23_050_713),
    'mambairv2_large_sr': (34_090_523, 34_275_163, 34_238_235), 'mambairv2_light_sr': (774_092, 780_587, 789_680),
    'mambair_dn_color': 15_777_507, 'mambairv2_dn_color': 22_657_971, 'mambair_car_gray': 15_771_025,
    'mambairv2_car_gray': 22_651_705, 'mambair_unet_realdn': 26_779_480}
LONG, HALF = (250, 400, 450, 475, 500), (125, 200, 225, 237.5, 250)
LONGEST, MEDIUM = (800, 1200, 1400, 1500, 1600), (400, 600, 700, 750, 800)


def official() -> dict[str, tuple]:
    """Config -> model, pictures a step, patch, rate, milestones and length in thousands, what it starts from, seed."""
    found = {}
    for name in ('mambair', 'mambairv2-small', 'mambairv2-base', 'mambairv2-large'):
        model, first = name.replace('-', '_') + '_sr_x', f'{name}_sr-x2_8xb4-500k_df2k'
        found[first] = (f'{model}2', 32, 128, 2e-4 if name == 'mambair' else 1e-3, LONG, None, 10)
        for scale, batch in ((3, 8 if name == 'mambair' else 4), (4, 4)):
            found[f'{name}_sr-x{scale}_8xb{batch}-250k_df2k'] = (
                f'{model}{scale}', 8 * batch, 192, 1e-4, HALF, first, 10)
    for version in ('mambair', 'mambairv2'):
        for scale, patch in ((2, 128), (3, 192), (4, 192)):
            found[f'{version}-light_sr-x{scale}_2xb16-500k_div2k'] = (
                f'{version}_light_sr_x{scale}', 32, patch, 2e-4, LONG, None, 10)
        for task, first, others, model, patch, seed in (
                ('dn-sigma', 15, (25, 50), 'dn_color', 128, 10), ('car-q', 40, (10, 30), 'car_gray', 126, 42)):
            start = f'{version}_{task}{first}_8xb2-1600k_dfwb'
            found[start] = (f'{version}_{model}', 16, patch, 2e-4, LONGEST, None, seed)
            for other in others:
                found[f'{version}_{task}{other}_8xb2-800k_dfwb'] = (
                    f'{version}_{model}', 16, patch, 1e-4, MEDIUM, start, seed)
    return found


OFFICIAL = official()
UNET = 'mambair-unet_realdn_8xb1-300k_sidd'
NAMES = [*OFFICIAL, UNET]
# one of each task runs; the others of the task differ from it in numbers only
RUNS = ['mambair_sr-x3_8xb8-250k_df2k', 'mambair-light_sr-x2_2xb16-500k_div2k', 'mambair_dn-sigma25_8xb2-800k_dfwb',
        'mambair_car-q10_8xb2-800k_dfwb', UNET, 'mambairv2-small_sr-x4_8xb4-250k_df2k']


@functools.cache
def _read(name: str) -> Config:
    return Config.fromfile(str(config_root() / 'restoration' / f'{name}.py'))


def read(name: str) -> Config:
    cfg = copy.deepcopy(_read(name))
    cfg.work_dir = 'work_dirs/test'
    return cfg


def number_in(name: str) -> int:
    """The scale, noise or quality of a recipe."""
    found = re.search(r'sr-x(\d)|sigma(\d+)|car-q(\d+)', name)
    return int(next(group for group in found.groups() if group))


@pytest.fixture(autouse=True)
def _scope():
    with DefaultScope.overwrite_default_scope('visionssm'):
        yield


def test_there_is_a_config_for_every_official_recipe():
    ours = {path.stem for path in (config_root() / 'restoration').glob('*.py')}
    assert len(NAMES) == 31 and not set(NAMES) - ours


@functools.cache
def _build(name: str) -> ImageRestorer:
    with torch.device('meta'):
        return MODELS.build(dict(type='ImageRestorer', model=dict(name=name)))


# large networks take seconds even without weights
LARGE = re.compile('mambairv2(-base|-large_sr-x[23]|_dn|_car)')


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.slow] if LARGE.search(name) else []) for name in NAMES])
def test_a_config_builds_at_full_size(name):
    cfg = read(name)
    check_config(cfg)
    network = cfg.model.model.name
    assert set(cfg.model.model) == {'name'}  # so it is the registered model
    model = _build(network)
    MODELS.build({**cfg.model, 'model': dict(name='mambair_pico')})  # what the section says beside the network
    key, _, scale = network.partition('_sr_x')
    count = COUNTS[f'{key}_sr'][int(scale) - 2] if scale else COUNTS[key]
    assert sum(p.numel() for p in model.model.parameters()) == count
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert {id(p) for group in wrapper.param_groups for p in group['params']} == {id(p) for p in model.parameters()}
    assert len(wrapper.param_groups) == 1
    for scheduler in cfg.param_scheduler:
        PARAM_SCHEDULERS.build(scheduler, default_args={'optimizer': wrapper})
    for metric in (cfg.val_evaluator, cfg.test_evaluator):
        METRICS.build(metric)
    assert all(HOOKS.build(hook) for hook in cfg.get('custom_hooks', ()))
    assert cfg.default_hooks.checkpoint.save_best == 'PSNR' and not cfg.default_hooks.checkpoint.by_epoch
    assert not cfg.train_cfg.by_epoch and cfg.train_cfg.max_iters % cfg.train_cfg.val_interval == 0
    cfg.train_dataloader.dataset.pacth = 3
    with pytest.raises(ConfigError, match='patch'):
        check_config(cfg)


@pytest.mark.parametrize('name', OFFICIAL)
def test_the_recipes_have_the_official_numbers(name):
    cfg = read(name)
    model, batch, patch, rate, steps, start, seed = OFFICIAL[name]
    assert cfg.model.model.name == model and cfg.model.tile == 'official' and cfg.model.get('mixup') is None
    gpus = int(re.search(r'_(\d)xb', name).group(1))
    assert gpus * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == batch
    optimizer = dict(cfg.optim_wrapper.optimizer, betas=tuple(cfg.optim_wrapper.optimizer.betas))
    assert optimizer == dict(type='Adam', lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    assert set(cfg.optim_wrapper) == {'type', 'optimizer'} and 'custom_hooks' not in cfg
    scheduler, = cfg.param_scheduler
    assert (scheduler.type, scheduler.gamma, scheduler.by_epoch) == ('MultiStepLR', 0.5, False)
    assert [*scheduler.milestones, cfg.train_cfg.max_iters] == [1000 * step for step in steps]
    assert cfg.model.get('init_from') == (start and f'work_dirs/{start}/best/model.safetensors')
    data, test, value = cfg.train_dataloader.dataset, cfg.test_dataloader.dataset, number_in(name)
    assert (data.patch, data.augment, cfg.randomness.seed) == (patch, True, seed)
    assert cfg.train_dataloader.sampler == dict(type='SeededSampler', shuffle=True, infinite=True)
    super_resolution = '_sr-' in name
    assert cfg.test_evaluator.get('border', 0) == (value if super_resolution else 0)
    assert cfg.test_evaluator.get('y_channel', False) == ('_dn-' not in name)
    loss = cfg.model.loss
    assert loss == (dict(type='PixelLoss', kind='l1') if super_resolution else dict(type='CharbonnierLoss', eps=1e-3))
    if super_resolution:
        assert data.scale == test.common.scale == value and len(data.gt) == (1 if '-light' in name else 2)
    else:
        kind = 'sigma' if '_dn-' in name else 'quality'
        assert data.degrade[kind] == test.common.degrade[kind] == value and len(data.gt) == 4
        assert test.common.degrade.get('seed') == (0 if kind == 'sigma' else None)


def test_the_recipe_of_real_denoising_has_the_official_numbers():
    cfg = read(UNET)
    wrapper = cfg.optim_wrapper
    assert (wrapper.optimizer.type, wrapper.optimizer.lr, wrapper.optimizer.weight_decay) == ('AdamW', 3e-4, 1e-4)
    assert tuple(wrapper.optimizer.betas) == (0.9, 0.999) and wrapper.clip_grad.max_norm == 0.01
    hook, = cfg.custom_hooks
    assert hook.sizes == (128, 160, 192, 256, 320, 384) and hook.iters == (92000, 64000, 48000, 36000, 36000, 24000)
    assert sum(hook.iters) == cfg.train_cfg.max_iters == 300000 and cfg.train_dataloader.dataset.patch == 384
    assert (cfg.model.mixup, cfg.randomness.seed, cfg.train_dataloader.batch_size) == (1.2, 100, 1)


@pytest.mark.skipif(not SCHEDULES.exists(), reason='the fixtures are not at hand')
@pytest.mark.parametrize(('name', 'case'), [
    ('mambair_sr-x2_8xb4-500k_df2k', 'multistep_sr_x2'), (UNET, 'realdn_cosine_cyclic')])
def test_rates_are_the_official_ones(name, case):
    cfg = read(name)
    wanted = next(part for part in json.loads(SCHEDULES.read_text())['cases'] if part['name'] == case)['values']
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    optimizer.step()
    section, = cfg.param_scheduler
    scheduler, found = PARAM_SCHEDULERS.build(section, default_args={'optimizer': optimizer}), []
    # not to the end of the cosine, which takes long; steps between milestones change nothing
    wanted, done = [(step, rate) for step, rate in wanted if section.type == 'MultiStepLR' or step <= 100000], 1
    for step, _ in wanted:
        if section.type == 'MultiStepLR' and step > 2:
            done, scheduler.last_step = step - 1, step - 2
        while done < step:
            scheduler.step()
            done += 1
        found.append(optimizer.param_groups[0]['lr'])
    assert found == pytest.approx([rate for _, rate in wanted], rel=1e-9)


def skeleton(value: Any, key: str = '') -> Any:
    """A config with the kind of each number in its place, without the model's name."""
    if isinstance(value, dict):
        return {name: skeleton(part, name) for name, part in value.items() if name not in ('init_from', 'work_dir')}
    if isinstance(value, list | tuple):
        return [skeleton(part) for part in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 'number'
    return 'name' if key == 'name' else value


@pytest.mark.parametrize('name', [name for name in NAMES if name not in RUNS])
def test_recipes_of_a_task_differ_in_numbers_only(name):
    task = re.search(r'(-light)?_(sr|dn|car|realdn)', name).group(0).replace('-base', '')
    twin = next(other for other in RUNS if task in other and ('-light' in other) == ('-light' in name))
    assert skeleton(read(name).to_dict()) == skeleton(read(twin).to_dict())


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pair(good: Path, small: Path, names: dict[int, str], seed: int) -> None:
    """A good picture, and one for each scale below its folder X2, X3 and X4."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 7, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((60, 48), Image.Resampling.BICUBIC))
    save(pixels, good)
    for scale, name in names.items():
        shrunk = shrink_bicubic(torch.from_numpy(pixels).permute(2, 0, 1) / 255, scale).clamp(0, 1)
        save((shrunk * 255).round().byte().permute(1, 2, 0).numpy(), small / f'X{scale}' / f'{name}.png')


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `data` has tiny pictures in the layouts that the configs name, without Manga109 and Kodak24."""
    root = tmp_path_factory.mktemp('restoration')
    data, scales = root / 'data', (2, 3, 4)
    for part, name in (('DIV2K/DIV2K_train', '0001'), ('Flickr2K/Flickr2K', '000001')):
        write_pair(data / f'{part}_HR/{name}.png', data / f'{part}_LR_bicubic', {s: f'{name}x{s}' for s in scales}, 1)
    for seed, part in enumerate(('Set5', 'Set14', 'B100', 'Urban100')):
        template = 'a_LRBI_x{}' if part == 'Set14' else 'ax{}'
        write_pair(data / f'benchmark/{part}/HR/a.png', data / f'benchmark/{part}/LR_bicubic',
                   {s: template.format(s) for s in scales}, seed)
    for place in ('BSD400/1.jpg', 'WED/00001.bmp', 'benchmark/CBSD68/1.png', 'benchmark/McMaster/1.tif',
                  'benchmark/Classic5/baboon.bmp', 'benchmark/LIVE1/bikes.bmp'):
        write_pair(data / place, data, {}, 5)
    rng = np.random.default_rng(6)
    blocks = rng.integers(0, 255, (2, 1, 24, 24, 3), dtype=np.uint8)
    for kind, folder in (('Gt', 'target_crops'), ('Noisy', 'input_crops')):
        for split in ('train', 'val'):
            for number in range(2):
                save(blocks[number, 0], data / 'SIDD' / split / folder / f'{number}.png')
        scipy_io.savemat(data / f'SIDD/Validation{kind}BlocksSrgb.mat', {f'Validation{kind}BlocksSrgb': blocks})
        blocks = np.clip(blocks.astype(int) + rng.integers(-9, 9, blocks.shape), 0, 255).astype(np.uint8)
    return root


def shrink(cfg: Config, work_dir: Path) -> Config:
    """The config with the matching small network, small patches, two steps, and nothing that runs beside."""
    name = cfg.model.model.name
    small = dict(name=f'{name.partition("_")[0]}_pico', depths=(1, 1), d_state=1,
                 upscale=cfg.train_dataloader.dataset.get('scale', 1))
    if '_light_' not in name:
        small['upsampler'] = 'pixelshuffle' if '_sr_' in name else 'residual'
    if '_car_' in name:
        small['in_chans'] = 1
    if '_unet_' in name:
        small = dict(name=name, dim=32, depths=(1, 1, 1, 1), refinement=1, d_state=1)
        cfg.custom_hooks[0].update(sizes=(16, 24), iters=(1, 1))
    cfg.model.model = small
    cfg.train_dataloader.update(batch_size=2)
    cfg.train_dataloader.dataset.patch = 24
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    cfg.merge_from_dict(dict(log_level='WARNING', experiment_name=uuid.uuid4().hex, work_dir=str(work_dir)))
    return cfg


def write_start(cfg: Config) -> dict[str, torch.Tensor]:
    """The weights that a recipe starts from, at the place that it names: of 2 times, or of the same network."""
    options = dict(cfg.model.model, upscale=2 if cfg.model.model.upscale > 1 else 1)
    model = ImageRestorer(options)
    model.export(model.state_dict(), Path(cfg.model.init_from).parent, {})
    return model.state_dict()


def rows_of(table: str) -> dict[str, list[float]]:
    """The rows of a table: name to pictures, PSNR and SSIM."""
    return {found.group(1): [float(value) for value in found.group(2).split()]
            for found in re.finditer(r'^(\w+) +((?: +\d+\.?\d*)+)$', table, re.MULTILINE)}


@pytest.mark.parametrize('name', RUNS)
def test_a_recipe_trains_and_its_result_is_scored_from_the_command_line(name, root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)
    cfg = shrink(read(name), tmp_path)
    start = write_start(cfg) if cfg.model.get('init_from') else {}
    runner = VisionRunner.from_cfg(cfg.copy())
    runner.train()
    trained = runner.model.state_dict()
    # two steps of the rate away from where it started, except for what another scale has no weights for
    moved = [(trained[key] - value).abs().max().item() for key, value in start.items()
             if trained[key].shape == value.shape and value.is_floating_point()]
    assert all(gap < 1e-3 for gap in moved) and (not start or 0 < max(moved))
    cfg.dump(str(tmp_path / 'config.py'))
    capsys.readouterr()
    out = tmp_path / 'scores.json'
    folder = 'data/SIDD' if name == UNET else 'data/benchmark'
    assert evaluate([str(tmp_path / 'config.py'), str(tmp_path / 'best/model.safetensors'), '--out', str(out),
                     '--data', str(root / folder)]) == 0
    shown = capsys.readouterr()
    rows = rows_of(shown.out)
    sets = {'_sr-': ['Set5', 'Set14', 'B100', 'Urban100'], '_dn-': ['CBSD68', 'McMaster', 'Urban100'],
            '_car-': ['Classic5', 'LIVE1'], '_realdn': ['SIDD']}
    assert list(rows) == [*next(names for part, names in sets.items() if part in name), 'mean'][:len(rows)]
    assert all(5 < psnr < 60 and 0 < ssim <= 1 for _, psnr, ssim in rows.values())
    missing = {'_sr-': 'Manga109', '_dn-': 'Kodak24'}
    assert all((text in shown.out + shown.err) == (part in name) for part, text in missing.items())
    found = json.loads(out.read_text())
    assert found['summary']['PSNR'] == pytest.approx(np.mean([row['PSNR'] for row in found['sets']]))
