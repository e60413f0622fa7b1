# Swin's schedule of Mask R-CNN over 12 epochs, which all families use: 8 GPUs x 2 images a step.
# Everything has weight decay whose name, as the authors wrote it, has no 'norm' in it: biases and the state too.
max_epochs = 12

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='visionssm.LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05, betas=(0.9, 0.999)),
    paramwise_cfg=dict(official_names=True, force_decay=['*'], custom_keys={'*norm*': dict(decay_mult=0.0)}))

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[8, 11], gamma=0.1),
]

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(enable=False, base_batch_size=16)
