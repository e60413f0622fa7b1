"""The selective scan over 2-D routes."""
from .op import selective_scan_2d
from .routes import ROUTES, Routes, get_routes

__all__ = ['ROUTES', 'Routes', 'get_routes', 'selective_scan_2d']
