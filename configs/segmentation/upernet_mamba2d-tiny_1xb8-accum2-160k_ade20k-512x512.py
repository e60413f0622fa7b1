# UperNet with Mamba2D-T on ADE20K: 48.9 mIoU, 49.3 over scales (--tta), as the authors state. One GPU, 2 batches of 8
# images a step; the schedule counts batches. Weight decay falls on matrices and convolutions alone.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k_512.py',
          '../_base_/schedules/upernet_160k.py', '../_base_/segmentation_runtime.py']

model = dict(
    backbone=dict(
        name='mamba2d_tiny',
        drop_path_rate=0.175,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://mamba2d_tiny.in1k')),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320))
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=None,
    clip_grad=dict(max_norm=1.0),
    accumulative_counts=2)
auto_scale_lr = dict(base_batch_size=8)
