# The official recipe of Mamba-YOLO-T: 8 GPUs x 64 images, 300 epochs from scratch. The authors trained in float32
# unless --amp is given, and released no weights.
_base_ = ['../_base_/models/mamba_yolo.py', '../_base_/datasets/coco_yolo.py', '../_base_/schedules/yolo_sgd_300e.py',
          '../_base_/detection_runtime.py']

model = dict(model=dict(name='mamba_yolo_tiny'))
