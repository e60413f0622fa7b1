"""ViTDet's cascade with one mask head, and predictions with masks merged over views."""
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')
pytest.importorskip('visionssm.openmmlab')  # before MMDetection, which looks for the operators when it is imported
pytest.importorskip('mmdet', reason='needs the extra [det]')
pytest.importorskip('visionssm.openmmlab.detection')

import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

from visionssm.utils.paths import config_root  # noqa: E402

LEVELS = [torch.Size((16, 16)), torch.Size((8, 8)), torch.Size((4, 4)), torch.Size((2, 2)), torch.Size((1, 1))]


@pytest.fixture(autouse=True)
def _scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.fixture
def head():
    """The heads of the config, with 8 channels and 16 boxes."""
    cfg = Config.fromfile(str(config_root() / '_base_/models/cascade_mask_rcnn_vitdet.py')).model
    roi = cfg.roi_head
    for extractor in (roi.bbox_roi_extractor, roi.mask_roi_extractor):
        extractor.out_channels = 8
    for stage in roi.bbox_head:
        stage.update(in_channels=8, conv_out_channels=8, fc_out_channels=8, num_classes=3)
    roi.mask_head.update(in_channels=8, conv_out_channels=8, num_classes=3)
    for stage in cfg.train_cfg.rcnn:
        stage.sampler.num = 16
    cfg.test_cfg.rcnn.score_thr = 0.0
    torch.manual_seed(0)
    return MODELS.build({**roi, 'train_cfg': cfg.train_cfg.rcnn, 'test_cfg': cfg.test_cfg.rcnn})


@pytest.fixture
def sample():
    mask = np.zeros((1, 64, 64), np.uint8)
    mask[:, 8:40, 10:50] = 1
    sample = DetDataSample(metainfo={'img_shape': (64, 64), 'ori_shape': (64, 64), 'scale_factor': (1.0, 1.0)})
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[10.0, 8.0, 50.0, 40.0]]), labels=torch.tensor([1]), masks=BitmapMasks(mask, 64, 64))
    return sample


def proposals() -> list[InstanceData]:
    boxes = torch.tensor([[9.0, 7.0, 52.0, 41.0], [0.0, 0.0, 20.0, 20.0], [30.0, 30.0, 60.0, 60.0]])
    return [InstanceData(bboxes=boxes, scores=torch.ones(3), labels=torch.zeros(3, dtype=torch.long))]


def test_there_is_one_mask_head_that_the_first_stage_trains(head, sample):
    maps = [torch.randn(1, 8, *size) for size in LEVELS]
    losses = head.loss(maps, proposals(), [sample])
    assert [name for name in losses if 'mask' in name] == ['s0.loss_mask']
    assert {f's{stage}.loss_bbox' for stage in range(3)} <= losses.keys()
    names = {name.split('.')[1] for name in head.state_dict() if name.startswith('mask_head.')}
    assert names == {'convs', 'upsample', 'conv_logits'}


def test_stages_give_the_maps_a_third_of_their_gradient_and_their_heads_all_of_it(head, sample, monkeypatch):
    grads = []
    for stages in (1, 3):
        head.zero_grad()
        maps = [torch.randn(1, 8, *size, generator=torch.Generator().manual_seed(2)).requires_grad_()
                for size in LEVELS]
        monkeypatch.setattr(head, 'num_stages', stages)
        torch.manual_seed(1)
        results = head._bbox_forward(0, maps, torch.tensor([[0.0, 9.0, 7.0, 52.0, 41.0]]))
        results['cls_score'].square().sum().backward()
        grads.append((maps[0].grad, head.bbox_head[0].fc_cls.weight.grad.clone()))
    torch.testing.assert_close(grads[1][0] * 3, grads[0][0])
    torch.testing.assert_close(grads[1][1], grads[0][1])


def test_prediction_uses_the_one_mask_head(head, sample):
    head.eval()
    maps = [torch.randn(1, 8, *size) for size in LEVELS]
    with torch.inference_mode():
        result = head.predict(maps, proposals(), [sample], rescale=True)[0]
    assert len(result.bboxes) and result.masks.shape[1:] == (64, 64)


def view(boxes: list[list[float]], scores: list[float], flip: bool) -> DetDataSample:
    sample = DetDataSample(metainfo={'ori_shape': (10, 12), 'flip': flip, 'flip_direction': flip and 'horizontal'})
    masks = torch.zeros(len(boxes), 10, 12, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[int(top):int(bottom), int(left):int(right)] = True
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor(boxes).reshape(-1, 4), scores=torch.tensor(scores),
        labels=torch.zeros(len(boxes), dtype=torch.long), masks=masks)
    return sample


class Answering(BaseModel):
    """What TTA asks of the model that it wraps."""

    def forward(self, **_: object) -> None:
        pass


@pytest.fixture
def tta():
    config = ConfigDict(nms={'type': 'nms', 'iou_threshold': 0.5}, max_per_img=2)
    return MODELS.build({'type': 'visionssm.InstanceTTAModel', 'tta_cfg': config, 'module': Answering()})


def test_masks_of_mirrored_views_are_turned_back_and_stay_with_their_boxes(tta):
    plain = view([[1.0, 2.0, 5.0, 6.0], [6.0, 0.0, 9.0, 4.0]], [0.5, 0.3], False)
    mirrored = view([[7.0, 2.0, 11.0, 6.0], [0.0, 5.0, 3.0, 9.0]], [0.9, 0.4], True)
    merged = tta.merge_preds([[plain, mirrored]])[0].pred_instances
    assert merged.scores.tolist() == pytest.approx([0.9, 0.4])
    assert merged.bboxes.tolist() == [[1.0, 2.0, 5.0, 6.0], [9.0, 5.0, 12.0, 9.0]]
    for mask, (left, top, right, bottom) in zip(merged.masks, merged.bboxes.int().tolist()):
        assert mask[top:bottom, left:right].all() and mask.sum() == (bottom - top) * (right - left)


def test_views_without_a_find_merge_to_nothing(tta):
    merged = tta.merge_preds([[view([], [], False), view([], [], True)]])[0].pred_instances
    assert len(merged.bboxes) == 0 and merged.masks.shape == (0, 10, 12)
