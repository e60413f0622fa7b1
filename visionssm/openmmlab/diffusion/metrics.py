"""The loss on images that training has not seen, whole and by time step."""
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric

from ...registry import METRICS

__all__ = ['DiffusionLoss']


@METRICS.register_module()
class DiffusionLoss(BaseMetric):
    """Mean losses over the images, `val_loss`, `mse` and `vlb`, and `mse` in equal sections of the time steps.

    Images count once by index. Time step and noise of an image are fixed, so that evaluations of one data set compare.

    Args:
        bins: Number of sections.
        steps: Steps of the process.
        collect_device: 'cpu' or 'gpu', see mmengine.
        prefix: Prefix of the names.
    """

    def __init__(
            self,
            bins: int = 4,
            steps: int = 1000,
            collect_device: str = 'cpu',
            prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if not 1 <= bins <= steps:
            raise ValueError(f'bins is {bins}; give 1 to the number of steps, {steps}')
        self.bins, self.steps = bins, steps

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Record the losses of one batch.

        Args:
            data_batch: Not used.
            data_samples: What the model predicts, a dictionary an image.
        """
        self.results.extend(dict(sample) for sample in data_samples)

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Average over all processes.

        Args:
            results: What `process` recorded.

        Returns:
            The means; a section without images is left out.
        """
        rows = list({row['index']: row for row in results}.values())
        found = {'val_loss' if name == 'loss' else name: float(np.mean([row[name] for row in rows]))
                 for name in ('loss', 'mse', 'vlb') if rows and name in rows[0]}
        edges = [round(self.steps * place / self.bins) for place in range(self.bins + 1)]
        for start, end in zip(edges, edges[1:], strict=False):
            inside = [row['mse'] for row in rows if start <= row['step'] < end]
            if inside:
                found[f'mse_t{start}-{end - 1}'] = float(np.mean(inside))
        return found
