# Mask R-CNN with a feature pyramid, as MMDetection has it; a config adds the name of the backbone and the channels of
# its maps (model.neck.in_channels).
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

extractor = dict(type='visionssm.SingleRoIExtractor')  # keeps the regions' coordinates under --amp
model = dict(
    backbone=dict(_delete_=True, type='visionssm.Backbone', out_indices=(0, 1, 2, 3)),
    roi_head=dict(bbox_roi_extractor=extractor, mask_roi_extractor=extractor))
