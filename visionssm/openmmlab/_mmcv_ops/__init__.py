"""The operators of the stand-in for ``mmcv._ext``, by the names that mmcv.ops asks for.

Names, order of arguments and results written in place are those of mmcv's bindings. Tensors of all devices and
floating types are taken; half precision is computed in float32.
"""
from . import attention, conv, info, losses, nms, roi

OPERATORS = {name: getattr(module, name) for module in (attention, conv, info, losses, nms, roi)
             for name in module.__all__}
