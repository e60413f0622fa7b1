"""What a checkpoint says about its model: name, arguments, preprocessing and class names."""
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import timm
from mmengine.config import Config
from timm.data import resolve_data_config

from ..checkpoints import CheckpointError, load_state_dict
from .checkpoint import is_training_checkpoint, read_training_checkpoint
from .portable import read_config
from .scopes import EXTRAS

__all__ = ['DenseFacts', 'Facts', 'describe_checkpoint', 'describe_dense']

logger = logging.getLogger('visionssm')


class Facts(NamedTuple):
    """What is known about a model before it is built."""
    name: str | None
    """Registered name."""
    arguments: Mapping[str, Any] = {}
    """What the constructor needs: number of classes, channels, sizes."""
    pretrained_cfg: Mapping[str, Any] = {}
    """What differs from the model's own configuration, such as mean and deviation."""
    classes: tuple[str, ...] = ()
    """Class names in label order; none where the file does not say them."""

    def data_config(self, model_cfg: Mapping[str, Any]) -> dict[str, Any]:
        """The preprocessing.

        Args:
            model_cfg: Configuration of the model as it is registered.

        Returns:
            What `timm.data.create_transform` takes.
        """
        cfg = {**model_cfg, **self.pretrained_cfg}
        size = self.arguments.get('img_size', cfg['input_size'][1:])
        h, w = (size, size) if isinstance(size, int) else size
        channels = self.arguments.get('in_chans', cfg['input_size'][0])
        override: dict[str, Any] = {'input_size': (channels, h, w)}
        for key in ('mean', 'std'):
            if len(cfg[key]) != channels:
                override[key] = (sum(cfg[key]) / len(cfg[key]),)
        return resolve_data_config(override, pretrained_cfg=cfg)


def describe_checkpoint(checkpoint: str | None, name: str | None = None) -> Facts:
    """Reads what a weight file says about its model.

    Args:
        checkpoint: A file of any kind that `load_weights` takes, or an address; None for published weights.
        name: Name of the model, where it is known; it counts more than what the file says.

    Returns:
        The facts; for addresses and for None the name alone.
    """
    if checkpoint is None or '://' in checkpoint:
        return Facts(name)
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f'the checkpoint {checkpoint} does not exist')
    found = _read_description(checkpoint)
    if not found:
        known = name is not None and timm.is_model(name.split('.')[0])
        return Facts(name, _guess_arguments(str(name), checkpoint) if known else {})
    if name is not None and name.split('.')[0] != found['name'].split('.')[0]:
        logger.warning('%s names the model %s, loading it as %s', checkpoint, found['name'], name)
    return Facts(**{**found, 'name': name or found['name'], 'classes': tuple(found['classes'])})


def _read_description(path: str) -> dict[str, Any]:
    """What a checkpoint says about its model: `name`, `arguments`, `pretrained_cfg` and `classes`, or nothing."""
    if path.endswith('.safetensors'):
        config = _safetensors_config(path)
        if not config:
            return {}
        if 'scope' in config:
            raise CheckpointError(_not_a_classifier(path))
        cfg = config.get('pretrained_cfg', {})
        arguments = {'num_classes': config['num_classes'], **config.get('model_args', {})}
        return {'name': config['architecture'], 'arguments': arguments, 'pretrained_cfg': cfg,
                'classes': config.get('label_names') or cfg.get('label_names') or ()}
    if not is_training_checkpoint(path):
        return {}
    meta = read_training_checkpoint(path)['meta']
    model = read_config(meta['cfg'], path).model
    if 'model' not in model:
        raise CheckpointError(_not_a_classifier(path))
    arguments = {key: value for key, value in model.model.items() if key not in ('name', 'pretrained')}
    preprocessor = model.get('data_preprocessor') or {}
    cfg = {key: tuple(preprocessor[key]) for key in ('mean', 'std') if preprocessor.get(key)}
    return {'name': model.model.name, 'arguments': arguments, 'pretrained_cfg': cfg,
            'classes': meta.get('dataset_meta', {}).get('classes') or ()}


def _safetensors_config(path: str) -> dict[str, Any]:
    """The config in a file's metadata, or in `config.json` beside it, or nothing."""
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from error
    config = json.loads(metadata.get('config', '{}'))
    if not config and Path(path).with_name('config.json').is_file():
        config = json.loads(Path(path).with_name('config.json').read_text())
    return config


def _not_a_classifier(path: str) -> str:
    return (f'{path} holds a detector or segmentor: evaluate it by tools/test.py CONFIG {path}, and predict with it by '
            f'tools/predict.py IMAGES --checkpoint {path}')


class DenseFacts(NamedTuple):
    """What a checkpoint says about a detector or segmentor."""
    cfg: Config | None = None
    """Config of the model and its preprocessing."""
    dataset_meta: Mapping[str, Any] = {}
    """``classes`` and ``palette`` of the data; nothing where the file does not say them."""


def describe_dense(checkpoint: str | None) -> DenseFacts:
    """Reads what a weight file says about the detector or segmentor that it holds; no code in it runs.

    Args:
        checkpoint: An export of ours, or a training checkpoint, ours or OpenMMLab's; None or an address says nothing.

    Returns:
        The facts; `cfg` is None for classifiers and for files without a config.
    """
    if checkpoint is None or '://' in checkpoint:
        return DenseFacts()
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f'the checkpoint {checkpoint} does not exist')
    if checkpoint.endswith('.safetensors'):
        config = _safetensors_config(checkpoint)
        text, meta = config.get('cfg') if 'scope' in config else None, config
    else:
        meta = read_training_checkpoint(checkpoint).get('meta') or {}
        text = meta.get('cfg') or meta.get('config')
        # older files of OpenMMLab write the names in capitals, and beside the data's other facts
        meta = {key.lower(): value for key, value in {**meta, **(meta.get('dataset_meta') or {})}.items()}
    known = {key: meta[key] for key in ('classes', 'palette') if meta.get(key)}
    cfg = read_config(text, checkpoint) if isinstance(text, str) else None
    return DenseFacts(cfg if cfg is not None and cfg.get('default_scope') in EXTRAS else None, known)


def _guess_arguments(name: str, path: str) -> dict[str, Any]:
    """Number of classes and channels from the shapes in a bare weight file, by the names that timm gives these."""
    cfg = timm.get_pretrained_cfg(name)
    state = load_state_dict(path)
    arguments = {}
    for argument, module, axis in (('num_classes', cfg.classifier, 0), ('in_chans', cfg.first_conv, 1)):
        weight = state.get(f'{module}.weight')
        if weight is not None and weight.ndim > axis:
            arguments[argument] = weight.shape[axis]
    return arguments
