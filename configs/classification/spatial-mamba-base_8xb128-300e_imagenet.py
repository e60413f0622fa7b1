# The official recipe of Spatial-Mamba-B (85.3 % top-1): 8 GPUs x 128 images, and MESA from epoch 75 on.
_base_ = 'spatial-mamba-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='spatial_mamba_base', drop_path_rate=0.5), mesa=dict(weight=2.0))
