# Mask R-CNN with ViM2-T over 12 epochs of COCO. The paper fine-tunes over 12 and over 36 epochs and states one result,
# 47.1 box AP and 42.4 mask AP, without saying of which; that its detector is Mask R-CNN, and the drop path, are
# VMamba's. The authors released neither code nor weights: give weights of your own ImageNet training by --cfg-options
# model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE.
_base_ = ['../_base_/models/mask_rcnn_fpn.py', '../_base_/datasets/coco_instance.py',
          '../_base_/schedules/mask_rcnn_1x.py', '../_base_/detection_runtime.py']

model = dict(
    backbone=dict(
        name='vim2_tiny',
        drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]))
