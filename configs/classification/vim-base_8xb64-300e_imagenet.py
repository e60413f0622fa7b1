# The recipe of Vim-Base (81.9 % top-1) has not been published: these are the settings of Vim-Small, untried.
_base_ = 'vim-small_8xb64-300e_imagenet.py'

model = dict(model=dict(name='vim_base'))
