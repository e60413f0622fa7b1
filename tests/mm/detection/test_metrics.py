"""Average precision equals pycocotools' on the same predictions, and labels go by name."""
import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmdet', reason='needs the extra [det]')

import torch  # noqa: E402
from pycocotools import mask as coco_mask  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

from visionssm.openmmlab.detection.metrics import CocoMetric  # noqa: E402

CLASSES = ('a', 'b', 'c')
SIZE = 64


def rectangle(bbox) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    x, y, w, h = (int(value) for value in bbox)
    mask[y:y + h, x:x + w] = 1
    return mask


def encode(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {**encoded, 'counts': encoded['counts'].decode()}


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, list[dict]]:
    """An annotation file with crowds and an image without objects, and shaky predictions of it."""
    rng = np.random.default_rng(0)
    content = {'images': [{'id': n, 'file_name': f'{n}.jpg', 'width': SIZE, 'height': SIZE} for n in range(8)],
               'annotations': [], 'categories': [{'id': 10 * n, 'name': name} for n, name in enumerate(CLASSES, 1)]}
    predictions = []
    for image in range(8):
        boxes, labels = [], []
        for _ in range(0 if image == 7 else int(rng.integers(2, 7))):
            box, label = [*rng.integers(0, 34, 2).tolist(), *rng.integers(6, 30, 2).tolist()], int(rng.integers(3))
            content['annotations'].append({
                'id': len(content['annotations']) + 1, 'image_id': image, 'category_id': 10 * (label + 1), 'bbox': box,
                'area': box[2] * box[3], 'iscrowd': int(rng.random() < 0.25), 'segmentation': encode(rectangle(box))})
            boxes += [[max(0, value + shift) for value, shift in zip(box, rng.integers(-3, 4, 4))] for _ in range(2)]
            labels += [label, int(rng.integers(3))]
        boxes = np.array([*boxes, [1, 2, 30, 30]], dtype=np.float32)
        predictions.append({'img_id': image, 'ori_shape': (SIZE, SIZE), 'pred_instances': {
            'bboxes': torch.tensor(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)),
            'labels': torch.tensor([*labels, 0]), 'scores': torch.tensor(rng.random(len(boxes)).round(2)),
            'masks': torch.tensor(np.stack([rectangle(box) for box in boxes])).bool()}})
    path = tmp_path / 'annotations.json'
    path.write_text(json.dumps(content))
    return path, predictions


def evaluate(metric, predictions: list[dict], classes: tuple[str, ...] = CLASSES) -> dict[str, float]:
    metric.dataset_meta = {'classes': classes}
    metric.process({}, predictions)
    return metric.evaluate(len(predictions))


def by_pycocotools(path: Path, predictions: list[dict], kind: str, images: list[int] | None = None) -> list[float]:
    truth = COCO(str(path))
    entries = []
    for prediction in predictions:
        found = prediction['pred_instances']
        for box, label, score, mask in zip(found['bboxes'].tolist(), found['labels'].tolist(),
                                           found['scores'].tolist(), found['masks'].numpy().astype(np.uint8)):
            place = {'segmentation': encode(mask)} if kind == 'segm' else {
                'bbox': [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
            entries.append({'image_id': prediction['img_id'], 'category_id': 10 * (label + 1), 'score': score, **place})
    evaluation = COCOeval(truth, truth.loadRes(entries), kind)
    if images is not None:
        evaluation.params.imgIds = images
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6].tolist()


NAMES = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_scores_are_those_of_pycocotools_crowds_included(data, kind):
    path, predictions = data
    found = evaluate(CocoMetric(str(path), metric=kind), predictions)
    expected = by_pycocotools(path, predictions, kind)
    assert 0.05 < expected[0] < 0.95
    for name, value in zip(NAMES, expected):
        assert found[f'coco/{kind}_{name}'] == pytest.approx(value, abs=5.1e-4)


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_faster_coco_eval_gives_the_same(data, kind):
    faster = pytest.importorskip('faster_coco_eval')
    path, predictions = data
    from mmdet.evaluation import FasterCocoMetric

    assert faster.COCOeval_faster is not None
    ours = evaluate(CocoMetric(str(path), metric=kind), predictions)
    theirs = FasterCocoMetric(ann_file=str(path), metric=kind)
    assert evaluate(theirs, predictions) == pytest.approx(ours, abs=1.1e-3)


def test_labels_go_by_name_whatever_the_order_of_the_classes(data):
    path, predictions = data
    expected = evaluate(CocoMetric(str(path)), predictions)
    order = ('x', 'c', 'a', 'b')
    for prediction in predictions:
        labels = prediction['pred_instances']['labels']
        prediction['pred_instances']['labels'] = torch.tensor([order.index(CLASSES[label]) for label in labels])
    assert evaluate(CocoMetric(str(path)), predictions, order) == expected


def test_predictions_of_classes_that_the_file_lacks_do_not_count(data):
    path, predictions = data
    expected = evaluate(CocoMetric(str(path), metric=['bbox', 'segm']), predictions)
    for prediction in predictions:
        found = prediction['pred_instances']
        for key in ('bboxes', 'scores', 'masks'):
            found[key] = torch.cat([found[key], found[key][:1]])
        found['labels'] = torch.cat([found['labels'], torch.tensor([3])])
    assert evaluate(CocoMetric(str(path), metric=['bbox', 'segm']), predictions, (*CLASSES, 'new')) == expected


def test_only_images_that_were_predicted_count(data, caplog):
    path, predictions = data
    found = evaluate(CocoMetric(str(path)), predictions[:5])
    expected = by_pycocotools(path, predictions[:5], 'bbox', [0, 1, 2, 3, 4])
    assert found['coco/bbox_mAP'] == pytest.approx(expected[0], abs=5.1e-4)
    assert 'the 5 predicted images of the 8' in caplog.text


def test_no_predictions_at_all_score_zero(data):
    path, predictions = data
    for prediction in predictions:
        prediction['pred_instances'] = {key: value[:0] for key, value in prediction['pred_instances'].items()}
    found = evaluate(CocoMetric(str(path), metric=['bbox', 'segm']), predictions)
    assert found['coco/bbox_mAP'] == 0 and found['coco/segm_mAP_50'] == 0


def test_files_without_area_and_crowd_marks_can_be_evaluated(data):
    path, predictions = data
    content = json.loads(path.read_text())
    for annotation in content['annotations']:
        annotation['iscrowd'] = 0
    path.write_text(json.dumps(content))
    expected = evaluate(CocoMetric(str(path)), predictions)
    for annotation in content['annotations']:
        del annotation['area'], annotation['iscrowd']
    path.write_text(json.dumps(content))
    assert evaluate(CocoMetric(str(path)), predictions) == expected
