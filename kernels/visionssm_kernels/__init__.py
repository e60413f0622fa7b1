"""Scan kernels of visionssm: selective scans along sequences and along routes over maps, on any device."""
from ._dispatch import backend_report, set_strict, use_backend
from ._library import export_decompositions
from .selective_scan import selective_scan
from .selective_scan_2d import ROUTES, Routes, Windows, get_routes, selective_scan_2d

__all__ = [
    'ROUTES', 'Routes', 'Windows', 'backend_report', 'export_decompositions', 'get_routes', 'selective_scan',
    'selective_scan_2d', 'set_strict', 'use_backend',
]
