"""The adapter inside MMDetection's and MMSegmentation's models: another person's config with one line changed."""
import copy
import json

import pytest

pytest.importorskip('mmdet', reason='needs the extra [det]')
pytest.importorskip('mmseg', reason='needs the extra [seg]')

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from timm.layers import BatchNormAct2d, SyncBatchNormAct  # noqa: E402

import visionssm.openmmlab  # noqa: E402, F401
from visionssm.openmmlab.backbone import Backbone  # noqa: E402

WIDTHS = [16, 32, 64, 128]
MEAN = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
OPTIMIZER = dict(type='OptimWrapper', constructor='visionssm.LayerDecayOptimConstructor',
                 optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05), paramwise_cfg=dict(layer_decay=0.9))


def retinanet(backbone, in_channels=WIDTHS, neck='FPN'):
    necks = dict(FPN=dict(type='FPN', in_channels=in_channels, out_channels=16, num_outs=5),
                 none=dict(type='torch.nn.Identity'))
    return dict(
        type='RetinaNet',
        data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32, **MEAN),
        backbone=dict(type='visionssm.Backbone', **backbone),
        neck=necks[neck],
        bbox_head=dict(
            type='RetinaHead', num_classes=3, in_channels=16, stacked_convs=1, feat_channels=16,
            anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0],
                                  strides=[4, 8, 16, 32, 64]),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'), loss_bbox=dict(type='L1Loss')),
        train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
                       allowed_border=-1, pos_weight=-1),
        test_cfg=dict(nms_pre=50, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5))


def upernet(backbone, in_channels=WIDTHS, norm='SyncBN'):
    head = dict(num_classes=3, norm_cfg=dict(type=norm, requires_grad=True), align_corners=False, dropout_ratio=0.1)
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64), seg_pad_val=255, **MEAN),
        backbone=dict(type='visionssm.Backbone', **backbone),
        decode_head=dict(type='UPerHead', in_channels=in_channels, in_index=[0, 1, 2, 3], pool_scales=(1, 2),
                         channels=16, **head),
        auxiliary_head=dict(type='FCNHead', in_channels=in_channels[2], in_index=2, channels=16, num_convs=1, **head),
        train_cfg=dict(), test_cfg=dict(mode='whole'))


def train_and_predict(model, data):
    model.init_weights()
    model.train()
    optimizer = build_optim_wrapper(model, ConfigDict(copy.deepcopy(OPTIMIZER)))
    loss, log = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    assert all(torch.isfinite(value).all() for value in log.values())
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    optimizer.step()
    model.eval()
    with torch.no_grad():
        return model.test_step(data)


@pytest.mark.parametrize(('backbone', 'neck', 'widths'), [
    (dict(name='vmamba_pico'), 'FPN', WIDTHS),
    (dict(name='vssd_pico', frozen_stages=1, norm_eval=True), 'FPN', WIDTHS),
    (dict(name='test_resnet', out_indices=(1, 2, 3, 4)), 'FPN', [32, 48, 192, 96]),
    (dict(name='vim_pico', patch_size=16, stride=16, pyramid=dict(type='simple', out_channels=16)), 'none', None)],
    ids=['vmamba', 'vssd-frozen', 'resnet', 'vim-pyramid'])
def test_a_detector_trains_and_predicts(backbone, neck, widths):
    from mmdet.testing import demo_mm_inputs
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(retinanet(backbone, widths, neck))
        results = train_and_predict(model, demo_mm_inputs(2, (3, 64, 75), [2, 1], 3))
    assert len(results) == 2 and all(torch.isfinite(r.pred_instances.bboxes).all() for r in results)


@pytest.mark.parametrize(('backbone', 'widths'), [
    (dict(name='spatial_mamba_pico'), [12, 24, 48, 96]), (dict(name='vim2_pico', with_cp=True), [16, 32, 64, 80]),
    (dict(name='vim_pico', patch_size=16, stride=16, pyramid=dict(type='plain', residual_features=False)), [96] * 4)],
    ids=['spatial-mamba', 'vim2', 'vim'])
def test_a_segmenter_trains_and_predicts(backbone, widths):
    from mmseg.structures import SegDataSample
    samples = []
    for _ in range(2):
        samples.append(SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64))))
        samples[-1].gt_sem_seg = PixelData(data=torch.randint(3, (1, 64, 64)))
    data = dict(inputs=[torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples], data_samples=samples)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = revert_sync_batchnorm(MODELS.build(ConfigDict(upernet(backbone, widths))))
        results = train_and_predict(model, data)
    assert [r.pred_sem_seg.data.shape for r in results] == [(1, 64, 64)] * 2


def test_norms_that_are_synchronised_and_back_stay_the_same():
    model = Backbone('vssd_pico').eval()
    image = torch.randn(1, 3, 64, 64)
    expected = model(image)
    model = nn.Sequential(model)
    synchronised = convert_sync_batchnorm(model)
    kinds = {type(m) for m in synchronised.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {SyncBatchNormAct} and all(m.act is not None for m in synchronised.modules()
                                               if isinstance(m, SyncBatchNormAct))
    nn.init.constant_(next(m for m in synchronised.modules() if isinstance(m, SyncBatchNormAct)).running_var, 2.)
    back = revert_sync_batchnorm(synchronised).eval()
    assert not torch.equal(back(image)[0], expected[0])
    nn.init.constant_(next(m for m in back.modules() if isinstance(m, BatchNormAct2d)).running_var, 1.)
    for actual, wanted in zip(back(image), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_an_official_detector_file_starts_one_of_ours(tmp_path):
    """A whole file of the authors, in mmengine's layout, loads as mmdet's tools load it."""
    from mmengine.runner import load_checkpoint

    from visionssm.models._official import find_official, translate_keys
    with DefaultScope.overwrite_default_scope('mmdet'):
        first, second = (MODELS.build(retinanet(dict(name='vmamba_pico'))) for _ in range(2))
    table = find_official('vmamba').keys('Backbone_VSSM')
    state = {key: value for key, value in first.state_dict().items() if not key.startswith('backbone.')}
    inner = translate_keys(first.backbone.model.state_dict(), table, reverse=True)
    state.update({f'backbone.{key}': value for key, value in inner.items()})
    assert 'backbone.layers.0.blocks.0.norm.weight' in state and 'backbone.outnorm0.weight' in state
    torch.save(dict(state_dict=state, meta=json.loads('{"epoch": 12}')), tmp_path / 'official.pth')
    load_checkpoint(second, str(tmp_path / 'official.pth'), strict=True)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
