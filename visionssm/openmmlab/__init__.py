"""The training engine: MMEngine's Runner with our models, data, hooks and strategies (extra ``[mm]``).

Importing this package imports every module in it, which fills the registries of :mod:`visionssm.registry`. The folders
``detection`` and ``segmentation`` need MMDetection and MMSegmentation; configs of these tasks import them.
"""
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable


def _import_modules(package: str, path: Iterable[str]) -> None:
    """Import the public modules of a package, without its folders."""
    for module in sorted(pkgutil.iter_modules(path), key=lambda module: module.name):
        if not module.ispkg and not module.name.startswith('_'):
            importlib.import_module(f'{package}.{module.name}')


def _require(module: str, extra: str) -> None:
    """Raise an error that names the extra, where a package is missing."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f'{module} is not installed: pip install "visionssm[{extra}]" brings it, without a compiler')


_require('mmengine', 'mm')
_import_modules(__name__, __path__)
