"""The operators of the stand-in for ``mmcv._ext``, by the names that mmcv.ops asks for.

Names, argument order and results written in place are those of mmcv's bindings.
"""
from . import info

OPERATORS = {name: getattr(module, name) for module in (info,) for name in module.__all__}
