# Cascade Mask R-CNN as ViTDet has it, which Vim's detectors use: five maps made of the last one, an RPN with two
# convolutions, heads of four with layer normalisation over the channels, boxes that are shared by all classes, one mask
# head, and images padded to 1024 x 1024. A config adds model.backbone.name.
_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'

norm_cfg = dict(type='visionssm.LayerNorm2d', eps=1e-6)
loss_bbox = dict(type='L1Loss', loss_weight=1.0)

model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        _delete_=True,
        type='visionssm.Backbone',
        img_size=1024,
        drop_path_rate=0.1,
        pyramid=dict(type='simple', out_channels=256)),
    neck=None,
    rpn_head=dict(num_convs=2, loss_bbox=dict(_delete_=True, **loss_bbox)),
    roi_head=dict(
        type='visionssm.SharedMaskCascadeRoIHead',
        stage_loss_weights=[1, 1, 1],
        bbox_roi_extractor=dict(type='visionssm.SingleRoIExtractor'),
        mask_roi_extractor=dict(type='visionssm.SingleRoIExtractor'),
        bbox_head=[
            dict(
                type='Shared4Conv1FCBBoxHead',
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=norm_cfg,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=stds),
                reg_class_agnostic=True,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=loss_bbox)
            for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])],
        mask_head=dict(norm_cfg=norm_cfg)),
    train_cfg=dict(
        rpn=dict(allowed_border=-1),
        rpn_proposal=dict(max_per_img=1000)))
