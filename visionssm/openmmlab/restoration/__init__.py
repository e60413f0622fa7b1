"""Image restoration in the engine: the model, paired pictures, faults made on the fly, and PSNR and SSIM (extra [mm]).

A config names this package in ``custom_imports``; importing it imports every module in it.
"""
from .. import _import_modules

_import_modules(__name__, __path__)
