# The official recipe of VSSD-Micro (82.5 % top-1): 8 GPUs x 128 images. The authors' file asks for a drop path rate of
# 0.1 under a key that their code does not read; it trained with 0.2.
_base_ = ['../_base_/models/imagenet_mixup.py', '../_base_/datasets/imagenet_swin.py',
          '../_base_/schedules/imagenet_swin_300e.py', '../_base_/default_runtime.py']

model = dict(model=dict(name='vssd_micro', drop_path_rate=0.2))
