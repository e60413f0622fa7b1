# The official recipe of VSSD-Base with MESA (85.4 % top-1): from epoch 75 on it also learns from its average.
_base_ = 'vssd-base_8xb128-300e_imagenet.py'

model = dict(mesa=dict(weight=2.0, start=0.25))
