# The official recipe of Spatial-Mamba-S (84.6 % top-1): 8 GPUs x 128 images, and MESA from epoch 75 on.
_base_ = 'spatial-mamba-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='spatial_mamba_small', drop_path_rate=0.3), mesa=dict(weight=1.5))
