# The official recipe of Vim-Tiny (76.1 % top-1): 8 GPUs x 128 images, learning rate 5e-4 * 1024 / 512.
# It was trained in float32 (leave --amp off to repeat that), with weight decay on A_log, and its learning rate moved
# once an epoch instead of every step.
_base_ = ['../_base_/datasets/imagenet.py', '../_base_/schedules/imagenet_adamw_300e.py',
          '../_base_/default_runtime.py']

model = dict(
    type='ImageClassifier',
    model=dict(name='vim_tiny', drop_path_rate=0.0),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode='batch', label_smoothing=0.1),
    loss=dict(type='SoftTargetCrossEntropy'))
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.1),
    paramwise_cfg=dict(force_decay=['*.A_log']))
custom_hooks = [dict(type='EMAHook', decay=0.99996), dict(type='VisualReportHook')]
auto_scale_lr = dict(base_batch_size=1024)
