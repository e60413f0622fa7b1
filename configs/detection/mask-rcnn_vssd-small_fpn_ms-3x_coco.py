# Mask R-CNN with VSSD-S over 36 epochs of COCO: 50.0 box AP and 44.6 mask AP, as the authors state. The authors publish
# the result without a config; this is the 3x recipe of the smaller models.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance_ms3x.py',
          '../_base_/schedules/mask_rcnn_3x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vssd_small',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vssd_small.in1k')),
    neck=dict(in_channels=[64, 128, 256, 512]))
