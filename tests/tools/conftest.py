"""A small trained-looking classifier, its checkpoint files and pictures; trees of COCO's and ADE20K's layout."""
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')

import timm  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from PIL import Image  # noqa: E402

from visionssm.checkpoints import save_safetensors  # noqa: E402

CLASSES = [f'kind {number}' for number in range(10)]


@pytest.fixture(autouse=True)
def _no_scope() -> None:
    """No run of another task before decides what a bare name means."""
    DefaultScope._instance_dict.clear()


@pytest.fixture
def run(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Runs the benchmark `tool` of a file of tests with a JSON in the temporary folder.

    Returns its exit code, standard output and standard error.
    """
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = tool.main([*map(str, arguments), '--json', str(tmp_path / 'all.json')])
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope='session')
def tiny_model() -> torch.nn.Module:
    """timm's smallest ViT for 28 x 28 grey pictures of ten classes."""
    torch.manual_seed(1)
    return timm.create_model('test_vit', img_size=28, patch_size=7, in_chans=1, num_classes=10).eval()


@pytest.fixture
def weights(tiny_model: torch.nn.Module, tmp_path: Path) -> str:
    """The bare weights as safetensors."""
    return str(save_safetensors(tiny_model.state_dict(), tmp_path / 'tiny.safetensors'))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five grey PNGs of the embedded subset's size."""
    folder = tmp_path / 'pictures'
    folder.mkdir()
    rng = np.random.default_rng(2)
    for number in range(5):
        Image.fromarray(rng.integers(0, 255, (28, 28), dtype=np.uint8)).save(folder / f'picture{number}.png')
    return folder

PALETTE = [(220, 20, 60), (0, 120, 200), (0, 160, 60)]


def boxes_picture(rng, side=64):
    """A picture of two bright rectangles on noise, their boxes (x, y, w, h) and their classes."""
    image = rng.integers(0, 90, (side, side, 3), dtype=np.uint8)
    boxes, labels = [], []
    for column in range(2):
        width, height = (int(value) for value in rng.integers(14, 28, 2))
        x, y, label = 2 + column * side // 2, int(rng.integers(2, side - height - 2)), int(rng.integers(0, 3))
        image[y:y + height, x:x + width] = np.array(PALETTE[label], dtype=np.uint8)
        boxes.append([x, y, width, height])
        labels.append(label)
    return image, boxes, labels


@pytest.fixture(scope='session')
def coco_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of COCO's layout: six pictures a split, three classes, polygons, one picture without objects."""
    root = tmp_path_factory.mktemp('coco')
    categories = [{'id': 3 * number + 1, 'name': name} for number, name in enumerate(('cat', 'dog', 'bird'))]
    for split, seed in (('train2017', 0), ('val2017', 1)):
        rng = np.random.default_rng(seed)
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(1, 7):
            name = f'{number:012}.jpg'
            picture, boxes, labels = boxes_picture(rng)
            Image.fromarray(picture).save(root / split / name, quality=95)
            images.append({'id': number, 'file_name': name, 'width': 64, 'height': 64})
            for (x, y, w, h), label in zip(boxes, labels) if number > 1 else ():
                annotations.append({
                    'id': len(annotations) + 1, 'image_id': number, 'category_id': 3 * label + 1, 'iscrowd': 0,
                    'bbox': [x, y, w, h], 'area': w * h,
                    'segmentation': [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        (root / 'annotations').mkdir(exist_ok=True)
        (root / 'annotations' / f'instances_{split}.json').write_text(
            json.dumps({'images': images, 'annotations': annotations, 'categories': categories}))
    return root


@pytest.fixture(scope='session')
def ade_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of ADE20K's layout: four pictures a split; class maps with 0 for nothing and 1, 2, 3."""
    root = tmp_path_factory.mktemp('ade')
    for split, seed in (('training', 0), ('validation', 1)):
        rng = np.random.default_rng(seed)
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for number in range(4):
            picture, boxes, labels = boxes_picture(rng)
            classes = np.zeros((64, 64), dtype=np.uint8)
            for (x, y, w, h), label in zip(boxes, labels):
                classes[y:y + h, x:x + w] = label + 1
            Image.fromarray(picture).save(root / 'images' / split / f'ADE_{number:08}.jpg', quality=95)
            Image.fromarray(classes).save(root / 'annotations' / split / f'ADE_{number:08}.png')
    return root


def _resnet(kind: str) -> dict:
    # a scope is needed where the backbone is built for the other package
    return dict(type=kind, depth=18, base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3), style='pytorch',
                norm_cfg=dict(type='BN'), norm_eval=False)


@pytest.fixture(scope='session')
def det_config(
        coco_tree: Path,
        tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Config]:
    """A function that makes the config of a tiny RetinaNet on the COCO tree; keywords replace top-level keys."""

    def make(**overrides: object) -> Config:
        meta = dict(classes=('cat', 'dog', 'bird'), palette=PALETTE)
        load, resize = dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True)
        train = [load, dict(type='LoadAnnotations', with_bbox=True), resize, dict(type='RandomFlip', prob=0.5),
                 dict(type='PackDetInputs')]
        test = [load, resize, dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs', meta_keys=(
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]

        def data(split: str, pipeline: list, **kwargs: object) -> dict:
            return dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=split == 'train2017'),
                        dataset=dict(type='CocoDataset', data_root=str(coco_tree), metainfo=meta, pipeline=pipeline,
                                     ann_file=f'annotations/instances_{split}.json', data_prefix=dict(img=f'{split}/'),
                                     **kwargs))

        head = dict(
            type='RetinaHead', num_classes=3, in_channels=16, stacked_convs=1, feat_channels=16,
            anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0],
                                  strides=[8, 16, 32]),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0))
        cfg = dict(
            default_scope='mmdet', work_dir=str(tmp_path_factory.mktemp('run')), experiment_name=uuid.uuid4().hex,
            model=dict(
                type='RetinaNet', data_preprocessor=dict(type='DetDataPreprocessor', mean=[120.0] * 3, std=[60.0] * 3,
                                                         bgr_to_rgb=True, pad_size_divisor=32),
                backbone=_resnet('ResNet'), bbox_head=head,
                neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=16, start_level=1, num_outs=3),
                train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0,
                                             ignore_iof_thr=-1),
                               sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1, debug=False),
                test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, max_per_img=20,
                              nms=dict(type='nms', iou_threshold=0.5))),
            train_dataloader=data('train2017', train, filter_cfg=dict(filter_empty_gt=False)),
            val_dataloader=data('val2017', test, test_mode=True), val_cfg=dict(type='ValLoop'),
            test_dataloader=data('val2017', test, test_mode=True), test_cfg=dict(type='TestLoop'),
            val_evaluator=dict(type='CocoMetric', metric='bbox',
                               ann_file=str(coco_tree / 'annotations/instances_val2017.json')),
            test_evaluator=dict(type='CocoMetric', metric='bbox',
                                ann_file=str(coco_tree / 'annotations/instances_val2017.json')),
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=1),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
            param_scheduler=[dict(type='MultiStepLR', by_epoch=True, milestones=[1])],
            default_hooks=dict(logger=dict(type='LoggerHook', interval=1),
                               checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1,
                                               save_best='coco/bbox_mAP'),
                               visualization=dict(type='DetVisualizationHook')),
            visualizer=dict(type='DetLocalVisualizer', name=uuid.uuid4().hex,
                            vis_backends=[dict(type='LocalVisBackend')]),
            randomness=dict(seed=3))
        cfg.update(overrides)
        return Config(cfg)

    return make


@pytest.fixture(scope='session')
def seg_config(
        ade_tree: Path,
        tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Config]:
    """A function that makes the config of a tiny FCN on the ADE tree; keywords replace top-level keys."""

    def make(**overrides: object) -> Config:
        load, labels = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True)
        train = [load, labels, dict(type='RandomCrop', crop_size=(48, 48)), dict(type='RandomFlip', prob=0.5),
                 dict(type='PackSegInputs')]
        test = [load, dict(type='Resize', scale=(64, 64), keep_ratio=True), labels, dict(type='PackSegInputs')]

        def data(split: str, pipeline: list) -> dict:
            return dict(
                batch_size=2 if split == 'training' else 1, num_workers=0,
                sampler=dict(type='InfiniteSampler' if split == 'training' else 'DefaultSampler',
                             shuffle=split == 'training'),
                dataset=dict(type='BaseSegDataset', data_root=str(ade_tree), reduce_zero_label=True, pipeline=pipeline,
                             metainfo=dict(classes=('cat', 'dog', 'bird'), palette=PALETTE), img_suffix='.jpg',
                             data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}')))

        cfg = dict(
            default_scope='mmseg', work_dir=str(tmp_path_factory.mktemp('run')), experiment_name=uuid.uuid4().hex,
            model=dict(
                type='EncoderDecoder', backbone=_resnet('ResNetV1c'),
                data_preprocessor=dict(type='SegDataPreProcessor', mean=[120.0] * 3, std=[60.0] * 3, bgr_to_rgb=True,
                                       size=(48, 48), pad_val=0, seg_pad_val=255),
                decode_head=dict(type='FCNHead', in_channels=32, in_index=2, channels=16, num_convs=1,
                                 concat_input=False, num_classes=3, norm_cfg=dict(type='BN'), dropout_ratio=0,
                                 loss_decode=dict(type='CrossEntropyLoss')),
                train_cfg=dict(), test_cfg=dict(mode='whole')),
            train_dataloader=data('training', train), val_dataloader=data('validation', test), val_cfg=dict(),
            test_dataloader=data('validation', test), test_cfg=dict(),
            val_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
            test_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=6, val_interval=6),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
            param_scheduler=[dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=6, by_epoch=False)],
            log_processor=dict(by_epoch=False),
            default_hooks=dict(logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
                               checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3),
                               visualization=dict(type='SegVisualizationHook')),
            visualizer=dict(type='SegLocalVisualizer', name=uuid.uuid4().hex,
                            vis_backends=[dict(type='LocalVisBackend')]),
            randomness=dict(seed=3))
        cfg.update(overrides)
        return Config(cfg)

    return make


@pytest.fixture(scope='session')
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], str]:
    """A function that writes a config and returns the path."""

    def write(cfg: Config) -> str:
        path = tmp_path_factory.mktemp('config') / 'config.py'
        cfg.dump(str(path))
        return str(path)

    return write


@pytest.fixture(scope='session')
def export() -> Callable[[Config], str]:
    """A function that builds a config's model with random weights and exports it as training exports the best one."""

    def write(cfg: Config) -> str:
        from visionssm.openmmlab.portable import export_dense
        from visionssm.openmmlab.scopes import registries
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = registries(cfg.default_scope)['MODELS'].build(cfg.copy().model)
        return str(export_dense(model.state_dict(), Path(cfg.work_dir) / 'best', cfg, dict(
            classes=('cat', 'dog', 'bird'), palette=PALETTE)))

    return write
