# Mask R-CNN with ViM2-S over 36 epochs of COCO. The paper fine-tunes over 12 and over 36 epochs and states one result,
# 48.5 box AP and 43.1 mask AP, without saying of which; that its detector is Mask R-CNN, and the drop path, are
# VMamba's. The authors released neither code nor weights: give weights of your own ImageNet training by --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance_ms3x.py',
          '../_base_/schedules/mask_rcnn_3x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vim2_small',
        drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]))
