"""Models that find objects in images, their losses, and what becomes of their boxes."""

from visionssm.checkpoints import read_ultralytics

from .assigner import Assignment, TaskAlignedAssigner
from .boxes import box_ciou, decode_boxes, non_max_suppression
from .losses import YOLOLoss
from .mamba_yolo import MambaYOLO
from .preprocessing import Letterbox, letterbox_geometry

__all__ = ['Assignment', 'Letterbox', 'MambaYOLO', 'TaskAlignedAssigner', 'YOLOLoss', 'box_ciou', 'decode_boxes',
           'letterbox_geometry', 'non_max_suppression', 'read_ultralytics']
