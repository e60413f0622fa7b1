"""The scores of binary masks in an evaluation, exact over several processes."""
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from ...registry import METRICS
from ...segmentation.losses import BceDiceLoss
from ...segmentation.metrics import binary_confusion, binary_scores
from ...segmentation.preprocessing import resize_map
from ...utils.suggest import check_choice

__all__ = ['BinarySegMetric']

logger = logging.getLogger('visionssm')


@METRICS.register_module()
class BinarySegMetric(BaseMetric):
    """Pooled scores of a foreground: `mIoU`, `DSC`, `accuracy`, `sensitivity`, `specificity` in per cent; `BceDice`.

    All pixels of all images count in one confusion matrix, and `mIoU` is the IoU of the foreground alone, as the papers
    on skin lesions have it. `BceDice` is the mean over the images of cross-entropy plus Dice, by which the official
    training selects its weights.

    Args:
        at: 'network' compares at the size that the network sees, with masks resized to it, which is the official way;
            'image' at the size of the files.
        threshold: Probabilities from here on are foreground; at 'image' the model has decided.
        collect_device: 'cpu' or 'gpu', see mmengine.
        prefix: Prefix of the names.
    """

    def __init__(
            self,
            at: str = 'network',
            threshold: float = 0.5,
            collect_device: str = 'cpu',
            prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        check_choice('at', at, ('network', 'image'))
        if not 0 < threshold < 1:
            raise ValueError(f'threshold={threshold}: give a probability between 0 and 1')
        self.at = at
        self.threshold = threshold
        self.loss = BceDiceLoss()

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Record the counts of one batch.

        Args:
            data_batch: Not used.
            data_samples: What the segmentor predicts, as dictionaries: `pred_sem_seg`, with `net_probs` (1, h, w) in it
                for 'network', and `gt_sem_seg`.
        """
        for sample in data_samples:
            if 'gt_sem_seg' not in sample:
                raise ValueError(f'{sample.get("img_path", "a sample")} has no mask to compare with; give the data set '
                                 'seg_map_path, and its pipeline LoadBinaryMask')
            prediction = sample['pred_sem_seg']
            if self.at == 'image' or 'net_probs' not in prediction:
                if self.at == 'network' and not self.results:
                    logger.warning('the predictions are an average over views, which has the size of the images, so '
                                   "they are compared at='image'")
                truth = sample['gt_sem_seg']['data'].to(prediction['data'].device)
                self.results.append((binary_confusion(prediction['data'], truth).flatten().tolist(), None))
                continue
            probs = prediction['net_probs'].float()
            truth = sample.get('gt_soft_seg', sample['gt_sem_seg'])['data'].to(probs)
            truth = resize_map(truth, probs.shape[-2:])
            counts = binary_confusion(probs, truth, self.threshold).flatten().tolist()
            self.results.append((counts, self.loss(probs[None], truth[None]).item()))

    def compute_metrics(self, results: list[tuple[list[int], float | None]]) -> dict[str, float]:
        """Pool the counts of all processes.

        Args:
            results: What `process` recorded.

        Returns:
            Name to value.
        """
        if not results:
            raise ValueError('no predictions to evaluate: the test set is empty')
        confusion = torch.tensor([counts for counts, _ in results]).sum(0).unflatten(0, (2, 2))
        scores = binary_scores(confusion)
        undefined = [name for name, value in scores.items() if math.isnan(value)]
        if undefined:
            logger.warning('%s: nothing to divide by, because no mask has %s; counted as 0', ', '.join(undefined),
                           'background' if undefined == ['specificity'] else 'foreground')
        values = {name: 0. if name in undefined else 100 * value for name, value in scores.items()}
        losses = [loss for _, loss in results if loss is not None]
        return {**values, 'BceDice': sum(losses) / len(losses)} if losses else values
