# DeiT-Tiny, the usual baseline: any model of timm's registry is one line away. Weight decay and drop path are DeiT's.
_base_ = 'vim-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='deit_tiny_patch16_224', drop_path_rate=0.1))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
