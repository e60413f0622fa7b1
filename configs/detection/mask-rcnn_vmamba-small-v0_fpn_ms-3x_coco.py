# Mask R-CNN with the first VMamba-S over 36 epochs of COCO: 49.7 box AP and 44.0 mask AP, as the authors state.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance_ms3x.py',
          '../_base_/schedules/mask_rcnn_3x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vmamba_small_v0',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vmamba_small_v0.in1k')),
    neck=dict(in_channels=[96, 192, 384, 768]))
