# Mamba-YOLO-T with half of its channels on pictures of 160 x 160 pixels, trained from nothing in minutes on two cores:
# garments of Fashion-MNIST pasted onto photographs (python tools/make_composed_data.py makes them).
_base_ = ['../_base_/models/mamba_yolo.py', '../_base_/datasets/composed_coco.py',
          '../_base_/schedules/yolo_sgd_300e.py', '../_base_/detection_runtime.py']

img_size = 160
batch_size = 16
max_epochs = 16

model = dict(
    model=dict(name='mamba_yolo_tiny', dims=(16, 32, 64, 128), num_classes=10),
    test_cfg=dict(max_per_img=100))

train_dataloader = dict(
    batch_size=batch_size,
    sampler=dict(type='visionssm.SeededSampler'),
    dataset=dict(
        _delete_=True,
        type='visionssm.MixDataset',
        dataset=dict(
            type={{_base_.dataset_type}},
            data_root={{_base_.data_root}},
            metainfo={{_base_.metainfo}},
            ann_file='annotations/instances_train.json',
            data_prefix=dict(img='train/'),
            filter_cfg=dict(filter_empty_gt=False),
            pipeline=[
                dict(type='visionssm.LoadImage'),
                dict(type='LoadAnnotations', with_bbox=True),
                dict(type='visionssm.ResizeLongSide', size=img_size),
            ]),
        pipeline=[
            dict(type='Mosaic', img_scale=(img_size, img_size), pad_val=114.0),
            dict(type='visionssm.RandomScaleShift', size=img_size, scale=0.5, shift=0.1),
            dict(type='visionssm.RandomHSV'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs'),
        ]))
test_pipeline = [
    dict(type='visionssm.LoadImage'),
    dict(type='visionssm.ResizeLongSide', size=img_size),
    dict(type='visionssm.Letterbox', size=img_size, scale_up=False, minimal=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor',
                                          'pad_param')),
]
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
val_dataloader = dict(batch_size=25, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator

optim_wrapper = dict(paramwise_cfg=dict(batch_size=batch_size))
param_scheduler = [
    dict(type='LinearLR', start_factor=1.0, end_factor=0.01, by_epoch=True, begin=0, end=max_epochs + 1)]
train_cfg = dict(max_epochs=max_epochs, val_interval=4)
custom_hooks = [
    dict(type='visionssm.YOLOWarmupHook', epochs=2, bias_lr=0.1, momentum=0.8),
    dict(type='visionssm.CloseMosaicHook', epochs=4),
    # few steps, so the average forgets sooner
    dict(type='visionssm.EMAHook', ema_type='mmdet.ExpMomentumEMA', momentum=0.005, gamma=200, update_buffers=True),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=1))
log_processor = dict(window_size=10)
