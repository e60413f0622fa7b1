# Mask R-CNN with VMamba-T (s1l8) over 36 epochs of COCO: 48.8 box AP and 43.7 mask AP, as the authors state.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance_ms3x.py',
          '../_base_/schedules/mask_rcnn_3x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vmamba_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vmamba_tiny.in1k')),
    neck=dict(in_channels=[96, 192, 384, 768]))
