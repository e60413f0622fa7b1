# Mask R-CNN with the first VMamba-B over 12 epochs of COCO: 48.6 box AP and 43.3 mask AP, as the authors state.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance.py',
          '../_base_/schedules/mask_rcnn_1x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vmamba_base_v0',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vmamba_base_v0.in1k')),
    neck=dict(in_channels=[128, 256, 512, 1024]))
