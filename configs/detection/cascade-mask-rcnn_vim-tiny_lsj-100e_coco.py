# Cascade Mask R-CNN with Vim-Ti over 100 epochs of COCO: the paper is said to state 45.7 box AP and 39.2 mask AP (not
# checked here). The authors used 4 GPUs with 16 images each. Positions are rotated and nothing is divided by two, as in
# the weights that this starts from and in the code of that time.
_base_ = ['../_base_/models/cascade_mask_rcnn_vitdet.py', '../_base_/datasets/coco_instance_lsj.py',
          '../_base_/schedules/vitdet_100e.py']

model = dict(
    backbone=dict(
        name='vim_tiny_rope',
        init_cfg=dict(type='Pretrained', checkpoint='visionssm://vim_tiny_rope.preview_in1k')))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.837))
