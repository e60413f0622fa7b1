"""The selective scan of Mamba, and the routed scan that the 2-D scans are made of."""
from .op import selective_scan

__all__ = ['selective_scan']
