"""Trained detectors and segmentors in one file: weights with the config that rebuilds the model.

The config is the text that MMEngine writes into checkpoints too. It is read as data: nothing in it runs, and every
`type` must be the name of a registered class, because other names would be imported when the model is built.
"""
import ast
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from ..checkpoints import CheckpointError, save_safetensors
from ..utils.files import atomic_write
from .scopes import SCOPES

__all__ = ['export_dense', 'read_config']

NAME = re.compile(rf'(?:(?:{"|".join(SCOPES)}|mmengine|mmcv)\.)?\w+')
# what a model needs to predict; the rest of a config says how it was trained
KEPT = ('default_scope', 'custom_imports', 'data_preprocessor', 'model', 'test_dataloader', 'test_pipeline',
        'tta_model', 'tta_pipeline')


def read_config(text: str, source: str | Path) -> Config:
    """Reads the text of a config as data.

    Args:
        text: What `Config.pretty_text` gave.
        source: The file that it comes from, for the error.

    Returns:
        The parts of the config that rebuild the model and its preprocessing.
    """
    try:
        values = {node.targets[0].id: _value(node.value) for node in ast.parse(text).body
                  if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                  and node.targets[0].id in KEPT}
    except (SyntaxError, ValueError, TypeError) as error:
        raise CheckpointError(f'{source}: the config in it is no plain data ({error}); give one by --config') from error
    imports = values.pop('custom_imports', None) or {}
    foreign = [name for name in imports.get('imports', ()) if name.partition('.')[0] != 'visionssm']
    types = [kind for kind in _types(values) if not NAME.fullmatch(kind)]
    for what in [*(f'the type {kind!r}, which is no registered class' for kind in types),
                 *(f'the import {name!r}' for name in foreign)]:
        raise CheckpointError(f'{source}: the config in it names {what}; give the config by --config if you trust it')
    return Config({**values, **({'custom_imports': imports} if imports else {})})


def _value(node: ast.AST) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.List | ast.Tuple):
        items = [_value(item) for item in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    if isinstance(node, ast.Name) and node.id in ('inf', 'nan'):
        return math.inf if node.id == 'inf' else math.nan
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    return ast.literal_eval(node)


def _types(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [kind for item in value for kind in _types(item)]
    if not isinstance(value, Mapping):
        return []
    own = [value['type']] if isinstance(value.get('type'), str) else []
    return own + [kind for item in value.values() for kind in _types(item)]


def export_dense(
        state: Mapping[str, torch.Tensor],
        folder: str | Path,
        cfg: Config,
        dataset_meta: Mapping[str, Any],
        notes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``model.safetensors`` and ``config.json``, from which ``tools/predict.py`` rebuilds the model.

    Args:
        state: The model's state dict, averaged where training averages.
        folder: Where to write.
        cfg: Config of the run.
        dataset_meta: ``classes`` and ``palette`` of the data.
        notes: Plain values about the training, kept in the file's metadata.

    Returns:
        The path of the weights.
    """
    text = Config({key: cfg[key] for key in KEPT if cfg.get(key) is not None}).pretty_text
    palette = [list(map(int, color)) for color in dataset_meta.get('palette') or () if not isinstance(color, str)]
    config = {'scope': cfg.default_scope, 'classes': list(dataset_meta.get('classes') or ()), 'palette': palette,
              'cfg': text}
    metadata = {'config': json.dumps(config), 'notes': json.dumps(dict(notes or {}))}
    target = save_safetensors(state, Path(folder) / 'model.safetensors', metadata)
    atomic_write(json.dumps(config, indent=2).encode(), Path(folder) / 'config.json')
    return Path(target)
