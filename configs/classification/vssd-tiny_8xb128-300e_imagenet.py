# The official recipe of VSSD-Tiny (83.6 % top-1): 8 GPUs x 128 images.
_base_ = 'vssd-micro_8xb128-300e_imagenet.py'

model = dict(model=dict(name='vssd_tiny', drop_path_rate=0.2))
