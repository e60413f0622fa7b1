# The official recipe of VMamba-T (s1l8, 82.6 % top-1): 8 GPUs x 128 images.
# Exempt from weight decay are only tensors of one dimension: A_log, dt_bias (a row a route) and both projections decay.
_base_ = ['../_base_/models/imagenet_mixup.py', '../_base_/datasets/imagenet_swin.py',
          '../_base_/schedules/imagenet_swin_300e.py', '../_base_/default_runtime.py']

model = dict(model=dict(name='vmamba_tiny', drop_path_rate=0.2))
optim_wrapper = dict(paramwise_cfg=dict(force_decay=['*.A_log', '*.dt_bias']))
