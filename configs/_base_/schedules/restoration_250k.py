# As restoration_500k.py from the weights of another scale: half as long, at half the rate.
_base_ = ['restoration_500k.py']

optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='MultiStepLR', milestones=[125000, 200000, 225000, 237500], gamma=0.5, by_epoch=False),
]
train_cfg = dict(max_iters=250000)
