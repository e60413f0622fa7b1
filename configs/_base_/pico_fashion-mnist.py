# The comparison of the families: ten epochs on the 6,000 pictures that ship with the package. Everything but the name
# of the model is the same for all, so no family is tuned; tools/compare_models.py trains them and writes the table.
_base_ = ['datasets/fashion_mnist.py', 'default_runtime.py']

max_epochs = 10
warmup_epochs = 1

model = dict(
    type='ImageClassifier',
    model=dict(in_chans=1, num_classes=10),
    loss=dict(type='LabelSmoothingCrossEntropy', smoothing=0.1),
    data_preprocessor=dict(mean=[0.2860], std=[0.3530]))

train_dataloader = dict(
    batch_size=50,
    # no mirror: all shoes of the data set point to the left
    dataset=dict(source='embedded', transform=dict(shift=1, flip=0.0)))
val_dataloader = dict(dataset=dict(source='embedded'))
test_dataloader = val_dataloader

optim_wrapper = dict(
    constructor='LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
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
    # windows without gaps or overlaps, so that the logged times add up to the time of the training
    logger=dict(interval=20),
    checkpoint=dict(interval=1, max_keep_ckpts=1))
log_processor = dict(window_size=20)
custom_hooks = [dict(type='VisualReportHook')]
