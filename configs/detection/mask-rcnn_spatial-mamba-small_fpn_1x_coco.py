# Mask R-CNN with Spatial-Mamba-S over 12 epochs of COCO: 49.2 box AP and 44.0 mask AP, as the authors state. Its
# weights are fetched by hand (docs/models/spatial_mamba.md): --cfg-options model.backbone.init_cfg.checkpoint=FILE.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance.py',
          '../_base_/schedules/mask_rcnn_1x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='spatial_mamba_small',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://spatial_mamba_small')),
    neck=dict(in_channels=[64, 128, 256, 512]))
