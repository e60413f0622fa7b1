# MHS-VM's schedule: AdamW with weight decay on all parameters, in float32, without warm-up or clipping. The rate
# follows a cosine of period 100, stepped once an epoch: down to 1e-5 at epochs 50, 150 and 250, and up again between.
_base_ = '../segmentation_runtime.py'

max_epochs = 300

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2))
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, T_max=50, eta_min=1e-5)]

# validation starts behind epoch 100; the best weights are those with the lowest validation loss
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_begin=101, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=1, max_keep_ckpts=2, save_best='BceDice', rule='less'))
log_processor = dict(window_size=20, by_epoch=True)
visualizer = dict(alpha=0.5)
auto_scale_lr = dict(base_batch_size=32)
randomness = dict(seed=42)
