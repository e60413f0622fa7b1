"""The diffusion model in the engine: losses, fixed validation, training with average and grids, and its errors."""
from argparse import Namespace
from inspect import signature

import pytest
import torch

pytest.importorskip('mmengine')
pytest.importorskip('diffusers')

import numpy as np
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image
from safetensors.torch import save_file

import visionssm
from visionssm.checkpoints import load_state_dict, read_checkpoint
from visionssm.diffusion.process import GaussianDiffusion
from visionssm.openmmlab.check import check_config
from visionssm.openmmlab.checkpoint import load_any_weights
from visionssm.openmmlab.diffusion.data import ADMCenterCrop, LatentDataset
from visionssm.openmmlab.diffusion.metrics import DiffusionLoss
from visionssm.openmmlab.diffusion.model import PROCESS_TYPES, DiffusionModel, LatentPreprocessor
from visionssm.openmmlab.hooks import NonFiniteError
from visionssm.openmmlab.runner import VisionRunner
from visionssm.registry import MODELS
from visionssm.utils.paths import config_root

TINY = {'name': 'dis_pico', 'patch_size': 14, 'embed_dim': 16, 'depth': 2, 'drop_path_rate': 0.0}
CONFIGS = sorted(path.name for path in (config_root() / 'diffusion').glob('*.py'))
# parameters of the authors' class
OFFICIAL = {
    'dis-small-2_cifar10-32x32.py': 28_488_008, 'dis-large-2_imagenet-256x256.py': 407_249_952,
    'dis-huge-2_imagenet-256x256.py': 906_966_560, 'dis-huge-2_imagenet-512x512.py': 908_146_208}


def read(name: str) -> Config:
    cfg = Config.fromfile(str(config_root() / 'diffusion' / name))
    cfg.work_dir = 'work_dirs/test'
    return cfg


def tiny_config(tmp_path, **model) -> Config:
    cfg = read('dis-pico_fashion-mnist.py')
    cfg.model.model = {**TINY, **model}
    cfg.work_dir = str(tmp_path)
    cfg.experiment_name = tmp_path.name
    cfg.log_level = 'WARNING'
    cfg.train_dataloader.batch_size = 8
    cfg.train_dataloader.dataset.split = 'test'
    cfg.train_cfg = dict(by_epoch=False, max_iters=4, val_interval=4)
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint = dict(by_epoch=False, interval=4, save_best='val_loss', rule='less')
    cfg.custom_hooks[1].update(interval=2, steps=2, columns=2)
    return cfg


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_is_read_and_builds_at_full_size(name):
    cfg = read(name)
    with DefaultScope.overwrite_default_scope('visionssm'):
        check_config(cfg)
        cfg.model.model.device = 'meta'
        model = MODELS.build(cfg.model)
    count = sum(p.numel() for p in model.model.parameters())
    assert count == OFFICIAL.get(name, count)
    assert cfg.optim_wrapper.clip_grad.max_norm == 1.0 and cfg.custom_hooks[0].type == 'EMAHook'


def test_the_recipe_is_the_official_one():
    cfg = read('dis-huge-2_imagenet-512x512.py')
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-4, 0.0)
    assert cfg.train_cfg.max_epochs == 1000 and cfg.param_scheduler[1].eta_min == 1e-6
    assert cfg.param_scheduler[0].end == 5 and cfg.custom_hooks[0].decay == 0.9999


def test_a_training_validates_averages_draws_and_exports(tmp_path):
    runner = VisionRunner.from_cfg(tiny_config(tmp_path))
    runner.train()
    found = {key.removeprefix('val/'): buffer.current() for key, buffer in runner.message_hub.log_scalars.items()
             if key.startswith('val/')}
    assert found['val_loss'] == pytest.approx(found['mse'] + found['vlb'], rel=1e-4)
    assert {'mse_t0-249', 'mse_t750-999'} <= found.keys()
    assert {path.name for path in (tmp_path / 'samples').iterdir()} == {'iter_2.png', 'iter_4.png'}
    assert Image.open(tmp_path / 'samples' / 'iter_4.png').size == (2 * 30 - 2, 10 * 30 - 2)
    assert (tmp_path / 'best' / 'model.safetensors').is_file()
    assert {'train/mse', 'train/vlb'} <= runner.message_hub.log_scalars.keys()


def test_validation_is_the_same_every_time_and_for_every_batch():
    model = DiffusionModel(TINY).eval()
    images, labels = torch.rand(4, 1, 28, 28) * 2 - 1, torch.arange(4)
    whole = model(images, labels, indices=[5, 6, 7, 8], mode='predict')
    torch.manual_seed(99)
    part = model(images[2:], labels[2:], indices=[7, 8], mode='predict')
    assert [row['step'] for row in part] == [row['step'] for row in whole[2:]]
    assert [row['loss'] for row in part] == pytest.approx([row['loss'] for row in whole[2:]], rel=1e-4)


def test_losses_are_averaged_by_sections_of_the_time():
    metric = DiffusionLoss(bins=2)
    metric.process(None, [{'index': i, 'step': step, 'loss': mse, 'mse': mse}
                          for i, step, mse in ((0, 10, 1.0), (1, 499, 3.0), (2, 500, 8.0), (2, 500, 8.0))])
    assert metric.compute_metrics(metric.results) == {
        'val_loss': 4.0, 'mse': 4.0, 'mse_t0-499': 2.0, 'mse_t500-999': 8.0}


def test_a_loss_that_is_no_number_stops_with_step_time_and_checkpoint(tmp_path):
    cfg = tiny_config(tmp_path)
    runner = VisionRunner.from_cfg(cfg)
    with torch.no_grad():
        runner.model.model.pos_embed[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r'at step 1 .*time steps of the batch are \d+, .*no checkpoint'):
        runner._hooks = [hook for hook in runner._hooks if type(hook).__name__ != 'SampleGridHook']
        runner.train()


@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_the_report_of_a_nan_names_a_checkpoint_that_is_good(tmp_path, where):
    cfg = tiny_config(tmp_path)
    cfg.default_hooks.checkpoint.interval = 2
    runner = VisionRunner.from_cfg(cfg)
    model = runner.model

    def poison(*_):
        if runner.iter == 2:
            parameter = model.model.mid_block.mixer.out_proj.weight
            if where == 'gradient':
                parameter.register_hook(lambda gradient: gradient * torch.nan)
            else:
                parameter.data[0, 0] = torch.inf

    model.register_forward_pre_hook(poison)
    with pytest.raises(NonFiniteError) as caught:
        runner.train()
    message = str(caught.value)
    assert 'at step 3 (epoch ' in message
    assert where == 'gradient' or 'mid_block.mixer.out_proj.weight' in message
    assert f'time steps of the batch are {", ".join(map(str, model.last_steps))}' in message
    assert len(model.last_steps) == 8
    path = message.rpartition('the last checkpoint is ')[2].rstrip('.')
    assert path == str(tmp_path / 'iter_2.pth')
    assert all(value.isfinite().all() for value in read_checkpoint(path)['state_dict'].values())


def test_pictures_are_cut_as_adm_does():
    image = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    picture = ADMCenterCrop(40)(image)
    assert picture.shape == (3, 40, 40) and picture.dtype == torch.uint8
    assert abs(float(picture.float().mean()) - 99.5) < 2
    assert torch.equal(ADMCenterCrop(40, flip=1.0)(image), picture.flip(-1))


def test_cached_latents_are_drawn_and_scaled(tmp_path):
    moments = torch.cat([torch.full((3, 2, 4, 2, 2), 5.0), torch.full((3, 2, 4, 2, 2), 1.0)], dim=2)
    save_file({'moments': moments.half(), 'labels': torch.tensor([2, 0, 1])}, tmp_path / 'a.safetensors')
    (tmp_path / 'latents.json').write_text(
        '{"classes": ["x", "y", "z"], "shards": [{"file": "a.safetensors", "images": 3}]}')
    data = LatentDataset(str(tmp_path))
    assert len(data) == 3 and data[0]['label'] == 2 and data[0]['inputs'].shape == (8, 2, 2)
    batch = {'inputs': torch.stack([data[i]['inputs'] for i in range(3)])}
    still = LatentPreprocessor()(dict(batch))['inputs']
    assert torch.allclose(still, torch.full((3, 4, 2, 2), 5 * 0.18215))
    assert LatentPreprocessor()(dict(batch), training=True)['inputs'].std() > 0.05


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: DiffusionModel({}), "needs a 'name'"),
    (lambda: DiffusionModel({'name': 'dis_picco'}), 'dis_pico'),
    (lambda: DiffusionModel({'name': 'dis_pico', 'depht': 3}), 'depht'),
    (lambda: DiffusionModel(TINY)(torch.zeros(1, 3, 28, 28), torch.tensor([0]), mode='loss'),
     r'images have the shape \(3, 28, 28\) and the model takes \(1, 28, 28\)'),
    (lambda: DiffusionModel(TINY, data_preprocessor={'type': 'LatentPreprocessor'})(
        torch.zeros(1, 4, 8, 8), torch.tensor([0]), mode='loss'),
     r'latents have the shape \(4, 8, 8\) and the model takes \(1, 28, 28\)'),
    (lambda: LatentPreprocessor()({'inputs': torch.zeros(2, 3, 8, 8)}), 'expected means and deviations'),
    (lambda: DiffusionModel(TINY)(torch.zeros(1, 1, 32, 32), torch.tensor([0]), mode='loss'), '1, 28, 28'),
    (lambda: DiffusionModel(TINY)(torch.zeros(1, 1, 28, 28), torch.tensor([10]), mode='loss'), 'classes 0 to 9'),
    (lambda: DiffusionModel(TINY, dict(learn_sigma=False)), 'learn_sigma'),
    (lambda: DiffusionModel(3), "model.model needs a 'name'.* got 3"),
    (lambda: DiffusionModel(TINY, 3), 'model.process is 3; it must be a dict'),
    (lambda: DiffusionModel(TINY, dict(snr_gama=5)), "no key 'snr_gama'. Did you mean 'snr_gamma'"),
    (lambda: DiffusionModel(TINY, dict(steps='abc')), "process.steps is 'abc'; it must be a whole number"),
    (lambda: DiffusionModel(TINY, dict(snr_gamma=True)), 'process.snr_gamma is True; it must be a number or None'),
    (lambda: DiffusionModel(TINY, dict(rescale_vlb=1)), 'process.rescale_vlb is 1; it must be True or False'),
    (lambda: DiffusionLoss(bins=0), 'bins is 0'),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_argument_of_the_process_can_be_given():
    assert set(PROCESS_TYPES) == set(signature(GaussianDiffusion).parameters)


def test_data_without_latents_name_the_tool(tmp_path):
    with pytest.raises(FileNotFoundError, match='cache_latents'):
        LatentDataset(str(tmp_path))
    (tmp_path / 'latents.json').write_text('{"classes": [], "shards": [{"file": "a.safetensors", "images": 3}]}')
    with pytest.raises(FileNotFoundError, match='a.safetensors, which is not there'):
        LatentDataset(str(tmp_path))


def test_weights_of_the_authors_training_are_the_averaged_ones(tmp_path):
    net = DiffusionModel(TINY).model
    average = visionssm.to_official('dis', net)
    other = {key: torch.zeros_like(value) for key, value in average.items()}
    torch.save({'model': other, 'ema': average, 'opt': {}, 'args': Namespace(lr=1e-4)}, tmp_path / '0100000.pt')
    model = DiffusionModel(TINY)
    load_any_weights(model, tmp_path / '0100000.pt')
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in model.model.state_dict().items())
    rebuilt = visionssm.from_official('dis', load_state_dict(tmp_path / '0100000.pt'))
    assert torch.equal(rebuilt.pos_embed, net.pos_embed)
