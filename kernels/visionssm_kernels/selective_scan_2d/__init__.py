"""The selective scan over 2-D routes, and the routes themselves."""
from .cross import cross_merge, cross_scan
from .op import selective_scan_2d
from .routes import ROUTES, Routes, get_routes

__all__ = ['ROUTES', 'Routes', 'cross_merge', 'cross_scan', 'get_routes', 'selective_scan_2d']
