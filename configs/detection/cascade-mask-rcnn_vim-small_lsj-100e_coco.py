# Cascade Mask R-CNN with Vim-S over 100 epochs of COCO. The authors have a config for it and state no result. The
# authors rotate positions and never released weights that were trained so; this starts from those without, and rotates
# nothing.
_base_ = ['../_base_/models/cascade_mask_rcnn_vitdet.py', '../_base_/datasets/coco_instance_lsj.py',
          '../_base_/schedules/vitdet_100e.py']

model = dict(
    backbone=dict(
        name='vim_small',
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vim_small.in1k')))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.837))
