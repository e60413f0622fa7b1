# Skin lesions and their masks: ROOT/{train,val}/{images,masks}, the masks named like the images, with or without
# _segmentation behind the name. The published numbers are those of VM-UNet's split of 7:3, which is not ours to give.
data_root = 'data/isic2018/'
size = 256

train_pipeline = [
    dict(type='visionssm.LoadMedicalImage'),
    dict(type='visionssm.LoadBinaryMask'),
    dict(type='visionssm.StretchIntensity'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    # the official code draws one angle for the whole run, by mistake: per_run=True
    dict(type='visionssm.MedicalRotate', prob=0.5),
    dict(type='visionssm.MedicalResize', size=size),
    dict(type='visionssm.PackMedicalInputs'),
]
test_pipeline = [
    dict(type='visionssm.LoadMedicalImage'),
    dict(type='visionssm.StretchIntensity'),
    dict(type='visionssm.MedicalResize', size=size),
    # behind the resizing, so that pictures show the mask of the file; the metric resizes it
    dict(type='visionssm.LoadBinaryMask'),
    dict(type='visionssm.PackMedicalInputs'),
]
tta_pipeline = [
    dict(type='visionssm.LoadMedicalImage'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='visionssm.StretchIntensity')],
        [dict(type='visionssm.MedicalResize', size=size)],
        [dict(type='RandomFlip', prob=0.0, direction='horizontal'),
         dict(type='RandomFlip', prob=1.0, direction='horizontal'),
         dict(type='RandomFlip', prob=1.0, direction='vertical')],
        [dict(type='visionssm.LoadBinaryMask')],
        [dict(type='visionssm.PackMedicalInputs')],
    ]),
]

train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='visionssm.SeededSampler', shuffle=True),
    dataset=dict(
        type='visionssm.ISICDataset',
        data_root=data_root,
        data_prefix=dict(img_path='train/images', seg_map_path='train/masks'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='visionssm.ISICDataset',
        data_root=data_root,
        data_prefix=dict(img_path='val/images', seg_map_path='val/masks'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader

# at the size of the network, as the published numbers are; at='image' compares at the size of the files
val_evaluator = dict(type='visionssm.BinarySegMetric', at='network')
test_evaluator = val_evaluator
