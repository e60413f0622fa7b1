"""The non-causal state-space duality of VSSD."""
from .op import nc_ssd

__all__ = ['nc_ssd']
