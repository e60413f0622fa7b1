"""Sum of depth-wise convolutions of several dilations over a map whose edges repeat outwards."""
from .op import dilated_conv2d

__all__ = ['dilated_conv2d']
