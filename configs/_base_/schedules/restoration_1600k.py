# As restoration_500k.py for denoising and JPEG, with 16 pictures a step.
_base_ = ['restoration_500k.py']

param_scheduler = [
    dict(type='MultiStepLR', milestones=[800000, 1200000, 1400000, 1500000], gamma=0.5, by_epoch=False),
]
train_cfg = dict(max_iters=1600000)
auto_scale_lr = dict(base_batch_size=16)
