# Mask R-CNN with VSSD-T over 36 epochs of COCO: 48.8 box AP and 43.6 mask AP, as the authors state.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance_ms3x.py',
          '../_base_/schedules/mask_rcnn_3x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vssd_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vssd_tiny.in1k')),
    neck=dict(in_channels=[64, 128, 256, 512]))
