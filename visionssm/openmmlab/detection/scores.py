"""The scores of COCO's evaluation as it computed them: MMDetection's metric keeps three digits and few of them."""
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from mmdet.evaluation.metrics import coco_metric, faster_coco_metric

__all__ = ['coco_scores', 'record_coco']

NAMES = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')
EVALUATORS = ((coco_metric, 'COCOeval'), (coco_metric, 'COCOevalMP'), (faster_coco_metric, 'COCOeval_faster'))


def _mean(precision: np.ndarray) -> float | None:
    """Per cent; None where no object counts, which the evaluation marks by -1."""
    valid = precision[precision > -1]
    return 100 * float(valid.mean()) if valid.size else None


def coco_scores(evaluation: Any) -> dict[str, Any]:
    """The scores of a finished evaluation.

    Args:
        evaluation: A `COCOeval` after `accumulate`.

    Returns:
        `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl` in per cent (None where there are no such objects), and `classes`,
        a list of the same for each class with its name in `class` and the number of its objects in `count`.
    """
    # (IoU thresholds, recalls, classes, sizes of objects, numbers of detections)
    precision = np.asarray(evaluation.eval['precision'])
    thresholds, most = np.asarray(evaluation.params.iouThrs), list(evaluation.params.maxDets)
    # COCO counts 100 detections an image; MMDetection adds larger numbers, for recall
    precision = precision[..., most.index(100) if 100 in most else -1]

    def scores(part: np.ndarray) -> dict[str, float | None]:
        every = part[:, :, :, 0]
        at = [every[np.isclose(thresholds, value)] for value in (0.5, 0.75)]
        sizes = [part[:, :, :, size] for size in range(1, part.shape[3])]
        return dict(zip(NAMES, map(_mean, (every, *at, *sizes)), strict=False))

    api, rows = evaluation.cocoGt, []
    for place, category in enumerate(evaluation.params.catIds):
        number = len(api.getAnnIds(imgIds=list(evaluation.params.imgIds), catIds=[category], iscrowd=False))
        rows.append({'class': api.loadCats(int(category))[0]['name'], 'count': number,
                     **scores(precision[:, :, place:place + 1])})
    return {**scores(precision), 'classes': rows}


@contextmanager
def record_coco() -> Iterator[dict[str, dict[str, Any]]]:
    """Collects the scores of the evaluations that run while the context lasts.

    Yields:
        `bbox` and `segm` to what :func:`coco_scores` returns, of the last evaluation of each.
    """
    found: dict[str, dict[str, Any]] = {}

    def recording(base: Any) -> type:
        def summarize(self: Any) -> None:
            base.summarize(self)
            # proposals are evaluated without classes
            if self.params.useCats:
                found[self.params.iouType] = coco_scores(self)

        return type(base.__name__, (base,), {'summarize': summarize})

    with ExitStack() as stack:
        for module, name in EVALUATORS:
            base = getattr(module, name)
            # the faster one is missing where its package is
            if base is not None:
                setattr(module, name, recording(base))
                stack.callback(setattr, module, name, base)
        yield found
