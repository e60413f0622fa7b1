# MambaIR against Gaussian noise of deviation 15 / 255, colour; stated: Urban100 35.17 or 35.37 dB, by two papers.
_base_ = ['../_base_/datasets/dfwb_noise.py', '../_base_/schedules/restoration_1600k.py',
          '../_base_/restoration_runtime.py']

model = dict(
    type='ImageRestorer',
    model=dict(name='mambair_dn_color'),
    loss=dict(type='CharbonnierLoss', eps=1e-3),
    # the pieces of the official evaluation, of at most 200 pixels; None restores pictures whole
    tile='official')
