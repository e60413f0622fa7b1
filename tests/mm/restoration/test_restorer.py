"""The model of the engine: losses, tiled predictions, starts from other weights, scores, and a run with a resume."""
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from PIL import Image  # noqa: E402

import visionssm  # noqa: E402
import visionssm.openmmlab.restoration  # noqa: E402, F401
from visionssm.checkpoints import CheckpointError  # noqa: E402
from visionssm.models._official import translate_keys  # noqa: E402
from visionssm.openmmlab.restoration.hooks import ProgressivePatchHook  # noqa: E402
from visionssm.openmmlab.restoration.metrics import RestorationMetric  # noqa: E402
from visionssm.openmmlab.restoration.restorer import ImageRestorer, restore  # noqa: E402
from visionssm.openmmlab.runner import VisionRunner  # noqa: E402

TINY = dict(name='mambair_pico', depths=(1, 1), d_state=1)


@pytest.fixture(scope='module')
def restorer() -> ImageRestorer:
    torch.manual_seed(0)
    return ImageRestorer(TINY, loss=dict(type='CharbonnierLoss')).eval()


def test_the_loss_is_in_float32_under_autocast_and_predictions_are_clamped(restorer):
    x = torch.rand(2, 3, 12, 12)
    batch = dict(inputs=x, targets=torch.rand(2, 3, 24, 24), paths=['a', 'b'], indices=[4, 5], names=['s', 's'])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert restorer(**batch, mode='loss')['loss'].dtype == torch.float32
    found = restorer.val_step(dict(batch, inputs=20 * x - 10))
    assert [item['index'] for item in found] == [4, 5] and found[0]['restored'].shape == (3, 24, 24)
    assert found[0]['restored'].min() >= 0 and found[0]['restored'].max() <= 1
    with pytest.raises(ValueError, match='does the scale'):
        restorer(x, torch.rand(2, 3, 12, 12), mode='loss')


@torch.no_grad()
def test_pieces_and_forms_give_the_shape_of_the_whole_and_progress(restorer):
    x, steps = torch.rand(1, 3, 40, 33), []
    whole = restore(restorer.model, x)
    pieces = restore(restorer.model, x, 32, 16, progress=lambda done, count: steps.append((done, count)))
    assert pieces.shape == whole.shape == (1, 3, 80, 66) and steps[-1] == (4, 4)
    assert (pieces - whole).abs().mean() < 0.02
    assert torch.equal(restore(restorer.model, x, 'official'), whole)
    turned = restore(restorer.model, x.transpose(-1, -2), ensemble=True)
    torch.testing.assert_close(turned.transpose(-1, -2), restore(restorer.model, x, ensemble=True))


@torch.no_grad()
def test_networks_that_halve_their_maps_take_any_size():
    net = visionssm.create_model('mambair_unet_realdn', dim=32, depths=(1, 1, 1, 1), refinement=1, d_state=1)
    for size in ((13, 21), (3, 5), (1, 1)):
        assert restore(net, torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_names_and_options_are_checked():
    with pytest.raises(ValueError, match="needs a 'name'"):
        ImageRestorer(dict(upscale=2))
    with pytest.raises(ValueError, match='mambair_light_sr_x2'):
        ImageRestorer(dict(name='mambair_ligth_sr_x2'))
    with pytest.raises(ValueError, match='cannot be built'):
        ImageRestorer(dict(TINY, dephts=(1,)))
    with pytest.raises(ValueError, match='overlap'):
        ImageRestorer(TINY, tile=16)
    with pytest.raises(ValueError, match='mixup'):
        ImageRestorer(TINY, mixup=0)


def test_a_training_starts_from_the_weights_of_another_scale(restorer, tmp_path):
    path = restorer.export(restorer.state_dict(), tmp_path, {'PSNR': 30.})
    other = ImageRestorer(dict(TINY, upscale=3), init_from=str(path))
    other.init_weights()
    own, theirs = other.model.state_dict(), restorer.model.state_dict()
    same = [key for key in own if own[key].shape == theirs[key].shape and torch.equal(own[key], theirs[key])]
    assert 0 < len(own) - len(same) <= 2 and all(key.startswith('head') for key in set(own) - set(same))
    again = visionssm.create_model('mambair_pico', checkpoint_path=path, depths=(1, 1), d_state=1)
    assert torch.equal(again.state_dict()['conv_first.weight'], theirs['conv_first.weight'])
    with pytest.raises(FileNotFoundError, match='init_from'):
        ImageRestorer(TINY, init_from='nowhere.pth').init_weights()


@pytest.mark.parametrize('name', ['mambair_pico', 'mambairv2_pico'])
def test_a_training_for_4_times_starts_from_official_weights_for_2_times(tmp_path, name):
    options = dict(name=name, depths=(1, 1), d_state=1, upsampler='pixelshuffle')
    theirs = ImageRestorer(options).model
    family = sys.modules[type(theirs).__module__]
    table = family.OFFICIAL.keys(theirs.official_class)
    official = translate_keys(theirs.state_dict(), table, reverse=True)
    assert official.keys() != theirs.state_dict().keys()
    torch.save({'params': official}, tmp_path / 'x2.pth')
    restorer = ImageRestorer(dict(options, upscale=4), init_from=str(tmp_path / 'x2.pth'))
    restorer.init_weights()
    own, known = restorer.model.state_dict(), theirs.state_dict()
    assert {key for key in own if key not in known} == {'head.upsample.2.weight', 'head.upsample.2.bias'}
    assert all(torch.equal(own[key], value) for key, value in known.items())
    other = ImageRestorer(dict(options, upscale=4, embed_dim=64), init_from=str(tmp_path / 'x2.pth'))
    with pytest.raises(CheckpointError, match=r'x2.pth, which has \w+ of the \d+ tensors of'):
        other.init_weights()


def test_mixing_takes_half_of_the_batches_and_keeps_pairs():
    model = ImageRestorer(TINY, mixup=1.2)
    x = torch.rand(4, 3, 4, 4)
    torch.manual_seed(0)
    mixed = [model._mix(x, 2 * x) for _ in range(20)]
    assert all(torch.allclose(2 * a, b) for a, b in mixed)
    assert 4 < sum(torch.equal(a, x) for a, _ in mixed) < 16


def sample(index: int, name: str, error: float) -> dict:
    target = torch.full((3, 20, 20), 0.5)
    return dict(index=index, name=name, path=f'{name}.png', target=target, restored=target + error)


def test_scores_are_averaged_over_pictures_then_over_sets():
    metric = RestorationMetric(border=2)
    metric.process(None, [sample(0, 'A', 0.1), sample(1, 'A', 0.02), sample(2, 'B', 0.1), sample(2, 'B', 0.1)])
    values = metric.compute_metrics(metric.results)
    ten = values['PSNR_B']
    assert ten == pytest.approx(20., abs=0.3) and values['PSNR_A'] > ten
    assert values['PSNR'] == pytest.approx((values['PSNR_A'] + ten) / 2)
    assert [(row['class'], row['images']) for row in metric.rows] == [('A', 2), ('B', 1)]
    volume = RestorationMetric(volume=True)
    volume.process(None, [sample(0, 'A', 0.1)])
    assert volume.compute_metrics(volume.results)['PSNR'] == pytest.approx(20.)
    with pytest.raises(ValueError, match='A.png: SSIM needs'):
        RestorationMetric(border=5).process(None, [sample(0, 'A', 0.1)])
    with pytest.raises(ValueError, match='volume'):
        RestorationMetric(border=2, volume=True)


class _At:
    def __init__(self, step: int) -> None:
        self.iter = step


def test_patches_grow_in_stages():
    hook = ProgressivePatchHook((8, 16), (2, 2), (4, 1), scale=2)
    for step, size, count in ((0, 8, 4), (1, 8, 4), (2, 16, 1), (9, 16, 1)):
        batch = dict(inputs=torch.rand(4, 3, 8, 8), targets=torch.rand(4, 3, 16, 16), paths=['p'] * 4)
        batch['inputs'] = batch['targets'][..., ::2, ::2]
        hook.before_train_iter(_At(step), 0, batch)
        assert batch['targets'].shape == (count, 3, size, size) and len(batch['paths']) == count
        assert torch.equal(batch['inputs'], batch['targets'][..., ::2, ::2])
    with pytest.raises(ValueError, match='patch=32'):
        ProgressivePatchHook((32,), (1,)).before_train_iter(_At(0), 0, dict(targets=torch.rand(1, 3, 16, 16)))
    with pytest.raises(ValueError, match='one of each a stage'):
        ProgressivePatchHook((8, 16), (2,))


def run_config(root: Path, name: str, **overrides) -> Config:
    loader = dict(num_workers=0, collate_fn=dict(type='collate_pairs'))
    fault = dict(type='SecondOrderFault', scale=2)
    common = dict(gt='.', data_root=str(root / 'pictures'), scale=2, name='noise')
    return Config(dict(
        default_scope='visionssm', work_dir=str(root / name), experiment_name=uuid.uuid4().hex,
        model=dict(type='ImageRestorer', model=TINY, mixup=1.2),
        train_dataloader=dict(loader, batch_size=2, sampler=dict(type='SeededSampler', infinite=True), dataset=dict(
            type='PairedImages', patch=16, augment=True, degrade=fault, **common)),
        val_dataloader=dict(loader, batch_size=1, sampler=dict(type='SeededSampler', shuffle=False), dataset=dict(
            type='PairedImages', degrade=dict(type='BicubicFault', scale=2), **common)),
        val_cfg=dict(), val_evaluator=dict(type='RestorationMetric', border=2, y_channel=True),
        train_cfg=dict(by_epoch=False, max_iters=4, val_interval=2),
        custom_hooks=[dict(type='ProgressivePatchHook', sizes=(8, 16), iters=(3, 1), scale=2)],
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=1e-3, betas=(0.9, 0.99))),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2, save_best='PSNR',
                                           rule='greater')),
        log_processor=dict(by_epoch=False), randomness=dict(seed=3), log_level='WARNING', **overrides))


def test_a_run_resumes_to_the_same_weights_and_exports_its_best_model(tmp_path):
    (tmp_path / 'pictures').mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (32, 36, 3), dtype=np.uint8)).save(
            tmp_path / 'pictures' / f'{number}.png')
    whole = VisionRunner.from_cfg(run_config(tmp_path, 'run'))
    weights = {key: value.clone() for key, value in whole.train().state_dict().items()}
    again = run_config(tmp_path, 'again', resume=True, load_from=str(tmp_path / 'run' / 'iter_2.pth'))
    resumed = VisionRunner.from_cfg(again).train().state_dict()
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)
    assert (tmp_path / 'run' / 'best' / 'model.safetensors').is_file()
