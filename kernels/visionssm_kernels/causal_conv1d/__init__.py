"""Depth-wise causal convolution, fused with SiLU, in both directions."""
from .op import causal_conv1d

__all__ = ['causal_conv1d']
