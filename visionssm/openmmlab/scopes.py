"""The tasks that the tools serve: MMEngine scopes, the extras that bring them, and the numbers that sum up a run."""
import importlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry

from ..utils.paths import find_config
from ..utils.suggest import check_choice

__all__ = ['EXTRAS', 'ScopeError', 'explain_import_error', 'find_any_config', 'find_class', 'headlines', 'registries']

EXTRAS = {'mmdet': 'det', 'mmseg': 'seg'}
SCOPES = ('visionssm', *EXTRAS)
# MMEngine looks for what a config calls 'mmseg::' by the name of the distribution, which the maintained fork changed
MODULE2PACKAGE['mmseg'] = 'mmseg'


class ScopeError(ValueError):
    """A config whose task needs a package that is not installed."""


class Headline(NamedTuple):
    """A number that sums up an evaluation."""
    name: str
    """What the last lines of a tool call it."""
    scale: float = 1.0
    """What makes per cent of the metric; decibels stay as they are."""


# keys without their prefix; printed in this order, so the last one of a task is what other programs read
HEADLINES = {
    'top1': Headline('top-1'),
    'bbox_mAP': Headline('bbox AP', 100), 'segm_mAP': Headline('segm AP', 100), 'mAP': Headline('AP', 100),
    'mIoU': Headline('mIoU'), 'DSC': Headline('DSC'),
    'PSNR': Headline('PSNR'),
    'FID': Headline('FID'),
}


def headlines(metrics: Mapping[str, float]) -> dict[str, float]:
    """Picks the numbers that sum up an evaluation.

    Args:
        metrics: What the evaluator returned, as `coco/bbox_mAP` or `mIoU`.

    Returns:
        Name to value in per cent, such as `{'bbox AP': 41.2, 'segm AP': 37.5}`.
    """
    leaves = {key.rpartition('/')[2]: value for key, value in metrics.items()}
    # what stands in brackets says how a number was found, as in FID[vim_pico]
    return {line.name + leaf.removeprefix(key): float(line.scale * value) for key, line in HEADLINES.items()
            for leaf, value in leaves.items() if leaf.partition('[')[0] == key}


def check_installed(scope: str) -> None:
    """Raise an error that names the extra, where a config's scope is not installed.

    Args:
        scope: The config's `default_scope`.
    """
    check_choice('default_scope', scope, SCOPES)
    if scope in EXTRAS and importlib.util.find_spec(scope) is None:
        raise ScopeError(f'the config is one of {scope}, which is not installed: '
                         f'pip install "visionssm[{EXTRAS[scope]}]" brings it, without a compiler')


def explain_import_error(error: ImportError, path: str | Path) -> ScopeError:
    """Says what a config needs that could not be imported.

    Args:
        error: What reading the config raised.
        path: The config.

    Returns:
        The error to raise.
    """
    text = Path(path).read_text(encoding='utf-8', errors='replace')
    wanted = re.findall('mmdet|mmseg', f'{error} {text}')
    missing = [name for name in dict.fromkeys(wanted) if importlib.util.find_spec(name) is None]
    reasons = [str(error)] + ([str(error.__context__)] if error.__context__ else [])
    hint = ''.join(f'; {name} is not installed: pip install "visionssm[{EXTRAS[name]}]" brings it, without a compiler'
                   for name in missing)
    return ScopeError(f'{path} needs what cannot be imported: {": ".join(dict.fromkeys(reasons))}{hint}')


def find_any_config(name: str) -> Path:
    """Finds a config file: by path, by name among ours, or as `mmdet::FOLDER/NAME.py` among another package's.

    Args:
        name: What the command line names.

    Returns:
        The file.
    """
    package, marker, rest = name.partition('::')
    if not marker:
        return find_config(name)
    check_choice('the package of the config', package, EXTRAS)
    check_installed(package)
    spec = importlib.util.find_spec(package)
    root = Path(spec.origin).parent / '.mim' / 'configs'
    path = root / rest
    if not path.is_file():
        near = sorted(str(file.relative_to(root)) for file in root.glob(f'{Path(rest).parent}/*.py'))
        raise FileNotFoundError(f'{package} has no config {rest!r}'
                                + (f'; the folder has {", ".join(near[:40])}' if near else f'; see {root}'))
    return path


def registries(scope: str) -> dict[str, Registry]:
    """The registries of a scope.

    Args:
        scope: The config's `default_scope`.

    Returns:
        Name, such as `MODELS`, to registry.
    """
    check_installed(scope)
    module = importlib.import_module(f'{scope}.registry')
    return {name: value for name, value in vars(module).items() if isinstance(value, Registry) and name.isupper()}


def find_class(kind: Any, scope: str, registry: str) -> Any:
    """The class that a config's `type` means.

    Args:
        kind: A class, or its name, with or without a scope.
        scope: The config's `default_scope`.
        registry: Name of the registry, such as `DATASETS`.

    Returns:
        The class, or None if there is none of this name.
    """
    if not isinstance(kind, str):
        return kind
    home = registries(scope).get(registry)
    return home.get(kind) if home is not None else None
