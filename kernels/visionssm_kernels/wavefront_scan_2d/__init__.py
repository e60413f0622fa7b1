"""The two-axis scan of Mamba2D: every state follows from the ones above it and to its left."""
from .op import wavefront_scan_2d

__all__ = ['wavefront_scan_2d']
