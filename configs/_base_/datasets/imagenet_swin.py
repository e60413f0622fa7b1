# ImageNet with Swin's augmentation, which VMamba, VSSD and Spatial-Mamba use: every image once an epoch.
# timm leaves colour jitter out where RandAugment is on; the value is kept as the authors state it.
_base_ = 'imagenet.py'

train_dataloader = dict(
    sampler=dict(repeats=1),
    dataset=dict(transform=dict(color_jitter=0.4)))
