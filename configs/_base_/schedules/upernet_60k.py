# Vim's schedule of UperNet: 60,000 steps of 32 images. A recipe adds the rate and the weight decay.
_base_ = '../segmentation_runtime.py'

max_iters = 60000

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='visionssm.LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', betas=(0.9, 0.999)))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=max_iters, by_epoch=False),
]

train_cfg = dict(by_epoch=False, max_iters=max_iters, val_interval=1000)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(enable=False, base_batch_size=32)
default_hooks = dict(checkpoint=dict(interval=1000))
