# Latents of ImageNet, which tools/cache_latents.py writes; name their folder in the environment variable.
data_root = '{{$IMAGENET_LATENTS:data/imagenet-latents}}'

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='SeededSampler', shuffle=True),
    collate_fn=dict(type='collate_images'),
    dataset=dict(type='LatentDataset', root=f'{data_root}/train', flip=0.5))
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='SeededSampler', shuffle=False),
    collate_fn=dict(type='collate_images'),
    dataset=dict(type='LatentDataset', root=f'{data_root}/val', flip=0.0))
test_dataloader = val_dataloader
val_evaluator = dict(type='DiffusionLoss', bins=4)
# latents are no pictures, so a config names those, or their statistics, by reference
test_evaluator = dict(type='FidelityMetric')
