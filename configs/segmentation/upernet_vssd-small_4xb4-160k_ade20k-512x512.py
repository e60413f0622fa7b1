# UperNet with VSSD-S on ADE20K. The authors have a config for it and state no result.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k_512_ms3.py',
          '../_base_/schedules/upernet_160k.py', '../_base_/segmentation_runtime.py']

model = dict(
    backbone=dict(
        name='vssd_small',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vssd_small.in1k')),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))
