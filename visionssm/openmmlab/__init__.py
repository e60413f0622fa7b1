"""The training engine: MMEngine's Runner with our models, data, hooks and strategies (extra ``[mm]``).

Importing this package imports every module in it, which fills the registries of :mod:`visionssm.registry`.
"""
import importlib
import pkgutil

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith('_')):
    importlib.import_module(f'{__name__}.{_module}')
