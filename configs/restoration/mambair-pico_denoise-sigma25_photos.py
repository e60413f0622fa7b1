# Gaussian noise of deviation 25 (of 255) taken out of colour photographs, from nothing.
_base_ = '../_base_/mambair_pico_photos.py'

max_iters = 2500

model = dict(model=dict(upscale=1, upsampler='residual'))
train_dataloader = dict(dataset=dict(degrade=dict(type='NoiseFault', sigma=25), patch=40))
# the same noise in every evaluation
val_dataloader = dict(dataset=dict(common=dict(degrade=dict(type='NoiseFault', sigma=25, seed=0))))
test_dataloader = val_dataloader
val_evaluator = dict(type='RestorationMetric')
test_evaluator = val_evaluator
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, end=max_iters, eta_min=1e-6),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
