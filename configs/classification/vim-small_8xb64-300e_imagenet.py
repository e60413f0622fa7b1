# The official recipe of Vim-Small (80.5 % top-1): 8 GPUs x 64 images, learning rate 1e-3 * 512 / 512.
_base_ = 'vim-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vim_small', drop_path_rate=0.05))
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
auto_scale_lr = dict(base_batch_size=512)
