# MambaIR for super-resolution, 3 times, from DF2K; stated: Urban100 29.93 dB.
# The training starts from the network for 2 times: train it first, or name a file of yours by
# --cfg-options model.init_from=FILE; model.init_from=None starts from scratch.
_base_ = ['../_base_/datasets/df2k_x3.py', '../_base_/schedules/restoration_250k.py',
          '../_base_/restoration_runtime.py']

model = dict(
    type='ImageRestorer',
    model=dict(name='mambair_sr_x3'),
    loss=dict(type='PixelLoss', kind='l1'),
    # the pieces of the official evaluation, of at most 200 pixels; None restores pictures whole
    tile='official',
    init_from='work_dirs/mambair_sr-x2_8xb4-500k_df2k/best/model.safetensors')

train_dataloader = dict(batch_size=8)
auto_scale_lr = dict(base_batch_size=64)
