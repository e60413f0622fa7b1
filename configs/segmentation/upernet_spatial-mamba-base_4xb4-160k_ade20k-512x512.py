# UperNet with Spatial-Mamba-B on ADE20K: 51.8 mIoU, 52.6 over scales (--tta), as the authors state. Its weights are
# fetched by hand (docs/models/spatial_mamba.md): --cfg-options model.backbone.init_cfg.checkpoint=FILE.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k_512_ms3.py',
          '../_base_/schedules/upernet_160k.py', '../_base_/segmentation_runtime.py']

model = dict(
    backbone=dict(
        name='spatial_mamba_base',
        drop_path_rate=0.5,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://spatial_mamba_base')),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
