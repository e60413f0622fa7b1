# The official fine-tuning of Vim-Small with overlapping patches (81.6 % top-1), from the weights at stride 16.
_base_ = 'vim-tiny-stride8_8xb128-30e_imagenet.py'

load_from = 'visionssm://vim_small'
model = dict(model=dict(name='vim_small_stride8'))
