"""The box and mask heads of ViTDet's Cascade Mask R-CNN, which the official detectors with Vim use."""
import torch
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.task_modules import SamplingResult
from mmdet.structures.bbox import bbox2roi
from mmdet.utils import InstanceList
from timm.layers import LayerNorm2d

from ...registry import MODELS

__all__ = ['SharedMaskCascadeRoIHead']

# normalisation over the channels of each pixel, for norm_cfg=dict(type='visionssm.LayerNorm2d', eps=1e-6)
MODELS.register_module('LayerNorm2d', module=LayerNorm2d)


@MODELS.register_module()
class SharedMaskCascadeRoIHead(CascadeRoIHead, StandardRoIHead):
    """Cascade heads with one mask head instead of one a stage, as Detectron2 has them.

    The mask head learns from the boxes of the first stage and predicts in those of the last one. Stages have the whole
    gradient of their loss, and the feature maps the mean of all stages instead of their sum.

    Args:
        As MMDetection's ``CascadeRoIHead``; ``mask_head`` and ``mask_roi_extractor`` are one configuration.
    """

    init_mask_head = StandardRoIHead.init_mask_head
    _mask_forward = StandardRoIHead._mask_forward
    predict_mask = StandardRoIHead.predict_mask

    def _bbox_forward(self, stage: int, x: tuple[torch.Tensor, ...], rois: torch.Tensor) -> dict:
        extractor = self.bbox_roi_extractor[stage]
        features = extractor(x[:extractor.num_inputs], rois)
        if features.requires_grad:
            features.register_hook(lambda grad: grad / self.num_stages)
        scores, deltas = self.bbox_head[stage](features)
        return {'cls_score': scores, 'bbox_pred': deltas, 'bbox_feats': features}

    def mask_loss(self, stage: int, x: tuple[torch.Tensor, ...], sampling_results: list[SamplingResult],
                  batch_gt_instances: InstanceList) -> dict:
        """Compute the loss of the mask head, which only the first stage has.

        Args:
            stage: Number of the stage.
            x: Feature maps, each (B, C, H, W).
            sampling_results: Boxes to learn from, one result an image.
            batch_gt_instances: Annotated objects of each image.

        Returns:
            ``loss_mask``: the losses by name.
        """
        if stage:
            return {'loss_mask': {}}
        preds = self._mask_forward(x, bbox2roi([result.pos_priors for result in sampling_results]))['mask_preds']
        return self.mask_head.loss_and_target(preds, sampling_results, batch_gt_instances, self.train_cfg[stage])
