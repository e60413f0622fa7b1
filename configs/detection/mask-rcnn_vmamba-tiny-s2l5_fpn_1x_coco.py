# Mask R-CNN with VMamba-T (s2l5) over 12 epochs of COCO: 47.4 box AP and 42.7 mask AP, as the authors state.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance.py',
          '../_base_/schedules/mask_rcnn_1x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vmamba_tiny_s2l5',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vmamba_tiny_s2l5.in1k')),
    neck=dict(in_channels=[96, 192, 384, 768]))
