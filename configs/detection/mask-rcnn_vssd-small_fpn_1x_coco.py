# Mask R-CNN with VSSD-S over 12 epochs of COCO: 48.4 box AP and 43.5 mask AP, as the authors state.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance.py',
          '../_base_/schedules/mask_rcnn_1x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vssd_small',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vssd_small.in1k')),
    neck=dict(in_channels=[64, 128, 256, 512]))
