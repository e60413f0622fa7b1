# Swin's schedule, which VMamba, VSSD and Spatial-Mamba use: 20 epochs of warm-up, a cosine over the other 280, both
# moving every step. The authors state rates for 512 images; here they are for 8 GPUs x 128 images = 1024:
#   highest 5e-4 * 1024 / 512 = 1e-3, start of the warm-up 5e-7 * 1024 / 512 = 1e-6, lowest 5e-6 * 1024 / 512 = 1e-5.
# They trained in float16 with loss scaling (--amp fp16).
max_epochs = 300
warmup_epochs = 20

optim_wrapper = dict(
    constructor='LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8),
    clip_grad=dict(max_norm=5.0))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=warmup_epochs, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=warmup_epochs, end=max_epochs, eta_min=1e-5,
         convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=1024)
# the average covers the statistics of batch normalisation, as timm's ModelEma does
custom_hooks = [dict(type='EMAHook', decay=0.9999, update_buffers=True), dict(type='VisualReportHook')]
