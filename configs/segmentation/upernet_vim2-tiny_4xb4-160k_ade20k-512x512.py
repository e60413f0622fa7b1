# UperNet with ViM2-T on ADE20K: 48.6 mIoU, 49.9 over scales (--tta), as the authors state. The authors released neither
# code nor weights: give weights of your own ImageNet training by --cfg-options model.backbone.init_cfg.type=Pretrained
# model.backbone.init_cfg.checkpoint=FILE. That there are 160,000 steps, and the drop path, are VMamba's; the paper does
# not say.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k_512.py',
          '../_base_/schedules/upernet_160k.py', '../_base_/segmentation_runtime.py']

model = dict(
    backbone=dict(
        name='vim2_tiny',
        drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
