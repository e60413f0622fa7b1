# MambaIR for photographs with unknown faults, 4 times, first of two stages: the mean absolute difference, with faults
# that are made on the fly. The authors published weights and no recipe: they name HAT's two stages, and the numbers
# here are those of Real-ESRGAN (https://arxiv.org/abs/2107.10833). No score is stated.
# Data, from good pictures alone, as Real-ESRGAN prepares them; folders that you have not made leave gt:
#   data/DF2K/DF2K_HR_sub/          pieces of 400 pixels, 200 apart, of DIV2K's and Flickr2K's 3,450 pictures
#   data/DF2K/DF2K_multiscale_sub/  the same of these pictures shrunk to several sizes
#   data/DF2K/OST_sub/              the same of OutdoorSceneTraining
#   data/DIV2K/DIV2K_valid_HR/      whole pictures, whose faults are the same in every evaluation
# The training starts from the network for shrunk pictures: train it first, or name a file of yours by
# --cfg-options model.init_from=FILE; model.init_from=None starts from scratch.
_base_ = ['../_base_/datasets/pairs.py', '../_base_/restoration_runtime.py']

model = dict(
    type='ImageRestorer',
    model=dict(name='mambair_realsr_x4'),
    # the truth is sharpened, and spoilt after that
    loss=dict(type='PixelLoss', kind='l1', sharpen=True),
    tile='official',
    init_from='work_dirs/mambair_sr-x4_8xb4-250k_df2k/best/model.safetensors')

# each sample has faults of its own, so no pool of pairs need mix the batches; the 72 pixels around a patch of 256 are
# spoilt with it, which makes 400 where the picture is that large
fault = dict(type='SecondOrderFault', scale=4, sharpen=True, margin=72)
train_dataloader = dict(
    batch_size=6,
    num_workers=10,
    dataset=dict(
        data_root='data/DF2K',
        gt=['DF2K_HR_sub', 'DF2K_multiscale_sub', 'OST_sub'],
        scale=4,
        degrade=fault,
        patch=256,
        pad=True,
        name='df2k-ost'))
val_dataloader = dict(
    num_workers=4,
    persistent_workers=True,
    dataset=dict(
        type='PairedImages', data_root='data/DIV2K', gt='DIV2K_valid_HR', scale=4,
        degrade=dict(type='SecondOrderFault', scale=4), name='DIV2K'))
test_dataloader = val_dataloader
val_evaluator = dict(type='RestorationMetric', border=4)
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='Adam', lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0))
param_scheduler = []
train_cfg = dict(by_epoch=False, max_iters=1000000, val_interval=20000)
auto_scale_lr = dict(base_batch_size=48)
custom_hooks = [dict(type='EMAHook', decay=0.999)]
default_hooks = dict(checkpoint=dict(interval=20000))
randomness = dict(seed=0)
