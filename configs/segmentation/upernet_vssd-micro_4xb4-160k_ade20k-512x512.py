# UperNet with VSSD-Micro on ADE20K: 45.6 mIoU, 46.0 over scales (--tta), as the authors state. The authors publish the
# result without a config; this is the recipe of the larger models with the drop path of their detector.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k_512_ms3.py',
          '../_base_/schedules/upernet_160k.py', '../_base_/segmentation_runtime.py']

model = dict(
    backbone=dict(
        name='vssd_micro',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vssd_micro.in1k')),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192))
