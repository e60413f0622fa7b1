# As restoration_1600k.py from the weights for another noise or quality: half as long, at half the rate.
_base_ = ['restoration_500k.py']

optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='MultiStepLR', milestones=[400000, 600000, 700000, 750000], gamma=0.5, by_epoch=False),
]
train_cfg = dict(max_iters=800000)
auto_scale_lr = dict(base_batch_size=16)
