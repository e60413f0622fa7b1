# Mask R-CNN with Spatial-Mamba-B over 12 epochs of COCO: 50.4 box AP and 45.1 mask AP, as the authors state. Its
# weights are fetched by hand (docs/models/spatial_mamba.md): --cfg-options model.backbone.init_cfg.checkpoint=FILE.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance.py',
          '../_base_/schedules/mask_rcnn_1x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='spatial_mamba_base',
        drop_path_rate=0.5,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://spatial_mamba_base')),
    neck=dict(in_channels=[96, 192, 384, 768]))
