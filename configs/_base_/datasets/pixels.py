# Pictures in folders for pixel-space diffusion: cut as ADM does, mirrored. A config names root, size and batch.
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='SeededSampler', shuffle=True),
    collate_fn=dict(type='collate_images'),
    dataset=dict(type='TimmDataset', split='train', transform=dict(type='ADMCenterCrop', size=32, flip=0.5)))
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='SeededSampler', shuffle=False),
    collate_fn=dict(type='collate_images'),
    dataset=dict(type='TimmDataset', split='val', transform=dict(type='ADMCenterCrop', size=32)))
val_evaluator = dict(type='DiffusionLoss', bins=4)
# by custom, FID compares what was drawn with the pictures of the training
test_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='SeededSampler', shuffle=False),
    collate_fn=dict(type='collate_images'),
    dataset=dict(type='TimmDataset', split='train', transform=dict(type='ADMCenterCrop', size=32)))
test_evaluator = dict(type='FidelityMetric')
