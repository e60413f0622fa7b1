# Mamba2D's schedule: warm-up over the first 5 % of the steps from 1e-4 of the highest rate, then a cosine to 1e-6.
# 8 GPUs x 64 images x 8 accumulated batches = 4096 images a step (the authors: 64 x 64 on one GPU), no clipping.
# An epoch has 2,502 batches, which is no multiple of 8: a resume at its end starts without the gradients of the last 6.
max_epochs = 300
warmup_epochs = 15
accumulation = 8

optim_wrapper = dict(
    constructor='LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=4e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8),
    accumulative_counts=accumulation)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, end=warmup_epochs, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=warmup_epochs, end=max_epochs, eta_min=1e-6,
         convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=512)
# averaged once an update, not once a batch
custom_hooks = [dict(type='EMAHook', decay=0.999, interval=accumulation), dict(type='VisualReportHook')]
