# The official recipe of Mamba2D-T (84.0 % top-1): 4096 images a step, in bfloat16 (--amp).
_base_ = ['../_base_/models/imagenet_mixup.py', '../_base_/datasets/imagenet_mamba2d.py',
          '../_base_/schedules/imagenet_mamba2d_300e.py', '../_base_/default_runtime.py']

model = dict(model=dict(name='mamba2d_tiny', drop_path_rate=0.175, drop_rate=0.15))
