# MambaIR against artefacts of JPEG at quality 40, gray; stated: Classic5 34.53 dB, LIVE1 34.70 dB.
_base_ = ['../_base_/datasets/dfwb_jpeg.py', '../_base_/schedules/restoration_1600k.py',
          '../_base_/restoration_runtime.py']

model = dict(
    type='ImageRestorer',
    model=dict(name='mambair_car_gray'),
    loss=dict(type='CharbonnierLoss', eps=1e-3),
    # the pieces of the official evaluation, of at most 200 pixels; None restores pictures whole
    tile='official')

randomness = dict(seed=42)
