# Cascade Mask R-CNN with Vim-Ti and narrow heads: 192 channels and 768 features. The authors have a config for it and
# state no result.
_base_ = 'cascade-mask-rcnn_vim-tiny_lsj-100e_coco.py'

channels = 192
model = dict(
    backbone=dict(pyramid=dict(out_channels=channels)),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=[dict(head, in_channels=channels, conv_out_channels=channels, fc_out_channels=768)
                   for head in _base_.model.roi_head.bbox_head],
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(in_channels=channels, conv_out_channels=channels)))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.7))
