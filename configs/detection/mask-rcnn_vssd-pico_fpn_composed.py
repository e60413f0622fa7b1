# A small Mask R-CNN with the smallest VSSD, trained from nothing in minutes on two cores.
_base_ = '../_base_/mask_rcnn_pico_composed.py'

model = dict(backbone=dict(name='vssd_pico'))
