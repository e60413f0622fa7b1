# MambaIR against Gaussian noise of deviation 25 / 255, colour; stated: Urban100 32.99 dB.
# The training starts from the network for noise of 15: train it first, or name a file of yours by
# --cfg-options model.init_from=FILE; model.init_from=None starts from scratch.
_base_ = ['../_base_/datasets/dfwb_noise.py', '../_base_/schedules/restoration_800k.py',
          '../_base_/restoration_runtime.py']

model = dict(
    type='ImageRestorer',
    model=dict(name='mambair_dn_color'),
    loss=dict(type='CharbonnierLoss', eps=1e-3),
    # the pieces of the official evaluation, of at most 200 pixels; None restores pictures whole
    tile='official',
    init_from='work_dirs/mambair_dn-sigma15_8xb2-1600k_dfwb/best/model.safetensors')

train_dataloader = dict(dataset=dict(degrade=dict(sigma=25)))
val_dataloader = dict(dataset=dict(common=dict(degrade=dict(sigma=25))))
test_dataloader = dict(dataset=dict(common=dict(degrade=dict(sigma=25))))
