"""Models of other tasks than classification: their registry, and the folders that fill it.

Such models do not obey timm's classifier contract, so they stand in a registry of their own: task, name, function. The
folder of a task, `visionssm.<task>`, stands above this one: it is looked up by name when somebody asks, and nothing
here imports it before.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType

from torch import nn

from visionssm.utils.suggest import did_you_mean

__all__ = ['TASKS', 'public_modules', 'register_task_model', 'task_models', 'task_modules']

TASKS = ('detection', 'diffusion', 'restoration', 'segmentation')
"""Tasks that have, or will have, a folder of their own."""

Entry = Callable[..., nn.Module]
_MODELS: dict[str, dict[str, Entry]] = {}


def public_modules(package: ModuleType) -> list[ModuleType]:
    """Import and return the modules of a package whose names have no leading underscore."""
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith('_'))
    return [importlib.import_module(f'{package.__name__}.{name}') for name in names]


def task_modules() -> list[ModuleType]:
    """Import and return the public modules of all folders of tasks."""
    names = [f'visionssm.{task}' for task in TASKS]
    folders = [importlib.import_module(name) for name in names if importlib.util.find_spec(name) is not None]
    return [module for folder in folders for module in public_modules(folder)]


def register_task_model(task: str) -> Callable[[Entry], Entry]:
    """Make a function known as the model of its name; for `visionssm.create_model` and `visionssm.list_models`.

    Args:
        task: One of `TASKS`.

    Returns:
        A decorator of functions (pretrained, checkpoint_path, pretrained_cfg, **kwargs) to a model.
    """
    if task not in TASKS:
        raise ValueError(f'Unknown task {task!r}. {did_you_mean(task, TASKS)}')

    def register(entry: Entry) -> Entry:
        _MODELS.setdefault(task, {})[entry.__name__] = entry
        return entry

    return register


def task_models() -> Mapping[str, Mapping[str, Entry]]:
    """Return the registered models: task to name to function."""
    task_modules()
    return _MODELS
