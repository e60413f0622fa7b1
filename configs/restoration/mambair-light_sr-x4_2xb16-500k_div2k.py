# MambaIR's light network, 4 times, from DIV2K alone, whatever the official file is called; stated: Urban100 26.52 dB.
# The official file starts it from the network for 2 times, but the published weights are from scratch, as the authors
# say; model.init_from names weights to start from.
# They also call patches of 192 pixels a slip of the pen here; those of the other scales show the network 64 x 64.
_base_ = ['../_base_/datasets/div2k_x4.py', '../_base_/schedules/restoration_500k.py',
          '../_base_/restoration_runtime.py']

model = dict(
    type='ImageRestorer',
    model=dict(name='mambair_light_sr_x4'),
    loss=dict(type='PixelLoss', kind='l1'),
    # the pieces of the official evaluation, of at most 200 pixels; None restores pictures whole
    tile='official')
