# The official recipe of the first VMamba-B (83.7 % top-1): 8 GPUs x 128 images.
# The released weights were trained with a drop path rate of 0.6, as their file name says.
_base_ = 'vmamba-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vmamba_base_v0', drop_path_rate=0.5))
