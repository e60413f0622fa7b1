# MambaIR for super-resolution, 2 times, from DF2K; stated: Urban100 34.15 dB.
_base_ = ['../_base_/datasets/df2k_x2.py', '../_base_/schedules/restoration_500k.py',
          '../_base_/restoration_runtime.py']

model = dict(
    type='ImageRestorer',
    model=dict(name='mambair_sr_x2'),
    loss=dict(type='PixelLoss', kind='l1'),
    # the pieces of the official evaluation, of at most 200 pixels; None restores pictures whole
    tile='official')
