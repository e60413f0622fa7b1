"""Models that make better images of bad ones: super-resolution, denoising, removal of compression artefacts."""

from .mambair import MambaIR, MambaIRUNet
from .mambairv2 import MambaIRv2

__all__ = ['MambaIR', 'MambaIRUNet', 'MambaIRv2']
