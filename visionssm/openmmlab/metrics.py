"""Classification accuracy: top-k, per class, and the confusion matrix, exact in distributed evaluation."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric

from ..registry import METRICS

__all__ = ['Accuracy', 'rank_of_label', 'summarise']


def rank_of_label(scores: torch.Tensor, label: int) -> int:
    """Place of the true class when all classes are sorted by score, best first; a top-k hit is `rank < k`.

    Args:
        scores: Scores (num_classes,).
        label: True class.

    Returns:
        0 for the best class. Equal scores rank by class number, as a stable sort puts them; with a score that is not
        finite nothing is a hit and the rank is `num_classes`.
    """
    if not torch.isfinite(scores).all():
        return len(scores)
    own = scores[label]
    return int((scores > own).sum() + (scores[:label] == own).sum())


def summarise(
        records: Sequence[tuple[int, int, int, int]],
        topk: Sequence[int],
        classes: Sequence[str],
) -> dict[str, Any]:
    """Turns per-image records into accuracies.

    Args:
        records: (index, label, predicted class, rank of the label) of every image, each index once.
        topk: The k of the top-k accuracies.
        classes: Class names in label order.

    Returns:
        `count`, `top1` ... in per cent, `classes`: per class name, count and accuracies (None for a class without
        images), and `confusion`: counts by true class (row) and predicted class (column).
    """
    if not records:
        raise ValueError('no predictions to evaluate: the test set is empty')
    _, labels, predicted, ranks = np.asarray(records, dtype=np.int64).T
    number = max(len(classes), int(labels.max()) + 1, int(predicted.max()) + 1)
    names = [*classes, *map(str, range(len(classes), number))]
    confusion = np.bincount(labels * number + predicted, minlength=number * number).reshape(number, number)
    counts = confusion.sum(axis=1)
    hits = {k: np.bincount(labels[ranks < k], minlength=number) for k in topk}
    table = [{'class': name, 'count': int(counts[i]),
              **{f'top{k}': round(100 * float(hits[k][i] / counts[i]), 4) if counts[i] else None for k in topk}}
             for i, name in enumerate(names)]
    return {'count': len(labels), **{f'top{k}': round(100 * float(hits[k].sum() / len(labels)), 4) for k in topk},
            'classes': table, 'confusion': confusion.tolist()}


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Top-k accuracy in per cent, under `accuracy/top1`, `accuracy/top5` and so on.

    Takes what the classifier's `predict` returns: `dict(index, label, scores, path)` an image. Images are counted
    once by index, so the samples that even out processes or stand in for unreadable ones do not count. After an
    evaluation `summary` (on the main process) holds what `summarise` returns.

    Args:
        topk: The k of the accuracies; those above the number of classes are left out.
        collect_device: 'cpu' or 'gpu', see mmengine.
        prefix: Prefix of the names.
    """

    default_prefix = 'accuracy'

    def __init__(
            self,
            topk: Sequence[int] | int = (1, 5),
            collect_device: str = 'cpu',
            prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.topk = (topk,) if isinstance(topk, int) else tuple(topk)
        if not self.topk or min(self.topk) < 1:
            raise ValueError(f'topk={topk}: give one or more whole numbers from 1 up, for example (1, 5)')
        self.summary: dict[str, Any] = {}

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Records the predictions of one batch.

        Args:
            data_batch: Not used.
            data_samples: `dict(index=int, label=int, scores=Tensor (num_classes,), path=str)` an image.
        """
        for sample in data_samples:
            scores, label = sample['scores'], sample['label']
            if label is None or not 0 <= label < len(scores):
                raise ValueError(f'label {label} of {sample["path"]} is no class of the model, which has '
                                 f'{len(scores)}: set model.model.num_classes to the number of classes of the data')
            self.results.append((sample['index'], label, int(scores.argmax()), rank_of_label(scores, label),
                                 len(scores)))

    def compute_metrics(self, results: list[tuple[int, int, int, int, int]]) -> dict[str, float]:
        """Accuracies over all processes.

        Args:
            results: What `process` recorded, from all processes.

        Returns:
            `top1` and so on, in per cent.
        """
        num_classes = results[0][-1] if results else 0
        topk = [k for k in self.topk if k <= num_classes] or [1]
        records = {record[0]: record[:4] for record in results}
        classes = (self.dataset_meta or {}).get('classes') or ()
        self.summary = summarise([records[index] for index in sorted(records)], topk, classes)
        return {f'top{k}': self.summary[f'top{k}'] for k in topk}
