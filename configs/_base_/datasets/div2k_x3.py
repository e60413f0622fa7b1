# As df2k_x3.py, from the 800 pictures of DIV2K alone: light networks.
_base_ = ['df2k_x3.py']

train_dataloader = dict(
    batch_size=16,
    dataset=dict(gt=['DIV2K/DIV2K_train_HR'], lq=['DIV2K/DIV2K_train_LR_bicubic/X{scale}']))
