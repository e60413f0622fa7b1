# MambaIR's light network, 2 times, from DIV2K alone, whatever the official file is called; stated: Urban100 32.85 dB.
_base_ = ['../_base_/datasets/div2k_x2.py', '../_base_/schedules/restoration_500k.py',
          '../_base_/restoration_runtime.py']

model = dict(
    type='ImageRestorer',
    model=dict(name='mambair_light_sr_x2'),
    loss=dict(type='PixelLoss', kind='l1'),
    # the pieces of the official evaluation, of at most 200 pixels; None restores pictures whole
    tile='official')
