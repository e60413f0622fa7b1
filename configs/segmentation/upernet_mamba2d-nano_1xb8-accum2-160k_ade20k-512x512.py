# UperNet with Mamba2D-N on ADE20K: 43.1 mIoU, 43.1 over scales (--tta), as the authors state. One GPU, 2 batches of 8
# images a step; the schedule counts batches. Weight decay falls on matrices and convolutions alone.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k_512.py',
          '../_base_/schedules/upernet_160k.py', '../_base_/segmentation_runtime.py']

model = dict(
    backbone=dict(
        name='mamba2d_nano',
        drop_path_rate=0.175,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://mamba2d_nano.in1k')),
    decode_head=dict(in_channels=[32, 64, 160, 256]),
    auxiliary_head=dict(in_channels=160))
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=None,
    clip_grad=dict(max_norm=1.0),
    accumulative_counts=2)
auto_scale_lr = dict(base_batch_size=8)
