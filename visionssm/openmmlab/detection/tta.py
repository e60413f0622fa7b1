"""Predictions with masks over several views of an image, which MMDetection merges for boxes only."""
import torch
from mmcv.ops import batched_nms
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample

from ...registry import MODELS

__all__ = ['InstanceTTAModel']

# axes of masks (N, H, W) that a view was mirrored along
AXES = {'horizontal': (2,), 'vertical': (1,), 'diagonal': (1, 2)}


@MODELS.register_module()
class InstanceTTAModel(DetTTAModel):
    """MMDetection's DetTTAModel for detectors with or without masks.

    The boxes of all views are suppressed together, and each one that stays keeps its own mask.

    Args:
        As MMDetection's ``DetTTAModel``.
    """

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        if 'masks' not in data_samples[0].pred_instances:
            return super()._merge_single_sample(data_samples)
        found = [sample.pred_instances for sample in data_samples]
        boxes, scores = self.merge_aug_bboxes([view.bboxes for view in found], [view.scores for view in found],
                                              [sample.metainfo for sample in data_samples])
        labels = torch.cat([view.labels for view in found])
        merged = data_samples[0]
        if not len(boxes):
            return merged
        masks = [torch.as_tensor(view.masks).flip(AXES[sample.flip_direction]) if sample.flip else
                 torch.as_tensor(view.masks) for view, sample in zip(found, data_samples)]
        kept_boxes, kept = batched_nms(boxes, scores, labels, self.tta_cfg.nms)
        kept, kept_boxes = kept[:self.tta_cfg.max_per_img], kept_boxes[:self.tta_cfg.max_per_img]
        merged.pred_instances = type(found[0])(
            bboxes=kept_boxes[:, :-1], scores=kept_boxes[:, -1], labels=labels[kept], masks=torch.cat(masks)[kept])
        return merged
