# Swin's schedule of UperNet, which all families but Vim use: 160,000 steps of 16 images.
# Everything has weight decay whose name, as the authors wrote it, has no 'norm' in it: biases and the state too.
max_iters = 160000

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='visionssm.LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=6e-5, weight_decay=0.01, betas=(0.9, 0.999)),
    paramwise_cfg=dict(official_names=True, force_decay=['*'], custom_keys={'*norm*': dict(decay_mult=0.0)}))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=max_iters, by_epoch=False),
]

train_cfg = dict(by_epoch=False, max_iters=max_iters, val_interval=16000)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(enable=False, base_batch_size=16)
