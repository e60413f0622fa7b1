"""Every config of detection and segmentation can be read, checked and built, and its data and model work."""
import copy
import functools
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')
pytest.importorskip('visionssm.openmmlab')  # before MMDetection, which looks for the operators when it is imported
pytest.importorskip('mmdet', reason='needs the extra [det]')
pytest.importorskip('mmseg', reason='needs the extra [seg]')

import timm  # noqa: E402
import torch  # noqa: E402
from mmdet.datasets import CocoDataset  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, PARAM_SCHEDULERS, DefaultScope  # noqa: E402
from mmengine.structures import BaseDataElement  # noqa: E402
from PIL import Image  # noqa: E402

from visionssm.data.fashion import FASHION_CLASSES  # noqa: E402
from visionssm.openmmlab.check import ConfigError, check_config  # noqa: E402
from visionssm.utils.paths import config_root  # noqa: E402

CONFIGS = sorted(path.relative_to(config_root()).as_posix() for folder in ('detection', 'segmentation')
                 for path in (config_root() / folder).glob('*.py'))
# the other models have tests of their own
OURS = [name for name in CONFIGS if 'mask-rcnn_' in name or 'upernet_' in name]
COMPOSED = [name for name in OURS if 'composed' in name]
# one for each family and head learns a step at its full widths
RUNS = [name for name in OURS if 'ms-3x' not in name and (
    name.split('_')[1] in ('vmamba-tiny', 'vssd-micro', 'spatial-mamba-tiny', 'mamba2d-nano', 'vim2-tiny',
                           'vim-tiny-lite') or 'upernet_vim-' in name)]
PIPELINES = ['vmamba-tiny_fpn_1x', 'vmamba-tiny_fpn_ms-3x', 'vim-tiny_lsj', 'vmamba-pico_fpn', 'upernet_vmamba-tiny_4x',
             'upernet_vssd-tiny_', 'upernet_vim-tiny_', 'upernet_vmamba-pico']
SIDE = 64


@functools.cache
def _read(name: str) -> Config:
    return Config.fromfile(str(config_root() / name))


def read(name: str) -> Config:
    cfg = copy.deepcopy(_read(name))
    cfg.work_dir = 'work_dirs/test'
    return cfg


def find(part: str) -> str:
    return next(name for name in OURS if part in name)


def shrink_backbone(backbone: dict) -> None:
    """Few blocks, small images, and no weights to fetch."""
    backbone.pop('init_cfg', None)
    known = inspect.signature(type(timm.create_model(backbone['name'], device='meta')).__init__).parameters
    if 'depths' in known:
        backbone['depths'] = (1, 1, 1, 1)
        return
    backbone.update(depth=4, img_size=SIDE)
    if 'out_indices' in backbone:
        backbone['out_indices'] = (0, 1, 2, 3)


def shrink_boxes(model: dict) -> None:
    """Few boxes, and answers that do not depend on the scores."""
    model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 16
    for stage in model.train_cfg.rcnn if isinstance(model.train_cfg.rcnn, list) else [model.train_cfg.rcnn]:
        stage.sampler.num = 16
    model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=4)


def shrink_sizes(part: object) -> None:
    """Small images in a pipeline, or wherever sizes stand."""
    small = {'scale': (96, SIDE), 'scales': [(96, SIDE)], 'crop_size': (48, SIDE)}
    for key, value in list(part.items() if isinstance(part, dict) else enumerate(part)):
        if key in small:
            part[key] = small[key]
        elif isinstance(value, dict | list):
            shrink_sizes(value)


def shrink(cfg: Config) -> Config:
    """The config with an architecture of few blocks, small images and few boxes."""
    shrink_backbone(cfg.model.backbone)
    for section in (cfg.train_dataloader, cfg.val_dataloader, cfg.tta_pipeline):
        shrink_sizes(section)
    if cfg.default_scope == 'mmdet':
        shrink_boxes(cfg.model)
        cfg.model.data_preprocessor.pad_size_divisor = min(cfg.model.data_preprocessor.pad_size_divisor, SIDE)
        return cfg
    cfg.model.data_preprocessor.size = (48, SIDE)
    if 'img_size' in cfg.model.backbone:
        # crops of the size that the position embedding has, as in the recipe
        cfg.train_dataloader.dataset.pipeline[3].crop_size = cfg.model.data_preprocessor.size = (SIDE, SIDE)
        cfg.model.test_cfg.update(crop_size=(SIDE, SIDE), stride=(43, 43))
    return cfg


def write_coco(root: Path, classes: tuple[str, ...], splits: dict[str, str]) -> None:
    rng = np.random.default_rng(3)
    box = [8.0, 12.0, 40.0, 40.0]
    for folder, annotations in splits.items():
        file = {'images': [], 'annotations': [],
                'categories': [{'id': number + 1, 'name': label} for number, label in enumerate(classes)]}
        (root / folder).mkdir(parents=True)
        for number, (height, width) in enumerate([(90, 64), (70, 96)]):
            image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
            image.save(root / folder / f'{number}.jpg')
            file['images'].append({'id': number, 'file_name': f'{number}.jpg', 'height': height, 'width': width})
            file['annotations'].append({
                'id': number + 1, 'image_id': number, 'category_id': 2, 'iscrowd': 0, 'area': 1600.0, 'bbox': box,
                'segmentation': [[8.0, 12.0, 48.0, 12.0, 48.0, 52.0, 8.0, 52.0]]})
        (root / 'annotations').mkdir(exist_ok=True)
        (root / 'annotations' / annotations).write_text(json.dumps(file))


def write_ade(root: Path, sizes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(4)
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for number, size in enumerate(sizes):
            image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
            image.save(root / 'images' / split / f'{number}.jpg')
            labels = Image.fromarray(rng.integers(0, 11, size, dtype=np.uint8))
            labels.save(root / 'annotations' / split / f'{number}.png')


@pytest.fixture(scope='module')
def trees(tmp_path_factory) -> Path:
    """A folder whose `data` has trees of COCO, ADE20K and the composed sets, each with two images a split."""
    root = tmp_path_factory.mktemp('dense')
    write_coco(root / 'data/coco', CocoDataset.METAINFO['classes'], {
        'train2017': 'instances_train2017.json', 'val2017': 'instances_val2017.json'})
    write_coco(root / 'data/composed-coco', FASHION_CLASSES, {
        'train': 'instances_train.json', 'val': 'instances_val.json'})
    write_ade(root / 'data/ade/ADEChallengeData2016', [(90, 64), (70, 96)])
    write_ade(root / 'data/composed-ade', [(90, 64), (90, 64)])
    return root


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(dataset: dict, number: int = 0) -> dict:
    # without serialisation, whose garbage collection takes longer than all else
    return DATASETS.build({**dataset, 'serialize_data': False})[number]


def test_there_are_configs():
    assert len(OURS) >= 58 and len(COMPOSED) == 4


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_has_only_keys_that_something_reads(name):
    cfg = read(name)
    check_config(cfg)
    cfg.train_dataloader.batchsize = 3
    with pytest.raises(ConfigError, match='batch_size'):
        check_config(cfg)


@pytest.mark.parametrize('name', OURS)
def test_the_model_the_optimizer_and_the_schedule_build(name):
    cfg = read(name)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        with torch.device('meta'):
            model = MODELS.build(cfg.model)
        if cfg.model.get('neck'):
            assert model.backbone.out_channels == cfg.model.neck.in_channels
        elif cfg.default_scope == 'mmseg':
            assert model.backbone.out_channels == cfg.model.decode_head.in_channels
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        optimized = [p for group in wrapper.optimizer.param_groups for p in group['params']]
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for p in optimized} == trained and len(optimized) == len(trained)
        for scheduler in cfg.param_scheduler:
            scheduler.pop('convert_to_iter_based', None)
            PARAM_SCHEDULERS.build(scheduler, default_args={'optimizer': wrapper})
    with HOOKS.switch_scope_and_registry(cfg.default_scope) as registry:
        assert all(registry.get(hook.type) is not None for hook in cfg.default_hooks.values())
    assert cfg.default_hooks.checkpoint.get('by_epoch', True) == cfg.log_processor.by_epoch == cfg.train_cfg.by_epoch


@pytest.mark.parametrize('part', PIPELINES)
def test_the_pipelines_read_images_and_annotations(part, trees, monkeypatch):
    cfg = read(find(part))
    monkeypatch.chdir(trees)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        train, val = load(cfg.train_dataloader.dataset), load(cfg.val_dataloader.dataset)
        views = load({**cfg.test_dataloader.dataset, 'pipeline': cfg.tta_pipeline})
        METRICS.build(cfg.val_evaluator)
    for sample in (train, val):
        assert sample['inputs'].dtype == torch.uint8 and sample['inputs'].ndim == 3
    if cfg.default_scope == 'mmdet':
        assert len(views['inputs']) == 2 and train['data_samples'].gt_instances.masks.masks.any()
        assert val['data_samples'].gt_instances.labels.tolist() == [1]
    else:
        classes = train['data_samples'].gt_sem_seg.data
        assert classes.shape[1:] == train['inputs'].shape[1:] and 10 in classes.unique().tolist()[:11] or 9 in classes
        assert len(views['inputs']) == 2 * len(cfg.tta_pipeline[1].transforms[0])


def learn_and_answer(cfg: Config) -> tuple[torch.nn.Module, BaseDataElement]:
    """Run a training step on two images and a prediction on one."""
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    batch = pseudo_collate([load(cfg.train_dataloader.dataset, number) for number in range(2)])
    losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
    loss, logged = model.parse_losses(losses)
    loss.backward()
    assert all(torch.isfinite(value).all() for value in logged.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.inference_mode():
        return model, model.test_step(pseudo_collate([load(cfg.val_dataloader.dataset)]))[0]


@pytest.mark.parametrize('name', RUNS + COMPOSED)
def test_a_training_step_and_a_prediction_run(name, trees, monkeypatch):
    cfg = shrink(read(name))
    monkeypatch.chdir(trees)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model, answer = learn_and_answer(cfg)
        if name in COMPOSED:
            with torch.inference_mode():
                tta = MODELS.build({**cfg.tta_model, 'module': model})
                views = load({**cfg.test_dataloader.dataset, 'pipeline': cfg.tta_pipeline})
                tta.test_step(pseudo_collate([views]))
    if cfg.default_scope == 'mmdet':
        assert answer.pred_instances.masks.shape[1:] == (90, 64) and len(answer.pred_instances.bboxes) > 0
    else:
        assert answer.pred_sem_seg.data.shape == (1, 90, 64)
        assert answer.seg_logits.data.shape[0] == cfg.model.decode_head.num_classes


def test_another_persons_config_runs_with_one_line_changed(trees, tmp_path, monkeypatch):
    config = tmp_path / 'mine.py'
    config.write_text("""_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='visionssm.Backbone', name='vssd_tiny', depths=(1, 1, 1, 1)),
    neck=dict(in_channels=[64, 128, 256, 512]))
""")
    cfg = Config.fromfile(str(config))
    shrink_boxes(cfg.model)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        shrink_sizes(loader)
    monkeypatch.chdir(trees)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model, answer = learn_and_answer(cfg)
    assert model.backbone.out_channels == [64, 128, 256, 512] and len(answer.pred_instances.scores) == 4


def test_another_persons_segmenter_runs_with_one_line_changed(trees, tmp_path, monkeypatch):
    config = tmp_path / 'mine.py'
    config.write_text("""_base_ = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(_delete_=True, type='visionssm.Backbone', name='vssd_tiny', depths=(1, 1, 1, 1)),
    decode_head=dict(in_channels=[64, 128, 256, 512], norm_cfg=dict(type='BN')))
""")
    cfg = Config.fromfile(str(config))
    cfg.model.data_preprocessor.size = (48, SIDE)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        shrink_sizes(loader)
    monkeypatch.chdir(trees)
    with DefaultScope.overwrite_default_scope('mmseg'):
        _, answer = learn_and_answer(cfg)
    assert answer.pred_sem_seg.data.shape == (1, 90, 64)
