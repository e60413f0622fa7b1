"""mmcv's operators without a compiler: a stand-in for ``mmcv._ext`` made of torchvision's operators.

A plain ``pip install onedl-mmcv`` brings mmcv without its compiled module, and ``import mmcv.ops`` fails. Importing
this module (``import visionssm.openmmlab`` does) puts a finder at the end of ``sys.meta_path``. It answers for the name
``mmcv._ext`` only, and Python asks it only after all others found nothing, so that a compiled module always wins.
mmcv, torchvision's operators and the stand-in are loaded when ``mmcv.ops`` is first imported, not before.
"""
import importlib
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

__all__ = ['EXTENSION', 'StandInFinder', 'install_finder', 'is_stand_in']

EXTENSION = 'mmcv._ext'
MISSING = (
    'mmcv.ops calls {name!r}, which visionssm does not supply: it has the operators of the models in MMDetection and '
    'MMSegmentation. Build the compiled ones: pip install "setuptools<81" ninja, then '
    'pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation --no-binary onedl-mmcv onedl-mmcv '
    '(needs a C++ compiler, and nvcc for tensors on a GPU)')


def _refuse(name: str) -> Callable[..., NoReturn]:
    """An operator that can be looked up, as `mmcv.utils.ext_loader.load_ext` does at import, and not called."""

    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(MISSING.format(name=name))

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


def _lookup(name: str) -> Callable[..., NoReturn]:
    """What the stand-in answers for names it does not define."""
    if name.startswith('_'):
        raise AttributeError(f'module {EXTENSION!r} has no attribute {name!r}')
    return _refuse(name)


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``mmcv._ext`` where nothing else does, and loads the stand-in."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        """Answer for one name.

        Args:
            fullname: Name of the module that is imported.
            path: Search path of its package; not used.
            target: Module that is reloaded; not used.

        Returns:
            The spec of the stand-in; none for other names.
        """
        return ModuleSpec(EXTENSION, self, origin=__name__) if fullname == EXTENSION else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make the empty module."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with the operators."""
        operators = importlib.import_module('._mmcv_ops', __package__)
        vars(module).update(operators.OPERATORS, __getattr__=_lookup, __doc__=__doc__)


def install_finder() -> None:
    """Put one finder at the end of ``sys.meta_path``; does nothing where there is one."""
    # By name, because a reloaded module has a new class.
    if all(type(finder).__qualname__ != StandInFinder.__qualname__ for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())


def is_stand_in() -> bool:
    """Whether ``mmcv.ops`` runs, or would run, on the stand-in and not on a compiled module."""
    module = importlib.import_module(EXTENSION)
    return getattr(module.__spec__, 'origin', None) == __name__


install_finder()
