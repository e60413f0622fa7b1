# What all trainings of diffusion models share: the engine's parts, which checkpoint is the best, and how a test draws.
_base_ = ['default_runtime.py']

custom_imports = dict(imports=['visionssm.openmmlab.diffusion'], allow_failed_imports=False)
val_cfg = dict()
# the authors' sampler; the guidance is 1.5 for models with classes and none for others
test_cfg = dict(type='FidelityLoop', num_samples=50_000, sampler='ddpm', steps=250, seed=42, batch_size=64)
default_hooks = dict(checkpoint=dict(save_best='val_loss', rule='less'))
