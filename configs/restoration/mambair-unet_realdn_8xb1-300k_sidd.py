# MambaIR's U-Net against the noise of real cameras; stated: SIDD 39.89 dB.
# The official file has one picture a GPU, so its list of batches (8, 5, 4, 2, 1, 1) for growing patches changes
# nothing; Restormer itself takes 8: batch_size=8 in the loader and these batch_sizes in the hook. Pictures of one batch
# are mixed, so with one picture mixup does nothing either.
_base_ = ['../_base_/datasets/sidd.py', '../_base_/schedules/restormer_300k.py', '../_base_/restoration_runtime.py']

model = dict(
    type='ImageRestorer',
    model=dict(name='mambair_unet_realdn'),
    loss=dict(type='PixelLoss', kind='l1'),
    mixup=1.2)

default_hooks = dict(checkpoint=dict(interval=4000))
randomness = dict(seed=100)
