# The official recipe of VSSD-Tiny with MESA (84.1 % top-1): from epoch 75 on it also learns from its average.
_base_ = 'vssd-tiny_8xb128-300e_imagenet.py'

model = dict(mesa=dict(weight=1.0, start=0.25))
