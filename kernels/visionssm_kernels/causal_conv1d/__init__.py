"""Depth-wise causal convolution, fused with SiLU, in one direction or in both."""
from .both import causal_conv1d_both
from .op import causal_conv1d

__all__ = ['causal_conv1d', 'causal_conv1d_both']
