# Mask R-CNN small enough to learn on two cores: garments of Fashion-MNIST pasted onto photographs, 160 x 160 pixels
# (python tools/make_composed_data.py makes them). A quarter of the usual channels, half the anchors' sizes, few boxes.
_base_ = ['models/mask_rcnn_fpn.py', 'datasets/composed_coco.py', 'detection_runtime.py']

max_epochs = 12
channels = 64
num_classes = 10

model = dict(
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=channels, norm_cfg=dict(type='GN', num_groups=16)),
    rpn_head=dict(in_channels=channels, feat_channels=channels, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, finest_scale=28),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=num_classes),
        mask_roi_extractor=dict(out_channels=channels, finest_scale=28),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=num_classes)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(
        rpn=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(max_per_img=50)))

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='visionssm.LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, eta_min=1e-5, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=4)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=1))
log_processor = dict(window_size=10)
