# The official schedule of Mamba-YOLO: SGD from scratch, 8 GPUs x 64 images.
# Weight decay 5e-4 is for 64 images a step and grows with their number: 4e-3 for 512. The learning rate does not.
# Deviations: no early stopping (patience 100), and as many accumulated batches in the warm-up as later. For fewer
# images a step set optim_wrapper.accumulative_counts, and the interval of the average to the same number.
max_epochs = 300

optim_wrapper = dict(
    type='visionssm.OptimWrapper',
    constructor='visionssm.YOLOOptimConstructor',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.937, nesterov=True, weight_decay=5e-4),
    # images of one process, as the loader's batch_size
    paramwise_cfg=dict(batch_size=64, nominal_batch_size=64),
    clip_grad=dict(max_norm=10.0))
# once an epoch: 0.01 * (1 - epoch / 300) + 0.0001 * epoch / 300
param_scheduler = [
    dict(type='LinearLR', start_factor=1.0, end_factor=0.01, by_epoch=True, begin=0, end=max_epochs + 1)]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
custom_hooks = [
    dict(type='visionssm.YOLOWarmupHook', epochs=3, bias_lr=0.1, momentum=0.8),
    dict(type='visionssm.CloseMosaicHook', epochs=10),
    # keeps 0.9999 * (1 - exp(-steps / 2000)) of the average, over parameters and statistics
    dict(type='visionssm.EMAHook', ema_type='mmdet.ExpMomentumEMA', momentum=0.0001, gamma=2000, update_buffers=True),
]
