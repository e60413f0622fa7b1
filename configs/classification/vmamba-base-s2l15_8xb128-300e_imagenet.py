# The official recipe of VMamba-B s2l15 (83.9 % top-1): 8 GPUs x 128 images.
_base_ = 'vmamba-tiny_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vmamba_base_s2l15', drop_path_rate=0.6))
