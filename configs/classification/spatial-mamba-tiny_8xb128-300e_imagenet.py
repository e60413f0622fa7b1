# The official recipe of Spatial-Mamba-T (83.5 % top-1): 8 GPUs x 128 images, and MESA from epoch 75 on.
# A_log decays; dt_bias, D and the fusion's alpha, of one dimension each, do not.
_base_ = ['../_base_/models/imagenet_mixup.py', '../_base_/datasets/imagenet_swin.py',
          '../_base_/schedules/imagenet_swin_300e.py', '../_base_/default_runtime.py']

model = dict(model=dict(name='spatial_mamba_tiny', drop_path_rate=0.2), mesa=dict(weight=1.0, start=0.25))
optim_wrapper = dict(paramwise_cfg=dict(force_decay=['*.A_log']))
