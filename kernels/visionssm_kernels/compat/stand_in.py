"""Importable `mamba_ssm` and `causal_conv1d` for machines that have neither.

The modules come from an import finder that stands last in `sys.meta_path` and serves only packages that no other finder
knew when it was asked for: an installed package is never shadowed.
"""
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType

__all__ = ['StandIn', 'mamba_ssm']

_logger = logging.getLogger('visionssm')

# The releases whose interface is followed; the local part of the version keeps them apart from the real packages.
_VERSIONS = {'causal_conv1d': '1.5.0+visionssm', 'mamba_ssm': '2.2.4+visionssm'}

_Names = dict[str, tuple[str, ...]]
_ROOT = __package__.rpartition('.')[0]
_BLOCK, _DEFINITIONS, _NORM = (f'{__package__}.{name}' for name in ('mamba_simple', 'definitions', 'layer_norm'))
_CONV: _Names = {f'{_ROOT}.drop_in': ('causal_conv1d_fn', 'causal_conv1d_update')}
_SCAN: _Names = {f'{_ROOT}.drop_in': ('mamba_inner_fn', 'selective_scan_fn')}
_NORMS: _Names = {_NORM: ('RMSNorm', 'layer_norm_fn', 'rms_norm_fn')}

# Stand-in module -> {module of ours: names taken from it}. A name that is not here does not exist in the stand-in.
_CONTENTS: dict[str, _Names] = {
    'causal_conv1d': _CONV,
    'causal_conv1d.causal_conv1d_interface': {**_CONV, _DEFINITIONS: ('causal_conv1d_ref',)},
    'mamba_ssm': {**_SCAN, _BLOCK: ('Mamba',)},
    'mamba_ssm.modules': {},
    'mamba_ssm.modules.mamba_simple': {_BLOCK: ('Mamba',)},
    'mamba_ssm.ops': {},
    'mamba_ssm.ops.selective_scan_interface': {**_SCAN, _DEFINITIONS: ('mamba_inner_ref', 'selective_scan_ref')},
    'mamba_ssm.ops.triton': {},
    'mamba_ssm.ops.triton.layer_norm': _NORMS,
    'mamba_ssm.ops.triton.layernorm': _NORMS,
    'mamba_ssm.ops.triton.selective_state_update': {f'{_ROOT}.drop_in': ('selective_state_update',)},
}


def _missing_name(module: str) -> Callable[[str], None]:
    """The `__getattr__` of a stand-in module."""
    def __getattr__(name: str) -> None:
        raise AttributeError(
            f'the stand-in for {module!r} that visionssm_kernels.compat put in place has no {name!r}; it has '
            f'{sorted(sum(_CONTENTS[module].values(), ()))}. Install the real package for the rest')
    return __getattr__


class _Loader(importlib.abc.Loader):
    """Fills a stand-in module from the table."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave the making of the module object to the import system."""

    def exec_module(self, module: ModuleType) -> None:
        """Copy the names of the table into the module."""
        name = module.__name__
        # `from mamba_ssm import Missing` reports this path, which tells whose module it is.
        contents = {
            '__file__': __file__,
            '__version__': _VERSIONS[name.partition('.')[0]],
            '__doc__': f'Stand-in for {name}, made by visionssm_kernels.compat.',
            '__getattr__': _missing_name(name),
        }
        for source, names in _CONTENTS[name].items():
            origin = importlib.import_module(source)
            contents |= {attribute: getattr(origin, attribute) for attribute in names}
        vars(module).update(contents)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the stand-in modules of some packages, and nothing else."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = tuple(packages)
        self.handles = 0

    def find_spec(
            self,
            fullname: str,
            path: Sequence[str] | None = None,
            target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Spec of a stand-in module; None for every other module, which makes its import fail by name."""
        if fullname.partition('.')[0] not in self.packages:
            return None
        if fullname not in _CONTENTS:
            _logger.info('%s has no stand-in; install the real package where it is needed', fullname)
            return None
        is_package = any(name.startswith(f'{fullname}.') for name in _CONTENTS)
        return importlib.machinery.ModuleSpec(fullname, _Loader(), origin=__file__, is_package=is_package)


_active: _Finder | None = None


class StandIn:
    """Handle of one call of `mamba_ssm()`; also a context manager that undoes the call.

    Attributes:
        packages: Names of the packages that are stood in for; empty where all of them are installed.
    """

    def __init__(self, finder: _Finder) -> None:
        finder.handles += 1
        self.packages = finder.packages
        self._finder: _Finder | None = finder

    def remove(self) -> None:
        """Undo the call; the modules vanish with the last handle. Functions imported meanwhile go on working."""
        global _active
        finder, self._finder = self._finder, None
        if finder is None:
            return
        finder.handles -= 1
        if finder.handles:
            return
        _active = None
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition('.')[0] in finder.packages]:
            del sys.modules[name]

    def __enter__(self) -> 'StandIn':
        return self

    def __exit__(
            self,
            exc_type: type[BaseException] | None,
            exc: BaseException | None,
            traceback: TracebackType | None,
    ) -> None:
        self.remove()


def _is_present(package: str) -> bool:
    """Whether `package` is imported or importable; logs where it lies."""
    # A module without a spec, put there by hand, makes find_spec raise.
    if package in sys.modules:
        _logger.info('%s is imported already and stays as it is', package)
        return True
    spec = importlib.util.find_spec(package)
    if spec is None:
        return False
    _logger.info('%s is installed (%s) and stays as it is', package, spec.origin)
    return True


def mamba_ssm() -> StandIn:
    """Let other people's code import `mamba_ssm` and `causal_conv1d` where they are not installed.

    Their functions then run on our ops: `selective_scan_fn`, `mamba_inner_fn`, `causal_conv1d_fn`,
    `causal_conv1d_update`, `selective_state_update`, the `Mamba` block, `RMSNorm`, `layer_norm_fn` and `rms_norm_fn`.
    Any other name raises an error that says so. Call it before the code that needs them is imported:

        import visionssm_kernels
        visionssm_kernels.compat.mamba_ssm()
        import package_that_needs_mamba_ssm

    An installed or imported package is left alone, each of the two for itself. A second call changes nothing. The
    stand-ins answer `importlib.util.find_spec` and have a `__version__`, but they are not distributions, so
    `importlib.metadata.version('mamba_ssm')` still finds none.

    Returns:
        A handle whose `remove()` undoes this call; as a context manager it does so at the end of the block.
    """
    global _active
    if _active is None:
        _active = _Finder([package for package in _VERSIONS if not _is_present(package)])
        sys.meta_path.append(_active)
        if _active.packages:
            _logger.info('visionssm_kernels stands in for %s', ' and '.join(_active.packages))
    return StandIn(_active)
