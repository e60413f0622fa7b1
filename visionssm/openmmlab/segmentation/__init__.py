"""Segmentation with MMSegmentation: our segmentors, data and metrics in its registries (extra ``[seg]``).

A config names this package in ``custom_imports``; importing it imports every module in it.
"""
from .. import _import_modules, _require

_require('mmseg', 'seg')
_import_modules(__name__, __path__)
