"""Scan kernels of visionssm: selective scans along sequences and along routes over maps, on any device."""
from . import compat
from ._cache_tag import tag_compiler_caches
from ._dispatch import backend_report, set_strict, use_backend
from ._library import export_decompositions
from .causal_conv1d import causal_conv1d, causal_conv1d_both
from .dilated_conv2d import dilated_conv2d
from .drop_in import causal_conv1d_fn, mamba_inner_fn, selective_scan_fn
from .nc_ssd import nc_ssd
from .selective_scan import selective_scan
from .selective_scan_2d import ROUTES, Routes, cross_merge, cross_scan, get_routes, selective_scan_2d
from .ssd import ssd, ssd_2d
from .wavefront_scan_2d import wavefront_scan_2d

__all__ = [
    'ROUTES', 'Routes', 'backend_report', 'causal_conv1d', 'causal_conv1d_both', 'causal_conv1d_fn', 'compat',
    'cross_merge', 'cross_scan', 'dilated_conv2d', 'export_decompositions', 'get_routes', 'mamba_inner_fn', 'nc_ssd',
    'selective_scan', 'selective_scan_2d', 'selective_scan_fn', 'set_strict', 'ssd', 'ssd_2d', 'use_backend',
    'wavefront_scan_2d',
]

tag_compiler_caches()
