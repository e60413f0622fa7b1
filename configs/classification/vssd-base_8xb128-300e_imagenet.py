# The official recipe of VSSD-Base (84.7 % top-1): 8 GPUs x 128 images.
_base_ = 'vssd-small_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vssd_base', drop_path_rate=0.6))
