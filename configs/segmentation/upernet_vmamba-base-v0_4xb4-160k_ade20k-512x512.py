# UperNet with the first VMamba-B on ADE20K: 50.0 mIoU, 51.3 over scales (--tta), as the authors state.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k_512.py',
          '../_base_/schedules/upernet_160k.py', '../_base_/segmentation_runtime.py']

model = dict(
    backbone=dict(
        name='vmamba_base_v0',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vmamba_base_v0.in1k')),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
