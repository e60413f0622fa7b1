# COCO 2017 as Mamba-YOLO sees it: mosaics of four images at 640 x 640, and rectangular batches for the validation.
# Not ported: Blur, MedianBlur, ToGray and CLAHE with a probability of 0.01 each (optional in the official code too).
dataset_type = 'visionssm.CocoDataset'
data_root = 'data/coco/'
img_size = 640
batch_size = 64

load_pipeline = [
    dict(type='visionssm.LoadImage'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='visionssm.ResizeLongSide', size=img_size),
]
train_pipeline = [
    dict(type='Mosaic', img_scale=(img_size, img_size), center_ratio_range=(0.5, 1.5), pad_val=114.0, prob=1.0),
    # the middle of a mosaic, or a letterboxed image in the last epochs
    dict(type='visionssm.RandomScaleShift', size=img_size, scale=0.5, shift=0.1),
    dict(type='visionssm.RandomHSV', hue=0.015, saturation=0.7, value=0.4),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='visionssm.LoadImage'),
    dict(type='visionssm.ResizeLongSide', size=img_size),
    # without a batch's rectangle, as in tools/predict.py, padded to the next multiple of 32
    dict(type='visionssm.Letterbox', size=img_size, scale_up=False, minimal=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor',
                                          'pad_param')),
]
# the image and its mirror, mirrored before the padding, which need not be symmetric
tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.7), max_per_img=300))
tta_pipeline = [
    dict(type='visionssm.LoadImage'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='visionssm.ResizeLongSide', size=img_size)],
        [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
        [dict(type='visionssm.Letterbox', size=img_size, scale_up=False, minimal=True)],
        [dict(type='LoadAnnotations', with_bbox=True)],
        [dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor',
                                               'pad_param', 'flip', 'flip_direction'))],
    ]),
]

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type='visionssm.SeededSampler', shuffle=True),
    dataset=dict(
        type='visionssm.MixDataset',
        dataset=dict(
            type=dataset_type,
            data_root=data_root,
            ann_file='annotations/instances_train2017.json',
            data_prefix=dict(img='train2017/'),
            # images without objects train too
            filter_cfg=dict(filter_empty_gt=False, min_size=0),
            pipeline=load_pipeline),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=8,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='visionssm.RectangularDataset',
        batch_size=batch_size,
        size=img_size,
        dataset=dict(
            type=dataset_type,
            data_root=data_root,
            ann_file='annotations/instances_val2017.json',
            data_prefix=dict(img='val2017/'),
            test_mode=True,
            pipeline=test_pipeline)))
test_dataloader = val_dataloader

val_evaluator = dict(
    type='visionssm.CocoMetric', ann_file=data_root + 'annotations/instances_val2017.json', metric='bbox',
    # as COCO's own program counts: AP50 and the others over 100 boxes too
    proposal_nums=(1, 10, 100))
test_evaluator = val_evaluator
