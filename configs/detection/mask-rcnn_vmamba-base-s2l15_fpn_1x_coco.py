# Mask R-CNN with VMamba-B (s2l15) over 12 epochs of COCO: 49.2 box AP and 44.1 mask AP, as the authors state. Another
# official run with half the batch size has 49.2 and 43.9.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance.py',
          '../_base_/schedules/mask_rcnn_1x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vmamba_base_s2l15',
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vmamba_base_s2l15.in1k')),
    neck=dict(in_channels=[128, 256, 512, 1024]))
