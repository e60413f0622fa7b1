# UperNet with Spatial-Mamba-S on ADE20K: 50.6 mIoU, 51.4 over scales (--tta), as the authors state. Its weights are
# fetched by hand (docs/models/spatial_mamba.md): --cfg-options model.backbone.init_cfg.checkpoint=FILE.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k_512_ms3.py',
          '../_base_/schedules/upernet_160k.py', '../_base_/segmentation_runtime.py']

model = dict(
    backbone=dict(
        name='spatial_mamba_small',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://spatial_mamba_small')),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))
