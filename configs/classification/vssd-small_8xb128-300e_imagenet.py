# The official recipe of VSSD-Small (84.1 % top-1): 8 GPUs x 128 images, and lower rates than the smaller models have:
#   highest 3e-4 * 1024 / 512 = 6e-4, start of the warm-up 5e-7 * 1024 / 512 = 1e-6, lowest 3e-6 * 1024 / 512 = 6e-6.
_base_ = 'vssd-micro_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vssd_small', drop_path_rate=0.4))
optim_wrapper = dict(optimizer=dict(lr=6e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1 / 600, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=20, end=300, eta_min=6e-6, convert_to_iter_based=True),
]
