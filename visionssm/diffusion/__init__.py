"""Models that draw images: diffusion with a state-space backbone."""

from .dis import DiS

__all__ = ['DiS']
