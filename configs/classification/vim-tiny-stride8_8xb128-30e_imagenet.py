# The official fine-tuning of Vim-Tiny with overlapping patches (78.3 % top-1), from the weights at stride 16.
# Its lowest learning rate is not below its highest one, so the schedule is constant.
_base_ = 'vim-tiny_8xb128-300e_imagenet.py'

load_from = 'visionssm://vim_tiny'
model = dict(model=dict(name='vim_tiny_stride8', drop_path_rate=0.0))
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = []
train_cfg = dict(max_epochs=30)
