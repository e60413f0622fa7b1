# The demo: a small Vim on 6,000 pictures of clothes that ship with the package, minutes on two cores.
_base_ = ['../_base_/datasets/fashion_mnist.py', '../_base_/default_runtime.py']

max_epochs = 13
warmup_epochs = 1

model = dict(
    type='ImageClassifier',
    # wide, without expansion, 25 overlapping patches: the most accuracy for the time on a CPU
    model=dict(name='vim_pico', img_size=28, in_chans=1, num_classes=10, patch_size=8, stride=5, embed_dim=128,
               expand=1),
    loss=dict(type='LabelSmoothingCrossEntropy', smoothing=0.1),
    data_preprocessor=dict(mean=[0.2860], std=[0.3530]))

# always the embedded subset, so that the demo gives the same numbers everywhere
train_dataloader = dict(
    batch_size=50,
    # no mirror: all shoes of the data set point to the left
    dataset=dict(source='embedded', transform=dict(shift=1, flip=0.0)))
val_dataloader = dict(dataset=dict(source='embedded'))
test_dataloader = val_dataloader

optim_wrapper = dict(
    constructor='LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, end=warmup_epochs, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=warmup_epochs, end=max_epochs, eta_min=1e-5,
         convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=1, max_keep_ckpts=1))
custom_hooks = [dict(type='VisualReportHook')]
