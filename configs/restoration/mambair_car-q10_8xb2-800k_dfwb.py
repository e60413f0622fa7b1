# MambaIR against artefacts of JPEG at quality 10, gray; stated: Classic5 30.27 dB, LIVE1 29.88 dB.
# The training starts from the network for quality 40: train it first, or name a file of yours by
# --cfg-options model.init_from=FILE; model.init_from=None starts from scratch.
_base_ = ['../_base_/datasets/dfwb_jpeg.py', '../_base_/schedules/restoration_800k.py',
          '../_base_/restoration_runtime.py']

model = dict(
    type='ImageRestorer',
    model=dict(name='mambair_car_gray'),
    loss=dict(type='CharbonnierLoss', eps=1e-3),
    # the pieces of the official evaluation, of at most 200 pixels; None restores pictures whole
    tile='official',
    init_from='work_dirs/mambair_car-q40_8xb2-1600k_dfwb/best/model.safetensors')

train_dataloader = dict(dataset=dict(degrade=dict(quality=10)))
val_dataloader = dict(dataset=dict(common=dict(degrade=dict(quality=10))))
test_dataloader = dict(dataset=dict(common=dict(degrade=dict(quality=10))))
randomness = dict(seed=42)
