# Mask R-CNN with Vim-B over 100 epochs of COCO. The authors have a config for it and state no result. The authors
# rotate positions and never released weights that were trained so; this starts from those without, and rotates nothing.
_base_ = 'cascade-mask-rcnn_vim-base_lsj-100e_coco.py'

heads = _base_.model.roi_head
model = dict(
    type='MaskRCNN',
    roi_head=dict(
        _delete_=True,
        type='StandardRoIHead',
        bbox_roi_extractor=heads.bbox_roi_extractor,
        bbox_head=dict(heads.bbox_head[0], reg_class_agnostic=False),
        mask_roi_extractor=heads.mask_roi_extractor,
        mask_head=heads.mask_head),
    train_cfg=dict(rcnn=dict(_base_.model.train_cfg.rcnn[0], _delete_=True)))
