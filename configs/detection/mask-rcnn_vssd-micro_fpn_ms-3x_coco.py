# Mask R-CNN with VSSD-Micro over 36 epochs of COCO: 47.7 box AP and 42.8 mask AP, as the authors state.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance_ms3x.py',
          '../_base_/schedules/mask_rcnn_3x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vssd_micro',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vssd_micro.in1k')),
    neck=dict(in_channels=[48, 96, 192, 384]))
