"""The state-space scan of Mamba-2, along a sequence and along routes over a map."""
from .op import ssd
from .routed import ssd_2d

__all__ = ['ssd', 'ssd_2d']
