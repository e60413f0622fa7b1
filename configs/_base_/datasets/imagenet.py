# ImageNet-1K as class folders: <data_root>/train/<synset>/*.JPEG and <data_root>/val/<synset>/*.JPEG.
# Name the folder in the environment variable IMAGENET_ROOT. Augmentation is DeiT's, as the Vim recipes use it.
data_root = '{{$IMAGENET_ROOT:data/imagenet}}'

train_dataloader = dict(
    batch_size=128,
    num_workers=10,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    # repeated augmentation: every image three times in a row, on different processes
    sampler=dict(type='SeededSampler', shuffle=True, repeats=3),
    collate_fn=dict(type='collate_images'),
    dataset=dict(
        type='TimmDataset',
        root=data_root,
        split='train',
        class_map='imagenet-1k',
        transform=dict(
            type='TimmTransform',
            input_size=224,
            is_training=True,
            interpolation='bicubic',
            auto_augment='rand-m9-mstd0.5-inc1',
            color_jitter=0.3,
            re_prob=0.25,
            re_mode='pixel',
            re_count=1)))
val_dataloader = dict(
    batch_size=192,
    num_workers=10,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type='SeededSampler', shuffle=False),
    collate_fn=dict(type='collate_images'),
    dataset=dict(
        type='TimmDataset',
        root=data_root,
        split='val',
        class_map='imagenet-1k',
        transform=dict(type='TimmTransform', input_size=224, interpolation='bicubic', crop_pct=0.875)))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
