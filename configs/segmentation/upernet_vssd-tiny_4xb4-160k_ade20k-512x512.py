# UperNet with VSSD-T on ADE20K: 47.9 mIoU, 48.7 over scales (--tta), as the authors state.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k_512_ms3.py',
          '../_base_/schedules/upernet_160k.py', '../_base_/segmentation_runtime.py']

model = dict(
    backbone=dict(
        name='vssd_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vssd_tiny.in1k')),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))
