"""PSNR and SSIM of restored pictures, a row for each data set."""
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from ...registry import METRICS
from ...restoration.metrics import psnr, ssim, ssim_volume, to_uint8

__all__ = ['RestorationMetric']


@METRICS.register_module()
class RestorationMetric(BaseMetric):
    """Mean PSNR (dB) and SSIM over the pictures of each data set, `PSNR_NAME` and `SSIM_NAME`.

    `PSNR` and `SSIM` are the means over the data sets. Pictures are compared as bytes, as the papers do, and count once
    by index. After an evaluation `rows` (on the main process) holds `dict(class, images, PSNR, SSIM)`, a row a data
    set.

    Args:
        border: Pixels left out on every side: the scale in super-resolution, 0 elsewhere.
        y_channel: Compare luma alone: super-resolution and JPEG.
        volume: As SIDD's benchmark: values that are not rounded, and an SSIM over all three colours at once.
        collect_device: 'cpu' or 'gpu', see mmengine.
        prefix: Prefix of the names.
    """

    def __init__(
            self,
            border: int = 0,
            y_channel: bool = False,
            volume: bool = False,
            collect_device: str = 'cpu',
            prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if volume and (border or y_channel):
            raise ValueError(f'volume=True goes without border ({border}) and y_channel ({y_channel})')
        self.border, self.y_channel, self.volume = border, y_channel, volume
        self.rows: list[dict[str, Any]] = []

    def _compare(self, restored: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
        if self.volume:
            return float(psnr(restored, target, peak=1.)), float(ssim_volume(restored, target))
        pair = to_uint8(restored), to_uint8(target)
        return (float(psnr(*pair, border=self.border, y_channel=self.y_channel)),
                float(ssim(*pair, border=self.border, y_channel=self.y_channel)))

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Record the scores of one batch.

        Args:
            data_batch: Not used.
            data_samples: What the model predicts, a dictionary a picture.
        """
        for sample in data_samples:
            if sample['target'] is None:
                raise ValueError(f'{sample["path"]} has no true picture to compare with')
            try:
                scores = self._compare(sample['restored'], sample['target'])
            except ValueError as error:
                raise ValueError(f'{sample["path"]}: {error}') from error
            self.results.append((sample['index'], sample['name'], *scores))

    def compute_metrics(self, results: list[tuple[int, str, float, float]]) -> dict[str, float]:
        """Average over the pictures of all processes.

        Args:
            results: What `process` recorded.

        Returns:
            Name to value.
        """
        if not results:
            raise ValueError('no predictions to evaluate: the test set is empty')
        pictures = {index: (name, *scores) for index, name, *scores in results}
        self.rows = []
        for name in dict.fromkeys(pictures[index][0] for index in sorted(pictures)):
            scores = torch.tensor([rest for other, *rest in pictures.values() if other == name], dtype=torch.float64)
            first, second = scores.mean(0).tolist()
            self.rows.append({'class': name or 'all', 'images': len(scores), 'PSNR': first, 'SSIM': second})
        values = {f'{key}_{row["class"]}': row[key] for row in self.rows for key in ('PSNR', 'SSIM')}
        return {**values, **{key: sum(row[key] for row in self.rows) / len(self.rows) for key in ('PSNR', 'SSIM')}}
