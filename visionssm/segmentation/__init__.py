"""Models that give every pixel of an image a class, with their losses, scores and preparation of images."""

from .losses import BceDiceLoss, CeDiceLoss
from .metrics import binary_confusion, binary_scores
from .mhs_unet import MHSUNet
from .preprocessing import prepare_image
from .vm_unet import VMUNet

__all__ = ['BceDiceLoss', 'CeDiceLoss', 'MHSUNet', 'VMUNet', 'binary_confusion', 'binary_scores', 'prepare_image']
