# The official recipe of VSSD-Small with MESA (84.5 % top-1): from epoch 75 on it also learns from its average.
_base_ = 'vssd-small_8xb128-300e_imagenet.py'

model = dict(mesa=dict(weight=1.5, start=0.25))
