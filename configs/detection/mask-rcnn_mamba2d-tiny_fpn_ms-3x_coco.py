# Mask R-CNN with Mamba2D-T over 36 epochs of COCO: 50.5 box AP and 44.7 mask AP, as the authors state. One GPU, 8
# batches of 2 images a step; the warm-up and an epoch count batches. Weight decay falls on matrices and convolutions
# alone.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance_ms3x.py',
          '../_base_/schedules/mask_rcnn_3x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='mamba2d_tiny',
        drop_path_rate=0.175,
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://mamba2d_tiny.in1k')),
    neck=dict(in_channels=[64, 128, 320, 512], norm_cfg=dict(type='GN', num_groups=32)))
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(
    paramwise_cfg=None,
    clip_grad=dict(max_norm=1.0),
    accumulative_counts=8)
auto_scale_lr = dict(base_batch_size=2)
