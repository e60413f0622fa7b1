# What all trainings of restoration models share: they count steps, and the best checkpoint is that of the highest PSNR.
_base_ = ['default_runtime.py']

custom_imports = dict(imports=['visionssm.openmmlab.restoration'], allow_failed_imports=False)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=5000, save_best='PSNR', rule='greater'))
log_processor = dict(by_epoch=False)
# the authors' seed; 42 against JPEG
randomness = dict(seed=10)
