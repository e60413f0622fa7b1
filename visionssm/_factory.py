"""Creation and listing of models of all tasks by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import list_models as list_registered
from timm.models import model_entrypoint
from timm.models._hub import download_from_hf
from torch import nn

from .models._builder import load_file
from .models._tasks import task_models
from .utils.suggest import did_you_mean

__all__ = ['create_model', 'list_models']

_CLASSIFICATION = 'classification'
_PACKAGE = 'visionssm.models.'


def list_models(task: str | None = None) -> list[str]:
    """Return the names of the models of this package.

    Args:
        task: 'classification', 'segmentation', ..., or None for all tasks.

    Returns:
        Sorted names without weight tags.
    """
    tasks = {_CLASSIFICATION: _classifiers(), **task_models()}
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
        name: Name of a model, with or without a weight tag, such as 'vim_tiny' or 'vim_tiny.in1k'; or
            'local-dir:FOLDER' or 'hf-hub:OWNER/NAME' of `visionssm push`, for models of all tasks.
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
    shared = _find_shared(name)
    if shared is not None:
        config, weights = shared
        given = weights() if pretrained and checkpoint_path is None else checkpoint_path
        return create_model(config['architecture'], checkpoint_path=given, **{**config['model_args'], **kwargs})
    architecture, _, tag = name.partition('.')
    if ':' not in name and not timm.is_model(architecture):
        for names in task_models().values():
            if architecture in names:
                return names[architecture](
                    pretrained, checkpoint_path=checkpoint_path, **dict({'pretrained_cfg': tag or None}, **kwargs))
        candidates = [*list_models(), *list_registered()]
        hint = did_you_mean(architecture, candidates)
        raise ValueError(f'Unknown model {name!r}. {hint} `visionssm list` shows all.')
    if checkpoint_path is None or architecture not in list_models(_CLASSIFICATION):
        return timm.create_model(name, pretrained=pretrained, checkpoint_path=checkpoint_path, **kwargs)
    if kwargs.get('features_only'):
        # The whole model takes the weights before timm cuts off what the taps do not need.
        overlay = {**(kwargs.pop('pretrained_cfg_overlay', None) or {}), 'file': os.fspath(checkpoint_path)}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    model = timm.create_model(name, **kwargs)
    load_file(model, checkpoint_path)
    return model


def _find_shared(name: str) -> tuple[dict[str, Any], Callable[[], Path]] | None:
    """Return what a folder, or a repository of the hub, says of a model that timm does not know, and its weights."""
    source, _, place = name.partition(':')
    if source not in ('local-dir', 'hf-hub'):
        return None

    def find(file: str) -> Path:
        return Path(place, file) if source == 'local-dir' else Path(download_from_hf(place, file))

    path = find('config.json')
    if not path.is_file():
        raise FileNotFoundError(f'There is no file {str(path)!r}; visionssm push writes such a folder.')
    config = json.loads(path.read_text(encoding='utf-8'))
    if config.get('task') not in task_models():
        return None
    return {'model_args': {}, **config}, lambda: find('model.safetensors')


def _classifiers() -> list[str]:
    return [name for name in list_registered() if model_entrypoint(name).__module__.startswith(_PACKAGE)]
