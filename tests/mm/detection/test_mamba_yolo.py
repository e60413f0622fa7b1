"""Mamba-YOLO as a detector of MMDetection: its losses, its boxes, and a training that learns."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet', reason='needs the extra [det]')

from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402
from safetensors import safe_open  # noqa: E402

import visionssm  # noqa: E402
import visionssm.openmmlab.detection  # noqa: E402, F401
from visionssm.openmmlab.amp import AmpOptimWrapper, OptimWrapper  # noqa: E402
from visionssm.openmmlab.detection import transforms as T  # noqa: E402
from visionssm.openmmlab.detection.mamba_yolo import MambaYOLODetector  # noqa: E402
from visionssm.openmmlab.detection.recipe import YOLOOptimConstructor  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
PLACES = [os.environ.get('VISIONSSM_GOLDEN', ''), ROOT.parent / 'shared' / 'golden', ROOT / 'tests' / 'golden']
SMALL = dict(name='mamba_yolo_pico', num_classes=3)


def annotated(boxes, labels, size=(64, 64), **meta):
    sample = DetDataSample(metainfo={'ori_shape': size, 'img_shape': size, **meta})
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.as_tensor(labels, dtype=torch.long))
    return sample


def squares(count, size=64, seed=0):
    """Grey images with one square each, whose class is its colour channel."""
    rng = np.random.default_rng(seed)
    inputs, samples = [], []
    for _ in range(count):
        side, label = int(rng.integers(16, 32)), int(rng.integers(3))
        x, y = rng.integers(0, size - side, 2).tolist()
        image = torch.full((3, size, size), 90, dtype=torch.uint8)
        image[label, y:y + side, x:x + side] = 255
        inputs.append(image)
        samples.append(annotated([[x, y, x + side, y + side]], [label], (size, size)))
    return {'inputs': inputs, 'data_samples': samples}


@pytest.fixture
def official():
    """The detector with the weights of a fixture, and what the official code computes with them."""
    found = [Path(place) / 'mamba_yolo' / 'det_d033_w0625_64.safetensors' for place in PLACES if str(place)]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        pytest.skip('the fixture det_d033_w0625_64.safetensors is not there')
    with safe_open(path, 'pt') as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    state = {key.removeprefix('state_dict.'): value for key, value in tensors.items() if key.startswith('state_dict.')}
    detector = MambaYOLODetector(dict(name='mamba_yolo_tiny', num_classes=3, dims=(8, 16, 32, 32)))
    detector.model = visionssm.from_official('mamba_yolo', state, config=json.loads(meta['config']))
    return detector, tensors, json.loads(meta['tolerance'])


def test_losses_of_a_batch_are_the_official_ones(official):
    detector, tensors, tolerance = official
    height, width = tensors['input'].shape[-2:]
    centre, size = tensors['train.targets.bboxes'].split(2, dim=1)
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1) * torch.tensor([width, height, width, height])
    samples = [annotated(boxes, tensors['train.targets.cls'][:, 0], (height, width))]
    losses = detector.train()(tensors['input'], samples, mode='loss')
    items = torch.stack([losses[f'loss_{name}'] for name in ('box', 'cls', 'dfl')])
    torch.testing.assert_close(items, tensors['train.loss_items'], rtol=tolerance['train_rel_items'], atol=0)
    total, logged = detector.parse_losses(losses)
    torch.testing.assert_close(total.reshape(1), tensors['train.loss'], rtol=tolerance['train_rel_items'], atol=0)
    assert set(logged) == {'loss', 'loss_box', 'loss_cls', 'loss_dfl'}


def test_predictions_are_the_official_ones_after_suppression(official):
    detector, tensors, _ = official
    with torch.inference_mode():
        found = detector.eval()(tensors['input'], [annotated([], [])], mode='predict')[0].pred_instances
    raw = tensors['output'][0]
    x, y, w, h = raw[:4]
    for box, score, label in zip(found.bboxes[:20], found.scores, found.labels, strict=False):
        place = (raw[4 + label] - score).abs().argmin()
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2])[:, place].clamp(0, 64)
        torch.testing.assert_close(box, corners, atol=2e-3, rtol=0)
    assert len(found) <= 300


def test_the_loss_counts_every_image_of_a_step(monkeypatch):
    detector = MambaYOLODetector(SMALL).train()
    batch = detector.data_preprocessor(squares(2), True)
    losses = detector(**batch, mode='loss')
    total, logged = detector.parse_losses(losses)
    torch.testing.assert_close(total, 2 * logged['loss'])
    # four accumulated batches, whose losses MMEngine's wrapper divides by four
    YOLOOptimConstructor(dict(optimizer=dict(type='SGD', lr=0.01), accumulative_counts=4))(detector)
    torch.testing.assert_close(detector.parse_losses(losses)[0], 8 * logged['loss'])
    # three processes, whose gradients are averaged
    monkeypatch.setattr('visionssm.openmmlab.detection.mamba_yolo.get_world_size', lambda: 3)
    torch.testing.assert_close(detector.parse_losses(losses)[0], 24 * logged['loss'])


def test_a_batch_without_objects_learns_that_there_are_none():
    detector = MambaYOLODetector(SMALL).train()
    inputs = torch.rand(2, 3, 64, 64)
    losses = detector(inputs, [annotated([], []), annotated([], [])], mode='loss')
    assert losses['loss_box'] == losses['loss_dfl'] == 0
    assert losses['loss_cls'] > 0
    detector.parse_losses(losses)[0].backward()
    missing = [name for name, param in detector.named_parameters() if param.requires_grad and param.grad is None]
    assert not missing, 'distributed training waits for every gradient'


class Boxes(torch.nn.Module):
    """A model that finds given boxes with certainty."""

    num_classes = 3
    strides = (8, 16, 32)

    def __init__(self, boxes, labels):
        super().__init__()
        boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        scores = torch.nn.functional.one_hot(torch.as_tensor(labels), 3) * 0.9
        rows = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2], scores], dim=1)
        self.output = rows.T[None]

    def forward(self, x):
        return self.output.expand(len(x), -1, -1)


@pytest.mark.parametrize('size', [(60, 90), (200, 50), (33, 64)])
def test_boxes_are_those_of_the_original_image(size):
    detector = MambaYOLODetector(SMALL).eval()
    wanted = torch.tensor([[4.0, 6.0, 20.0, 30.0], [30.0, 2.0, size[1] - 1.0, 12.0]])
    results = {'img': np.zeros((*size, 3), np.uint8), 'ori_shape': size}
    results = T.Letterbox(64, scale_up=False, minimal=True)(T.ResizeLongSide(64)(results))
    top, _, left, _ = results['pad_param']
    scale = torch.tensor(results['scale_factor']).repeat(2)
    detector.model = Boxes(wanted * scale + torch.tensor([left, top, left, top]), [0, 2])
    meta = {key: results[key] for key in ('ori_shape', 'img_shape', 'scale_factor', 'pad_param')}
    inputs = torch.zeros(1, 3, *results['img_shape'])
    found = detector(inputs, [DetDataSample(metainfo=meta)], mode='predict')[0].pred_instances
    torch.testing.assert_close(found.bboxes, wanted)
    assert found.labels.tolist() == [0, 2]
    inside = detector.predict(inputs, [DetDataSample(metainfo=meta)], rescale=False)[0].pred_instances
    torch.testing.assert_close(inside.bboxes, detector.model.output[0, :2].T.repeat(1, 2) + torch.cat(
        [-detector.model.output[0, 2:4].T, detector.model.output[0, 2:4].T], dim=1) / 2)


def test_boxes_outside_of_the_image_are_clipped():
    detector = MambaYOLODetector(SMALL).eval()
    detector.model = Boxes([[-20.0, -20.0, 200.0, 40.0]], [1])
    found = detector(torch.zeros(1, 3, 64, 64), [annotated([], [])], mode='predict')[0].pred_instances
    assert found.bboxes.tolist() == [[0, 0, 64, 40]]


def test_thresholds_come_from_the_config():
    shown = MambaYOLODetector(SMALL, test_cfg=dict(score_thr=0.95, multi_label=False)).eval()
    shown.model = Boxes([[4.0, 4.0, 20.0, 20.0]], [1])
    found = shown(torch.zeros(1, 3, 64, 64), [annotated([], [])], mode='predict')[0].pred_instances
    assert len(found) == 0
    assert found.bboxes.shape == (0, 4) and found.labels.dtype == torch.long


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="needs a 'name'"):
        MambaYOLODetector({})
    with pytest.raises(ValueError, match=r"test_cfg has no key 'score_threshold'.*score_thr"):
        MambaYOLODetector(SMALL, test_cfg=dict(score_threshold=0.3))
    with pytest.raises(ValueError, match=r"train_cfg has no key 'bbox'"):
        MambaYOLODetector(SMALL, train_cfg=dict(bbox=7.5))
    with pytest.raises(ValueError, match='mamba_yolo_tiny'):
        MambaYOLODetector(dict(name='mamba_yolo_tinny'))


def test_padding_of_a_mixed_batch_is_the_grey_of_the_letterbox():
    detector = MambaYOLODetector(SMALL)
    images = [torch.full((3, 32, 64), 255, dtype=torch.uint8), torch.zeros(3, 64, 32, dtype=torch.uint8)]
    images[0][0] = 0
    batch = detector.data_preprocessor({'inputs': images, 'data_samples': [annotated([], []), annotated([], [])]})
    assert batch['inputs'].shape == (2, 3, 64, 64)
    assert batch['inputs'][0, :, 0, 0].tolist() == [1, 1, 0], 'RGB'
    torch.testing.assert_close(batch['inputs'][0, :, 63, 0], torch.full((3,), 114 / 255))


def test_initial_weights_survive_the_runner():
    detector = MambaYOLODetector(SMALL)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    detector.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_neck_maps_and_raw_maps_have_the_strides():
    detector = MambaYOLODetector(SMALL).eval()
    x = torch.rand(1, 3, 64, 96)
    assert [tuple(item.shape[2:]) for item in detector.extract_feat(x)] == [(8, 12), (4, 6), (2, 3)]
    assert [tuple(item.shape) for item in detector(x)] == [(1, 67, 8, 12), (1, 67, 4, 6), (1, 67, 2, 3)]


def train(detector, wrapper, steps, count=4):
    losses = []
    for _ in range(steps):
        logged = detector.train_step(squares(count), wrapper)
        losses.append({key: float(value) for key, value in logged.items()})
    return losses


def test_twenty_steps_lower_the_loss():
    detector = MambaYOLODetector(SMALL).train()
    wrapper = OptimWrapper(torch.optim.AdamW(detector.parameters(), lr=2e-3), clip_grad=dict(max_norm=10.0))
    losses = [item['loss'] for item in train(detector, wrapper, 20)]
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])


def test_losses_of_mixed_precision_are_float32_and_finite():
    detector = MambaYOLODetector(SMALL).train()
    wrapper = AmpOptimWrapper(dtype='bf16', optimizer=torch.optim.SGD(detector.parameters(), lr=0.01),
                              clip_grad=dict(max_norm=10.0))
    with wrapper.optim_context(detector):
        losses = detector(**detector.data_preprocessor(squares(2), True), mode='loss')
    assert all(value.dtype == torch.float32 for value in losses.values())
    train(detector, wrapper, 2)
    assert all(bool(torch.isfinite(param).all()) for param in detector.parameters())
