# The official recipe of the first VMamba-T (82.2 % top-1, without averaging): 8 GPUs x 128 images.
# The released weights were trained with a drop path rate of 0.1, as their file name says.
_base_ = 'vmamba-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vmamba_tiny_v0', drop_path_rate=0.2))
