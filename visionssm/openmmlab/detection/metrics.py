"""COCO's average precision with labels by name, on the images that were predicted."""
import logging
from typing import Any

import numpy as np
from mmdet.evaluation import CocoMetric as _CocoMetric

from ...registry import METRICS

__all__ = ['CocoMetric']

logger = logging.getLogger('visionssm')


@METRICS.register_module()
class CocoMetric(_CocoMetric):
    """MMDetection's CocoMetric, which evaluates with pycocotools, without its silent assumptions.

    Label i is the class i of the data set by its name; MMDetection takes the i-th of the classes that the file has, in
    the file's order. Predictions of classes that the file lacks cannot be judged and are left out. Images that were
    not predicted (`indices`, `missing='skip'`) do not count as ones without a hit. If nothing at all was predicted the
    scores are 0, not missing. Objects without `area` have that of their box, and without `iscrowd` they are no crowd.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._coco_api is not None:
            for annotation in self._coco_api.dataset.get('annotations', []):
                if annotation.get('area') is None:
                    annotation['area'] = annotation['bbox'][2] * annotation['bbox'][3]
                annotation.setdefault('iscrowd', 0)

    def compute_metrics(self, results: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, float]:
        """Computes the scores of all predictions.

        Args:
            results: What `process` collected: ground truth and prediction of every image.

        Returns:
            Name -> score in 0..1.
        """
        if self._coco_api is not None:
            results = [(truth, self._by_file(prediction)) for truth, prediction in results]
            predicted = {prediction['img_id'] for _, prediction in results}
            self.img_ids = [image for image in self._coco_api.get_img_ids() if image in predicted]
            total = len(self._coco_api.imgs)
            if len(self.img_ids) < total:
                logger.warning('evaluated on the %d predicted images of the %d in the annotation file',
                               len(self.img_ids), total)
        scores = super().compute_metrics(results)
        if not self.format_only:
            for metric in self.metrics:
                if metric in ('bbox', 'segm'):
                    for item in self.metric_items or ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l'):
                        scores.setdefault(f'{metric}_{item}', 0.0)
        return scores

    def _by_file(self, prediction: dict[str, Any]) -> dict[str, Any]:
        """Numbers the labels of a prediction in the file's order, as the parent expects them."""
        in_file = [category['name'] for category in self._coco_api.cats.values()
                   if category['name'] in self.dataset_meta['classes']]
        numbers = np.array([in_file.index(cls) if cls in in_file else -1 for cls in self.dataset_meta['classes']])
        labels = numbers[prediction['labels']]
        kept = labels >= 0
        result = {**prediction, 'labels': labels[kept]}
        for key in ('bboxes', 'scores', 'mask_scores'):
            if key in prediction:
                result[key] = prediction[key][kept]
        if 'masks' in prediction:
            result['masks'] = [mask for mask, keep in zip(prediction['masks'], kept) if keep]
        return result
