# As df2k_x2.py, 3 times: .../X3/ and names with x3 or _LRBI_x3.
_base_ = ['df2k_x2.py']

train_dataloader = dict(dataset=dict(scale=3, patch=192))
val_dataloader = dict(dataset=dict(common=dict(scale=3)))
test_dataloader = dict(dataset=dict(common=dict(scale=3)))
val_evaluator = dict(border=3)
test_evaluator = dict(border=3)
