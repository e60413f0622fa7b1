# Twice the resolution, from nothing, on photographs shrunk as MATLAB does.
_base_ = '../_base_/mambair_pico_photos.py'

fault = dict(type='BicubicFault', scale=2)
train_dataloader = dict(dataset=dict(scale=2, degrade=fault, patch=64))
val_dataloader = dict(dataset=dict(common=dict(scale=2, degrade=fault)))
test_dataloader = val_dataloader
# luma without a border of the scale, as papers do
val_evaluator = dict(type='RestorationMetric', border=2, y_channel=True)
test_evaluator = val_evaluator
