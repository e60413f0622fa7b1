"""Features of regions whose coordinates keep their precision under mixed precision."""
import torch
from mmdet.models.roi_heads import roi_extractors

from ...registry import MODELS

__all__ = ['SingleRoIExtractor']


@MODELS.register_module()
class SingleRoIExtractor(roi_extractors.SingleRoIExtractor):
    """MMDetection's extractor, in float32.

    MMDetection's own casts the regions to the type of the feature maps. Under autocast that is bfloat16, which has 8
    significant bits: the coordinate 1000 moves by up to 2 pixels, which is half a pixel of the finest map.

    Args:
        As MMDetection's ``SingleRoIExtractor``.
    """

    def forward(self, feats: tuple[torch.Tensor, ...], rois: torch.Tensor,
                roi_scale_factor: float | None = None) -> torch.Tensor:
        """Sample the regions' features.

        Args:
            feats: Feature maps, each (B, C, H, W), finest first.
            rois: Regions (K, 5): image, x1, y1, x2, y2.
            roi_scale_factor: Factor that widens the regions.

        Returns:
            Features (K, C, height, width) in float32.
        """
        wide = tuple(features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
                     for features in feats)
        return super().forward(wide, rois.to(wide[0].dtype), roi_scale_factor)
