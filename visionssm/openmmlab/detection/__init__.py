"""Detection with MMDetection: our detectors, data and recipes in its registries (extra ``[det]``).

A config names this package in ``custom_imports``; importing it imports every module in it.
"""
from .. import _import_modules, _require

_require('mmdet', 'det')
_import_modules(__name__, __path__)
