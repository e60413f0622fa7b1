"""Mamba-YOLO's configs, and trainings with them through the runner on small trees of COCO's layout."""
import json
import shutil
import uuid

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet', reason='needs the extra [det]')

from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.registry import DATASETS, MODELS, DefaultScope  # noqa: E402
from PIL import Image  # noqa: E402

import visionssm.openmmlab.detection  # noqa: E402, F401
from visionssm.data.fashion import FASHION_CLASSES  # noqa: E402
from visionssm.openmmlab.check import check_config  # noqa: E402
from visionssm.openmmlab.detection.metrics import CocoMetric  # noqa: E402
from visionssm.openmmlab.detection.transforms import to_original  # noqa: E402
from visionssm.openmmlab.runner import VisionRunner  # noqa: E402
from visionssm.utils.paths import config_root  # noqa: E402

CONFIGS = sorted(path.name for path in (config_root() / 'detection').glob('mamba-yolo*.py'))
COCO = 'mamba-yolo-tiny_8xb64-300e_coco.py'
REDUCED = 'mamba-yolo-tiny-reduced_composed.py'
SIZES = [(48, 64), (64, 40), (64, 64), (90, 60), (33, 80), (64, 64)]


def write_tree(root, classes, splits):
    """Grey pictures of several sizes with one bright square each; the third has none."""
    rng = np.random.default_rng(0)
    for folder, annotations in splits.items():
        (root / folder).mkdir(parents=True)
        (root / 'annotations').mkdir(exist_ok=True)
        content = {'images': [], 'annotations': [],
                   'categories': [{'id': number + 1, 'name': name} for number, name in enumerate(classes)]}
        for number, (height, width) in enumerate(SIZES):
            picture = np.full((height, width, 3), 80, np.uint8)
            side, label = int(rng.integers(14, 24)), int(rng.integers(2))
            x, y = int(rng.integers(width - side)), int(rng.integers(height - side))
            content['images'].append({'id': number, 'file_name': f'{number}.png', 'height': height, 'width': width})
            if number != 2:
                picture[y:y + side, x:x + side, label] = 250
                content['annotations'].append({'id': number + 1, 'image_id': number, 'category_id': label + 1,
                                               'bbox': [x, y, side, side], 'area': side * side, 'iscrowd': 0})
            Image.fromarray(picture).save(root / folder / f'{number}.png')
        (root / 'annotations' / annotations).write_text(json.dumps(content))
    return str(root) + '/'


def resized(part, before, after):
    """A part of a config with another image size."""
    if isinstance(part, dict):
        return {key: resized(value, before, after) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return type(part)(resized(value, before, after) for value in part)
    return after if part == before and isinstance(part, int) else part


def moved(part, before, after):
    """A part of a config with another data root."""
    if isinstance(part, dict):
        return {key: moved(value, before, after) for key, value in part.items()}
    return part.replace(before, after, 1) if isinstance(part, str) and part.startswith(before) else part


@pytest.fixture
def reduced(tmp_path, monkeypatch):
    """A function that makes the reduced config smaller still: 64 pixels, 8 channels, three epochs of three steps."""
    # MMEngine formats a config several times a run, which takes longer than these trainings
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **kwargs: (text, True))
    source = Config.fromfile(str(config_root() / 'detection' / REDUCED))
    root = write_tree(tmp_path / 'composed', FASHION_CLASSES,
                      {'train': 'instances_train.json', 'val': 'instances_val.json'})

    def make(name='run', epochs=3, **overrides):
        content = resized(moved(source.to_dict(), source.data_root, root), 160, 64)
        cfg = Config(content)
        cfg.merge_from_dict({
            'work_dir': str(tmp_path / name), 'experiment_name': uuid.uuid4().hex, 'log_level': 'WARNING',
            'model.model': dict(_delete_=True, name='mamba_yolo_pico', num_classes=10),
            'train_dataloader.batch_size': 2, 'val_dataloader.batch_size': 3,
            'train_cfg.max_epochs': epochs, 'train_cfg.val_interval': epochs,
            'visualizer.vis_backends': [dict(type='LocalVisBackend')], 'custom_hooks.1.epochs': 1, **overrides})
        return cfg

    return make


def test_there_is_a_config_for_every_size():
    assert len(CONFIGS) == 4


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_has_only_keys_that_something_reads(name):
    cfg = Config.fromfile(str(config_root() / 'detection' / name))
    cfg.work_dir = 'work_dirs/test'
    check_config(cfg)


@pytest.mark.parametrize('name, params', [
    (COCO, 6_131_704), ('mamba-yolo-base_8xb64-300e_coco.py', 21_828_000),
    ('mamba-yolo-large_8xb64-300e_coco.py', 57_631_024)])
def test_models_of_the_configs_have_the_official_sizes(name, params):
    cfg = Config.fromfile(str(config_root() / 'detection' / name))
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert sum(param.numel() for param in model.model.parameters()) == params
    assert model.num_classes == 80


def test_a_training_step_and_a_prediction_of_the_coco_recipe(tmp_path):
    cfg = Config.fromfile(str(config_root() / 'detection' / COCO))
    with DefaultScope.overwrite_default_scope('mmdet'):
        from mmdet.datasets import CocoDataset
        root = write_tree(tmp_path / 'coco', CocoDataset.METAINFO['classes'],
                          {'train2017': 'instances_train2017.json', 'val2017': 'instances_val2017.json'})
        cfg = Config(resized(moved(cfg.to_dict(), cfg.data_root, root), 640, 64))
        cfg.model.model.name = 'mamba_yolo_pico'
        model = MODELS.build(cfg.model)
        train, val = DATASETS.build(cfg.train_dataloader.dataset), DATASETS.build(cfg.val_dataloader.dataset)
        # the image without objects trains too
        assert len(train) == len(val) == len(SIZES)
        batch = model.data_preprocessor(pseudo_collate([train[1], train[2]]), True)
        assert batch['inputs'].shape == (2, 3, 64, 64)
        loss, _ = model.train().parse_losses(model(**batch, mode='loss'))
        loss.backward()
        assert torch.isfinite(loss)
        batch = model.data_preprocessor(pseudo_collate([val[0], val[5]]))
        assert batch['inputs'].shape == (2, 3, 96, 96)
        with torch.inference_mode():
            found = model.eval()(**batch, mode='predict')
    for sample in found:
        height, width = sample.ori_shape
        assert (sample.pred_instances.bboxes <= torch.tensor([width, height, width, height])).all()


def test_perfect_predictions_have_an_ap_of_one(reduced):
    cfg = reduced()
    pipeline = cfg.val_dataloader.dataset.pipeline
    # objects are loaded before the letterbox, so that they go through it
    pipeline.insert(1, pipeline.pop(3))
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(dict(type='visionssm.RectangularDataset', batch_size=2, size=64,
                                      dataset=cfg.val_dataloader.dataset))
    metric = CocoMetric(ann_file=cfg.val_evaluator.ann_file, metric='bbox')
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        sample: DetDataSample = dataset[index]['data_samples']
        truth = sample.gt_instances
        sample.pred_instances = truth.new(bboxes=to_original(truth.bboxes.tensor, sample.metainfo), labels=truth.labels,
                                          scores=torch.full((len(truth),), 0.9))
        metric.process({}, [sample.to_dict()])
    assert metric.evaluate(len(dataset))['coco/bbox_mAP'] == 1.0


def test_training_runs_to_the_end_with_every_hook(reduced):
    runner = VisionRunner.from_cfg(reduced())
    runner.train()
    assert runner.iter == 9
    # the schedule's values are left, not those of the warm-up
    groups = {group['name']: group for group in runner.optim_wrapper.optimizer.param_groups}
    assert groups['bias']['lr'] == groups['weight']['lr'] < 0.01
    assert groups['weight']['momentum'] == 0.937
    assert groups['weight']['weight_decay'] == pytest.approx(5e-4 * 16 / 64)
    metrics = runner.message_hub.get_scalar('val/coco/bbox_mAP').current()
    assert 0 <= metrics <= 1


def test_a_resumed_run_ends_with_the_same_weights(reduced, tmp_path, assert_same_state):
    checkpoint = {'default_hooks.checkpoint': dict(interval=2, by_epoch=False, max_keep_ckpts=-1),
                  'train_dataloader.num_workers': 1, 'train_dataloader.persistent_workers': True}
    VisionRunner.from_cfg(reduced('whole', **checkpoint)).train()
    # from the middle of the second epoch, in the warm-up, before mosaic is closed in the third
    (tmp_path / 'again').mkdir()
    shutil.copy(tmp_path / 'whole' / 'iter_4.pth', tmp_path / 'again')
    cfg = reduced('again', **checkpoint)
    cfg.resume = True
    runner = VisionRunner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 9
    assert_same_state(tmp_path / 'whole' / 'iter_8.pth', tmp_path / 'again' / 'iter_8.pth')
