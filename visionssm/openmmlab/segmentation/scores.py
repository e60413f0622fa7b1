"""The scores of each class as MMSegmentation's metric computed them, which returns only their means."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from mmseg.evaluation import IoUMetric

__all__ = ['record_iou']


@contextmanager
def record_iou() -> Iterator[dict[str, Any]]:
    """Collects the scores of the evaluations that run while the context lasts.

    Yields:
        `iou`: a list of `dict(class, IoU, Acc, ...)` in per cent, None where a class does not occur, of the last
            evaluation by `IoUMetric`; empty where there was none.
    """
    found: dict[str, Any] = {}
    base = IoUMetric.compute_metrics

    def compute_metrics(self: IoUMetric, results: list) -> dict[str, float]:
        compute = type(self).total_area_to_metrics

        def recording(*args: Any) -> dict[str, np.ndarray]:
            scores = compute(*args)
            columns = {key: value for key, value in scores.items() if key != 'aAcc'}
            found['iou'] = [
                {'class': name, **{key: _per_cent(value[place]) for key, value in columns.items()}}
                for place, name in enumerate(self.dataset_meta['classes'])]
            return scores

        self.total_area_to_metrics = recording
        try:
            return base(self, results)
        finally:
            del self.total_area_to_metrics

    IoUMetric.compute_metrics = compute_metrics
    try:
        yield found
    finally:
        IoUMetric.compute_metrics = base


def _per_cent(value: float) -> float | None:
    return None if np.isnan(value) else 100 * float(value)
