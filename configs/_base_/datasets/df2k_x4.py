# As df2k_x2.py, 4 times: .../X4/ and names with x4 or _LRBI_x4.
_base_ = ['df2k_x2.py']

train_dataloader = dict(dataset=dict(scale=4, patch=192))
val_dataloader = dict(dataset=dict(common=dict(scale=4)))
test_dataloader = dict(dataset=dict(common=dict(scale=4)))
val_evaluator = dict(border=4)
test_evaluator = dict(border=4)
