# The official recipe of VMamba-S (s1l20, 83.3 % top-1): 8 GPUs x 128 images.
_base_ = 'vmamba-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vmamba_small', drop_path_rate=0.3))
