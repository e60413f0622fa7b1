"""Models that find objects in images."""

from .boxes import box_ciou, decode_boxes, non_max_suppression
from .mamba_yolo import MambaYOLO

__all__ = ['MambaYOLO', 'box_ciou', 'decode_boxes', 'non_max_suppression']
