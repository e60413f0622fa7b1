"""Creation and listing of models of all tasks by name."""

import os
import sys
from typing import Any

import timm
from timm.models import list_models as list_registered
from timm.models import model_entrypoint
from torch import nn

from .checkpoints.load import check_fit, load_state_dict
from .utils.suggest import did_you_mean

__all__ = ['create_model', 'list_models']

# Models of other tasks than classification do not obey timm's classifier contract and have a registry of their own,
# task -> name -> function; classification is timm's registry.
_TASKS: dict[str, dict[str, Any]] = {}
_CLASSIFICATION = 'classification'
_PACKAGE = 'visionssm.models.'


def list_models(task: str | None = None) -> list[str]:
    """Return the names of the models of this package.

    Args:
        task: 'classification', or None for all tasks.

    Returns:
        Sorted names without weight tags.
    """
    tasks = {_CLASSIFICATION: _classifiers(), **_TASKS}
    if task is None:
        return sorted(name for names in tasks.values() for name in names)
    if task not in tasks:
        raise ValueError(f'Unknown task {task!r}. {did_you_mean(task, tasks)}')
    return sorted(tasks[task])


def create_model(
        name: str,
        pretrained: bool = False,
        checkpoint_path: str | os.PathLike | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Create a model by name; models of timm itself work too.

    Args:
        name: Name of a model, with or without a weight tag, such as 'vim_tiny' or 'vim_tiny.in1k'.
        pretrained: Load the weights that belong to the name.
        checkpoint_path: Load this file, classifier included: safetensors or torch.save, in our names or the official
            ones.
        **kwargs: Arguments of `timm.create_model` and of the model.

    Returns:
        The model.

    Raises:
        ValueError: There is no such model; the error names the nearest ones.
        CheckpointError: The file cannot be read or belongs to another model.
    """
    architecture = name.split('.', 1)[0]
    for names in _TASKS.values():
        if architecture in names:
            return names[architecture](pretrained=pretrained, checkpoint_path=checkpoint_path, **kwargs)
    if ':' not in name and not timm.is_model(architecture):
        candidates = [*list_models(), *list_registered()]
        raise ValueError(f'Unknown model {name!r}. {did_you_mean(architecture, candidates)}')
    if checkpoint_path is None or architecture not in list_models(_CLASSIFICATION):
        return timm.create_model(name, pretrained=pretrained, checkpoint_path=checkpoint_path, **kwargs)
    if kwargs.get('features_only'):
        # The whole model takes the weights before timm cuts off what the taps do not need.
        overlay = {**(kwargs.pop('pretrained_cfg_overlay', None) or {}), 'file': os.fspath(checkpoint_path)}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    state_dict = load_state_dict(checkpoint_path)
    model = timm.create_model(name, **kwargs)
    filter_fn = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    state_dict = filter_fn(state_dict, model) if filter_fn else state_dict
    # timm would drop a classifier of another size without a word; who names a file means all of it.
    check_fit(model, state_dict, f'The checkpoint {os.fspath(checkpoint_path)!r}')
    model.load_state_dict(state_dict)
    return model


def _classifiers() -> list[str]:
    return [name for name in list_registered() if model_entrypoint(name).__module__.startswith(_PACKAGE)]
