"""Looking at models: what they cost, which pixels they see, in which order they read them, and what they carry on."""

from .attention import ScanAttention, block_attention, find_block, scan_attention
from .flops import count_flops
from .pictures import draw_attention, draw_receptive_field, draw_routes, save_picture, to_picture
from .receptive_field import ReceptiveField, effective_receptive_field
from .routes import BlockRoutes, ScanRoute, scan_routes
from .scans import ScanBlock, record_scans

__all__ = [
    'BlockRoutes', 'ReceptiveField', 'ScanAttention', 'ScanBlock', 'ScanRoute', 'block_attention', 'count_flops',
    'draw_attention', 'draw_receptive_field', 'draw_routes', 'effective_receptive_field', 'find_block', 'record_scans',
    'save_picture', 'scan_attention', 'scan_routes', 'to_picture',
]
