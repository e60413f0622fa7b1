# ViTDet's schedule, which Vim's detectors use: 184,375 steps of 64 images, which are 100 epochs of COCO, in mixed
# precision (--amp). The rate falls tenfold after 88.9 % and 96.3 % of the steps. Everything has weight
# decay but the position embedding. A recipe adds the layer decay.
_base_ = '../detection_runtime.py'

max_iters = 184375

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='visionssm.LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.1, betas=(0.9, 0.999)),
    paramwise_cfg=dict(force_decay=['*'], custom_keys={'*pos_embed': dict(decay_mult=0.0)}))

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', begin=0, end=max_iters, by_epoch=False, milestones=[163889, 177546], gamma=0.1),
]

train_cfg = dict(by_epoch=False, max_iters=max_iters, val_interval=5000)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(enable=False, base_batch_size=64)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=5000))
log_processor = dict(by_epoch=False)
