# The authors' recipe: AdamW without weight decay, 5 epochs of warm-up, half a cosine to 1e-6, EMA, clipped gradients.
# Their default is 128 images a step on all devices together; they do not state batch and length of the paper's runs.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.0),
    clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=5, end=1000, eta_min=1e-6, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=1000, val_interval=10)
custom_hooks = [
    dict(type='EMAHook', decay=0.9999),
    dict(type='SampleGridHook', interval=10000, sampler='ddpm', steps=50),
]
auto_scale_lr = dict(base_batch_size=128)
