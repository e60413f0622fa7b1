"""Model families, one file each: every public module of this folder is imported and its names are re-exported.

A family becomes part of the package by being here. Its file defines `__all__` and `default_cfgs`; a broken one fails
the import of the package instead of going missing.
"""

import importlib
import pkgutil

__all__ = []

for _info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
    if _info.name.startswith('_'):
        continue
    _module = importlib.import_module(f'{__name__}.{_info.name}')
    for _required in ('__all__', 'default_cfgs'):
        if not hasattr(_module, _required):
            raise ImportError(f'The model family {_module.__name__} must define {_required}.')
    globals().update({_name: getattr(_module, _name) for _name in _module.__all__})
    __all__.extend(_module.__all__)
