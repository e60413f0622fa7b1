# UperNet small enough to learn on two cores: garments of Fashion-MNIST pasted onto photographs, 160 x 160 pixels
# (python tools/make_composed_data.py makes them). An eighth of the usual channels, and ten classes on a background.
_base_ = ['models/upernet.py', 'datasets/composed_ade.py', 'segmentation_runtime.py']

max_iters = 3000
num_classes = 11
norm_cfg = dict(type='BN', requires_grad=True)
# most pixels are photograph: with equal weights a small network learns to call all of them that, and stays there
loss = dict(class_weight=[0.3] + [1.0] * (num_classes - 1))

model = dict(
    data_preprocessor=dict(size=(160, 160)),
    decode_head=dict(
        in_channels=[16, 32, 64, 128], channels=48, num_classes=num_classes, norm_cfg=norm_cfg, loss_decode=loss),
    auxiliary_head=dict(
        in_channels=64, channels=32, num_classes=num_classes, norm_cfg=norm_cfg, loss_decode=loss))

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='visionssm.LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, end=max_iters, eta_min=1e-5),
]
train_cfg = dict(by_epoch=False, max_iters=max_iters, val_interval=500)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=500, max_keep_ckpts=1))
log_processor = dict(window_size=10)
