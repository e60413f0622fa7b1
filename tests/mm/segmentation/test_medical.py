"""Medical segmentation through MMEngine: data and what may be wrong with it, the segmentor, scores, a training."""
import math
import uuid
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmseg', reason='needs the extra [seg]')

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from PIL import Image  # noqa: E402

import visionssm  # noqa: E402
from visionssm.openmmlab.runner import VisionRunner  # noqa: E402
from visionssm.openmmlab.segmentation.medical import MedicalSegmentor  # noqa: E402
from visionssm.segmentation import prepare_image  # noqa: E402
from visionssm.utils.paths import config_root  # noqa: E402

BASE = 'segmentation/mhs-vm-unet-4h_1xb32-300e_isic2018-256x256.py'
PICO = {'name': 'mhs_vm_unet_pico', 'drop_path_rate': 0.}


@pytest.fixture(autouse=True)
def _scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def config(root: Path, work_dir: Path, **options) -> Config:
    cfg = Config.fromfile(str(config_root() / BASE))
    cfg.merge_from_dict({
        'model.model': {'_delete_': True, **PICO}, 'work_dir': str(work_dir), 'experiment_name': uuid.uuid4().hex,
        'log_level': 'WARNING', 'train_cfg.max_epochs': 2, 'train_cfg.val_begin': 2,
        'visualizer.name': uuid.uuid4().hex, 'visualizer.vis_backends': [{'type': 'LocalVisBackend'}], **options})
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.num_workers, loader.persistent_workers, loader.batch_size = 0, False, 4
        loader.dataset.data_root = str(root)
        for step in loader.dataset.pipeline:
            if step.type.endswith('MedicalResize'):
                step.size = 32
    return cfg


def test_a_training_lowers_the_loss_and_its_scores_equal_torchmetrics(lesions, tmp_path):
    torchmetrics = pytest.importorskip('torchmetrics')
    cfg = config(lesions, tmp_path / 'run')
    before = VisionRunner.from_cfg(config(lesions, tmp_path / 'before')).test()
    runner = VisionRunner.from_cfg(cfg)
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    values = {key.rpartition('/')[2]: value.current() for key, value in runner.message_hub.log_scalars.items()
              if key.startswith('val/')}
    assert losses[-1] < losses[0] and values['BceDice'] < before['BceDice']
    assert list((tmp_path / 'run').glob('best_BceDice_epoch_2.pth')) and (tmp_path / 'run' / 'epoch_2.pth').is_file()

    model = runner.model.eval()
    probs, masks = [], []
    for image, mask in zip(*(sorted((lesions / 'val' / kind).iterdir()) for kind in ('images', 'masks')), strict=True):
        image, mask = (torch.from_numpy(np.array(Image.open(file))) for file in (image, mask))
        with torch.no_grad():
            probs.append(model.model(prepare_image(image.permute(2, 0, 1), (32, 32))[None])[0])
        masks.append(torch.nn.functional.interpolate(mask[None, None] / 255, (32, 32), mode='bilinear')[0])
    probs, masks = torch.stack(probs).flatten(), (torch.stack(masks) >= 0.5).long().flatten()
    expected = {'mIoU': 'binary_jaccard_index', 'DSC': 'binary_f1_score', 'accuracy': 'binary_accuracy',
                'sensitivity': 'binary_recall', 'specificity': 'binary_specificity'}
    for name, function in expected.items():
        value = getattr(torchmetrics.functional.classification, function)((probs >= 0.5).long(), masks)
        assert values[name] == pytest.approx(100 * value.item(), abs=1e-3), name


def test_predictions_have_the_size_of_the_image_and_draw(lesions, tmp_path):
    cfg = config(lesions, tmp_path / 'run', test_evaluator={'type': 'visionssm.BinarySegMetric', 'at': 'image'})
    cfg.default_hooks.visualization = {'type': 'SegVisualizationHook', 'draw': True, 'interval': 1}
    runner = VisionRunner.from_cfg(cfg)
    values = runner.test()
    assert 0 <= values['mIoU'] <= 100 and 'BceDice' not in values
    assert len(list((tmp_path / 'run').rglob('vis_data/vis_image/test_ISIC_*.png'))) == 4
    batch = next(iter(runner.test_dataloader))
    sample = runner.model.test_step(batch)[0]
    assert sample.pred_sem_seg.data.shape == sample.gt_sem_seg.data.shape == (1, 40, 36)
    assert sample.pred_sem_seg.data.dtype == torch.int64 and sample.pred_sem_seg.net_probs.shape == (1, 32, 32)


def test_views_are_averaged_by_their_probabilities(lesions, tmp_path):
    cfg = config(lesions, tmp_path / 'run')
    for step in cfg.tta_pipeline[1].transforms[1]:
        step.size = 32
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = {**cfg.tta_model, 'module': cfg.model}
    cfg.test_dataloader.batch_size = 1
    runner = VisionRunner.from_cfg(cfg)
    probs = []
    images = iter(runner.test_dataloader)
    batch = next(images)
    for number, flip in enumerate((None, 2, 1)):
        inputs = batch['inputs'][number][0].flip(0)[None]
        out = runner.model.module.model.eval().forward_logits(inputs)
        out = out.flip(flip + 1 if flip == 2 else 2) if flip else out
        probs.append(torch.nn.functional.interpolate(out, (40, 36), mode='bilinear').sigmoid())
    merged = runner.model.eval().test_step(batch)[0]
    expected = sum(probs) / 3 > 0.5
    assert (merged.pred_sem_seg.data != expected[0]).float().mean() < 0.01
    assert 'BceDice' not in runner.test()


@pytest.mark.parametrize('layout', ['official', 'ours'])
def test_weights_load_in_the_way_of_the_tools(lesions, tmp_path, layout: str):
    donor = visionssm.create_model('mhs_vm_unet_pico')
    weights = {**visionssm.to_official('mhs_vm', donor), 'vmunet.total_ops': torch.zeros(1)}
    torch.save(weights if layout == 'official' else donor.state_dict(), tmp_path / 'best.pth')
    runner = VisionRunner.from_cfg(config(lesions, tmp_path / 'run', load_from=str(tmp_path / 'best.pth')))
    runner.test()
    own = runner.model.model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in donor.state_dict().items())


def test_the_threshold_of_tests_is_left_when_they_end(lesions, tmp_path):
    cfg = config(lesions, tmp_path / 'run')
    cfg.model.model.threshold = 0.9
    runner = VisionRunner.from_cfg(cfg)
    model, batch = runner.model, next(iter(runner.test_dataloader))
    with torch.no_grad():
        # a small network that is not trained has routes too alike for any threshold
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    train, test = (step(batch)[0].seg_logits.data for step in (model.eval().val_step, model.test_step))
    assert not torch.equal(train, test) and {scan.threshold for scan in model.scans} == {0.9}


def test_vm_unet_starts_from_a_vmamba_when_it_trains(tmp_path):
    options = {'dims': (8, 16), 'depths': (1, 1), 'd_state': 4}
    donor = visionssm.create_model('vmamba_pico', expand=2., gate='act', conv_bias=True, mlp_ratio=0., stem='v1',
                                   downsample='v1', **options)
    torch.save(donor.state_dict(), tmp_path / 'ours.pth')
    torch.save(visionssm.to_official('vmamba', donor), tmp_path / 'theirs.pth')
    for name in ('ours.pth', 'theirs.pth'):
        segmentor = MedicalSegmentor({'name': 'vm_unet', 'depths_decoder': (1, 1), **options},
                                     encoder=str(tmp_path / name))
        segmentor.init_weights()
        assert torch.equal(segmentor.model.stages[1].blocks[0].mixer.ssm.x_proj,
                           donor.stages[1].blocks[0].mixer.ssm.x_proj), name


def test_several_classes_are_labels_and_logits():
    segmentor = MedicalSegmentor({'name': 'vm_unet_pico', 'num_classes': 3})
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 3, (1, 16, 16))),
                             metainfo={'ori_shape': (20, 24)}) for _ in range(2)]
    batch = {'inputs': [torch.rand(3, 16, 16) for _ in range(2)], 'data_samples': samples}
    with torch.autocast('cpu', torch.bfloat16):
        losses = segmentor(**segmentor.data_preprocessor(batch, True), mode='loss')
    assert losses.keys() == {'loss_ce', 'loss_dice'} and all(value.dtype == torch.float32 for value in losses.values())
    predicted = segmentor.eval().test_step(batch)[0].pred_sem_seg.data
    assert predicted.shape == (1, 20, 24) and predicted.max() <= 2


@pytest.mark.parametrize(('options', 'message'), [
    ({'model': {'name': 'vmamba_tiny'}}, 'must be a model of the task segmentation'),
    ({'model': {}}, 'model.name is None'),
    ({'model': PICO, 'encoder': 'x.pth'}, 'only VM-UNet starts from a VMamba'),
    ({'model': {'name': 'vm_unet_pico'}, 'test_threshold': 0.4}, 'no fusion with a threshold'),
    ({'model': PICO, 'loss': {'type': 'visionssm.CeDiceLoss'}}, 'CeDiceLoss does not fit 1 classes')])
def test_impossible_segmentors_are_explained(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MedicalSegmentor(**options)


def test_the_rate_goes_down_and_up_again_as_officially():
    cfg = Config.fromfile(str(config_root() / BASE))
    parameter = torch.nn.Parameter(torch.zeros(1))
    from mmengine.registry import PARAM_SCHEDULERS
    ours, theirs = (torch.optim.AdamW([parameter], lr=1e-3) for _ in range(2))
    scheduler = PARAM_SCHEDULERS.build({**cfg.param_scheduler[0], 'optimizer': ours})
    official = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=50, eta_min=1e-5)
    rates = []
    for _ in range(300):
        for optimizer, schedule in ((ours, scheduler), (theirs, official)):
            optimizer.step()
            schedule.step()
        rates.append(ours.param_groups[0]['lr'])
        assert math.isclose(rates[-1], theirs.param_groups[0]['lr'], rel_tol=1e-6)
    assert rates[49] == pytest.approx(1e-5) and rates[99] == pytest.approx(1e-3)
