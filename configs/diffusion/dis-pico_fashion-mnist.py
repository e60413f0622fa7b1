# A small class-conditional DiS on 6,000 pictures of clothes that ship with the package, fifty minutes of one core: 49
# patches of 4 x 4, pixels in [-1, 1].
_base_ = ['../_base_/datasets/fashion_mnist.py', '../_base_/diffusion_runtime.py']

max_epochs = 28
warmup_epochs = 1

model = dict(
    type='DiffusionModel',
    # five blocks and half the usual state: a step of 64 pictures takes one core a second
    model=dict(name='dis_pico', patch_size=4, embed_dim=128, depth=4, d_state=8, drop_path_rate=0.0),
    # few steps: the velocity gives the shapes, which are decided under much noise, more weight than the noise does
    process=dict(prediction_type='v_prediction'))

train_dataloader = dict(
    batch_size=64,
    drop_last=True,
    # no mirror: all shoes of the data set point to the left
    dataset=dict(source='embedded', transform=dict(shift=0, flip=0.0)))
val_dataloader = dict(dataset=dict(source='embedded'))
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='DiffusionLoss', bins=4)
# Inception knows no clothes on 28 x 28 pixels; the Vim of the demo does, once it is trained:
# tools/train.py configs/classification/vim-pico_fashion-mnist.py
test_evaluator = [
    dict(type='DiffusionLoss', bins=4),
    dict(type='FidelityMetric', extractor='vim_pico',
         checkpoint='work_dirs/vim-pico_fashion-mnist/best/model.safetensors'),
]
test_cfg = dict(num_samples=1000, sampler='dpmsolver++', steps=20)

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.0),
    clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, end=warmup_epochs, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=warmup_epochs, end=max_epochs, eta_min=1e-6,
         convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=5)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=2, max_keep_ckpts=1))
custom_hooks = [
    dict(type='EMAHook', decay=0.998),
    dict(type='SampleGridHook', interval=800, sampler='ddim', steps=20, columns=8),
]
