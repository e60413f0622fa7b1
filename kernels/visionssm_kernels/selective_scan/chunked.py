"""PyTorch path."""
from .reference import backward, forward

__all__ = ['backward', 'forward']
