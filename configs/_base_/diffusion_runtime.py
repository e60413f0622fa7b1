# What all trainings of diffusion models share: the engine's parts, and which checkpoint is the best.
_base_ = ['default_runtime.py']

custom_imports = dict(imports=['visionssm.openmmlab.diffusion'], allow_failed_imports=False)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(checkpoint=dict(save_best='val_loss', rule='less'))
