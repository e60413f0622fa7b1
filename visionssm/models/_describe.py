"""What a file of weights says about its model, so that it can be built again from the file alone."""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import is_model
from timm.models._hub import save_config_for_hf
from torch import nn

from ._official import families, find_official
from ._tasks import task_models

__all__ = ['CLASSIFICATION', 'family_of', 'task_of', 'timm_config']

CLASSIFICATION = 'classification'


def timm_config(
        model: nn.Module,
        classes: Sequence[str] = (),
        data_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of timm's `config.json` for a classifier.

    Args:
        model: A model of `timm.create_model`.
        classes: Names of the classes; left out where they are not as many as the model has.
        data_config: Preprocessing of the weights where it is not the model's own, as timm names it.

    Returns:
        Plain values: architecture, number of classes and of features, arguments, preprocessing.
    """
    labels = {'label_names': list(classes)} if classes and len(classes) == model.num_classes else {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / 'config.json'
        # weights come from the file itself, so no path of this machine belongs into the arguments
        save_config_for_hf(model, str(path), model_config=labels, data_config=dict(data_config or {}))
        return dict(json.loads(path.read_text(encoding='utf-8')))


def task_of(name: str) -> str | None:
    """Return the task of a registered name, without a tag; None for one that there is not."""
    found = next((task for task, names in task_models().items() if name in names), None)
    return found or (CLASSIFICATION if is_model(name) else None)


def family_of(model: nn.Module) -> str | None:
    """Return the family whose official names a model of ours has; None where it has no counterpart."""
    for part in (model, getattr(model, 'backbone', None)):
        declared = getattr(sys.modules.get(type(part).__module__), 'OFFICIAL', None)
        if declared is not None:
            return next((family for family in families() if find_official(family) is declared), None)
    return None
