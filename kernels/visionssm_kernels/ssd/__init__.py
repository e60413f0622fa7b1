"""The state-space scan of Mamba-2."""
from .op import ssd

__all__ = ['ssd']
