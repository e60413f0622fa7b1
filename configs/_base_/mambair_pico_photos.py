# A small MambaIR that learns on two cores, on photographs (python tools/make_photo_data.py makes the data). The last,
# averaged weights are the result: no photograph that is held out chooses among checkpoints.
_base_ = ['datasets/photos.py', 'restoration_runtime.py']

max_iters = 3000

model = dict(
    type='ImageRestorer',
    model=dict(name='mambair_pico', d_state=2, drop_path_rate=0.0),
    # whole photographs in pieces, which need little memory
    tile=192,
    overlap=32)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='Adam', lr=2e-3, betas=(0.9, 0.99)),
    clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, end=max_iters, eta_min=1e-6),
]
train_cfg = dict(by_epoch=False, max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(interval=500, max_keep_ckpts=1))
# of the last hundred steps or so: a longer average would still hold random weights in so short a training
custom_hooks = [dict(type='EMAHook', decay=0.99)]
log_processor = dict(window_size=50)
randomness = dict(seed=0)
