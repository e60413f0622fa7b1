# The official recipe of VMamba-T s2l5 (82.5 % top-1): 8 GPUs x 128 images.
_base_ = 'vmamba-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vmamba_tiny_s2l5', drop_path_rate=0.2))
