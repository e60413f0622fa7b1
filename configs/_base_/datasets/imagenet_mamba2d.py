# ImageNet as Mamba2D sees it: random interpolation in training, and no margin around the centre crop in evaluation.
_base_ = 'imagenet_swin.py'

train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(interpolation='random')))
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0)))
test_dataloader = val_dataloader
