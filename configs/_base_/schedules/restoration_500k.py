# MambaIR's schedule from scratch: Adam without weight decay, whose rate is halved four times; float32, no warm-up and
# no clipping. The authors average no weights; custom_hooks = [dict(type='EMAHook', decay=0.999)] would.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='Adam', lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0))
param_scheduler = [
    dict(type='MultiStepLR', milestones=[250000, 400000, 450000, 475000], gamma=0.5, by_epoch=False),
]
train_cfg = dict(by_epoch=False, max_iters=500000, val_interval=5000)
auto_scale_lr = dict(base_batch_size=32)
