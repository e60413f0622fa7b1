# Mask R-CNN with VMamba-S (s2l15) over 12 epochs of COCO: 48.7 box AP and 43.7 mask AP, as the authors state.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance.py',
          '../_base_/schedules/mask_rcnn_1x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vmamba_small_s2l15',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vmamba_small_s2l15.in1k')),
    neck=dict(in_channels=[96, 192, 384, 768]))
