# The official recipe of the first VMamba-S (83.5 % top-1): 8 GPUs x 128 images.
_base_ = 'vmamba-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vmamba_small_v0', drop_path_rate=0.3))
