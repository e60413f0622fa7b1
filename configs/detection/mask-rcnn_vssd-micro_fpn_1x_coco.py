# Mask R-CNN with VSSD-Micro over 12 epochs of COCO: 45.4 box AP and 41.3 mask AP, as the authors state.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance.py',
          '../_base_/schedules/mask_rcnn_1x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vssd_micro',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vssd_micro.in1k')),
    neck=dict(in_channels=[48, 96, 192, 384]))
