# Mask R-CNN with Spatial-Mamba-S over 36 epochs of COCO: 50.5 box AP and 44.6 mask AP, as the authors state. Its
# weights are fetched by hand (docs/models/spatial_mamba.md): --cfg-options model.backbone.init_cfg.checkpoint=FILE.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance_ms3x.py',
          '../_base_/schedules/mask_rcnn_3x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='spatial_mamba_small',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://spatial_mamba_small')),
    neck=dict(in_channels=[64, 128, 256, 512]))
