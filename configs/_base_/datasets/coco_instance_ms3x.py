# COCO with the multi-scale and crop augmentation of DETR that Swin's 36 epochs use: half of the images are scaled to a
# shorter side of 480 to 800, the others are scaled to 400 to 600, cropped, and scaled again.
_base_ = 'coco_instance.py'

scales = [(side, 1333) for side in range(480, 801, 32)]
train_pipeline = [
    dict(type='visionssm.LoadImage'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoice', transforms=[
        [dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)],
        [
            dict(type='RandomChoiceResize', scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
            dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
            dict(type='RandomChoiceResize', scales=scales, keep_ratio=True),
        ],
    ]),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
