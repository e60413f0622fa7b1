"""Models that give every pixel of an image a class."""

from .mhs_unet import MHSUNet

__all__ = ['MHSUNet']
