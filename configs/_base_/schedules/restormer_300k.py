# Restormer's schedule, which MambaIR's U-Net took over: patches that grow, a constant rate for 92,000 steps and half a
# cosine after that, AdamW that decays every parameter, gradients clipped hard.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    clip_grad=dict(max_norm=0.01))
param_scheduler = [
    dict(type='CosineAnnealingLR', by_epoch=False, begin=92000, end=300000, T_max=208000, eta_min=1e-6),
]
train_cfg = dict(by_epoch=False, max_iters=300000, val_interval=4000)
custom_hooks = [
    dict(type='ProgressivePatchHook', sizes=(128, 160, 192, 256, 320, 384),
         iters=(92000, 64000, 48000, 36000, 36000, 24000)),
]
auto_scale_lr = dict(base_batch_size=8)
