# Mask R-CNN with Spatial-Mamba-T over 36 epochs of COCO: 49.3 box AP and 43.6 mask AP, as the authors state. Its
# weights are fetched by hand (docs/models/spatial_mamba.md): --cfg-options model.backbone.init_cfg.checkpoint=FILE.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance_ms3x.py',
          '../_base_/schedules/mask_rcnn_3x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='spatial_mamba_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://spatial_mamba_tiny')),
    neck=dict(in_channels=[64, 128, 256, 512]))
