"""MMDetection's and MMSegmentation's own configs train a step and predict, whichever module mmcv.ops runs on."""
from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='needs the extra [det]')
pytest.importorskip('mmseg', reason='needs the extra [seg]')

import mmdet  # noqa: E402
import mmseg  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.optim import OptimWrapper  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

from visionssm.openmmlab import mmcv_ops  # noqa: E402

CLASSES = 4
# What makes each model small, besides its ResNet.
FEW_QUERIES = dict(encoder=dict(num_layers=1), decoder=dict(num_layers=2), num_queries=12, test_cfg=dict(max_per_img=5))
FEW_BOXES = dict(train_cfg=dict(rpn_proposal=dict(max_per_img=20)),
                 test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(max_per_img=5)))
DETECTORS = {
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': FEW_BOXES,
    'retinanet/retinanet_r50_fpn_1x_coco.py': dict(bbox_head=dict(stacked_convs=1)),
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': dict(bbox_head=dict(stacked_convs=1)),
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py': FEW_BOXES,
    'detr/detr_r50_8xb2-150e_coco.py': FEW_QUERIES,
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py': FEW_QUERIES,
    'dino/dino-4scale_r50_8xb2-12e_coco.py': FEW_QUERIES,
    'conditional_detr/conditional-detr_r50_8xb2-50e_coco.py': FEW_QUERIES,
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py': {},
}
# Models that use the rarer operators: reassembly, deformable and masked convolutions, suppression with matches.
RARE = {
    'carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py': FEW_BOXES,
    'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py': FEW_BOXES,
    'dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py': FEW_BOXES,
    'guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco.py': dict(bbox_head=dict(stacked_convs=1)),
    'pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py': FEW_BOXES,
    'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py': FEW_BOXES,
}
SEGMENTORS = {
    '_base_/models/upernet_r50.py': dict(decode_head=dict(channels=16)),
    '_base_/models/upernet_swin.py': dict(
        backbone=dict(embed_dims=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4]),
        decode_head=dict(channels=16, in_channels=[12, 24, 48, 96]), auxiliary_head=dict(in_channels=48)),
    '_base_/models/segformer_mit-b0.py': dict(decode_head=dict(channels=16)),
    '_base_/models/pspnet_r50-d8.py': dict(decode_head=dict(channels=16)),
    '_base_/models/deeplabv3plus_r50-d8.py': dict(decode_head=dict(channels=16)),
    '_base_/models/psanet_r50-d8.py': dict(decode_head=dict(channels=16, mask_size=(9, 9))),
    '_base_/models/ccnet_r50-d8.py': dict(decode_head=dict(channels=16)),
}


def _lighten(node):
    """Drop weights that would be downloaded and batch norms that need several processes; few classes, narrow heads."""
    if isinstance(node, dict):
        if isinstance(node.get('init_cfg'), dict) and node['init_cfg'].get('type') == 'Pretrained':
            node['init_cfg'] = None
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'
        small = dict(num_classes=CLASSES, fc_out_channels=16, conv_out_channels=16)
        node.update({key: value for key, value in small.items() if key in node})
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        _lighten(child)


def _shrink(model):
    """A narrow ResNet; the layers on top of it get its widths."""
    if 'ResNet' not in model.backbone.type:
        return
    # Deformable convolutions are in the bottleneck blocks only.
    deep = 'dcn' in model.backbone
    model.backbone.update(depth=50 if deep else 18, base_channels=8, stem_channels=8)

    def narrow(width):
        return width // (8 if deep else 32)

    for part in [model.get('neck') or ConfigDict(), model.get('decode_head'), model.get('auxiliary_head')]:
        if part and 'in_channels' in part:
            part.in_channels = ([narrow(c) for c in part.in_channels] if isinstance(part.in_channels, list)
                                else narrow(part.in_channels))
        if part and 'c1_in_channels' in part:
            part.update(c1_in_channels=narrow(part.c1_in_channels), c1_channels=8)


def _build(package, path, changes):
    config = Config.fromfile(Path(package.__path__[0]) / '.mim' / 'configs' / path)
    model = config.model
    model.pop('pretrained', None)
    _lighten(model)
    _shrink(model)
    small = Config(dict(model=model))
    small.merge_from_dict(dict(model=changes))
    return package.registry.MODELS.build(small.model)


def _train_and_predict(model, data):
    torch.manual_seed(0)
    model.init_weights()
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
    before = [parameter.clone() for parameter in model.parameters()]
    model.train()
    losses = model.train_step(data, optimizer)
    assert losses and all(torch.isfinite(loss).all() for loss in losses.values()), losses
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert not all(torch.equal(old, new) for old, new in zip(before, model.parameters()))
    model.eval()
    with torch.no_grad():
        # One image at a time, because masked convolutions take no more.
        return [model.test_step({key: [value] for key, value in zip(data, pair)})[0] for pair in zip(*data.values())]


def _detects(path, changes):
    from mmdet.testing import demo_mm_inputs
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = _build(mmdet, path, changes)
        data = demo_mm_inputs(2, (3, 64, 96), [2, 1], CLASSES, with_mask='mask' in path or 'point' in path)
        results = _train_and_predict(model, data)
    assert len(results) == 2
    for found in (result.pred_instances for result in results):
        assert torch.isfinite(found.bboxes).all() and found.bboxes.shape == (len(found.scores), 4)


@pytest.mark.parametrize('path', DETECTORS, ids=lambda path: Path(path).stem)
def test_detectors_of_mmdetection_train_and_predict(path):
    _detects(path, DETECTORS[path])


@pytest.mark.parametrize('path', RARE, ids=lambda path: Path(path).stem)
def test_detectors_with_rare_operators_train_and_predict(path):
    if not mmcv_ops.is_stand_in():
        pytest.skip('mmcv has compiled operators here, which lack some of these on a CPU')
    _detects(path, RARE[path])


@pytest.mark.parametrize('path', SEGMENTORS, ids=lambda path: Path(path).stem)
def test_segmentors_of_mmsegmentation_train_and_predict(path):
    samples = []
    for seed in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
        torch.manual_seed(seed)
        sample.gt_sem_seg = PixelData(data=torch.randint(CLASSES, (1, 64, 64)))
        samples.append(sample)
    data = dict(inputs=[torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples], data_samples=samples)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = _build(mmseg, path, dict(SEGMENTORS[path], data_preprocessor=dict(size=(64, 64))))
        results = _train_and_predict(model, data)
    assert [result.pred_sem_seg.data.shape for result in results] == [(1, 64, 64)] * 2
