"""Diffusion in the engine: training, validation and sampling of DiS; only sampling needs the extra ``[diffusion]``.

A config names this package in ``custom_imports``; importing it imports every module in it.
"""
from .. import _import_modules

_import_modules(__name__, __path__)
