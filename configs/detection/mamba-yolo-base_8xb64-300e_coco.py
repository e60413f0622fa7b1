# Mamba-YOLO-B with the recipe of Mamba-YOLO-T.
_base_ = 'mamba-yolo-tiny_8xb64-300e_coco.py'

model = dict(model=dict(name='mamba_yolo_base'))
