"""What a checkpoint says about its model: name, arguments, preprocessing and class names."""
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from mmengine.config import Config
from timm.data import resolve_data_config

import visionssm

from ..checkpoints import CheckpointError, load_state_dict
from ..checkpoints.load import read_metadata
from ..models._detect import Unfilled, find_variant, fit_families, fit_ours
from ..utils.suggest import nearest
from .checkpoint import (
    SCHEME,
    is_training_checkpoint,
    load_any_state,
    read_training_checkpoint,
)
from .portable import read_config
from .scopes import EXTRAS

__all__ = ['DenseFacts', 'Facts', 'RestorerFacts', 'count_parameters', 'describe_checkpoint', 'describe_dense',
           'describe_restorer', 'find_restorer']

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
        if config.get('task') == 'restoration':
            raise CheckpointError(_not_a_classifier(path, 'a restoration model'))
        if 'scope' in config:
            raise CheckpointError(_not_a_classifier(path))
        if config.get('task') == 'diffusion':
            raise CheckpointError(_draws(path))
        lacking = [key for key in ('architecture', 'num_classes') if key not in config]
        if lacking:
            raise CheckpointError(f'{path} is of the task {config.get("task", "that it does not name")!r} and says no '
                                  f'{" and no ".join(lacking)}; the weights of a classifier are needed, as '
                                  'tools/train.py exports them')
        cfg = config.get('pretrained_cfg', {})
        arguments = {'num_classes': config['num_classes'], **config.get('model_args', {})}
        return {'name': config['architecture'], 'arguments': arguments, 'pretrained_cfg': cfg,
                'classes': config.get('label_names') or cfg.get('label_names') or ()}
    if not is_training_checkpoint(path):
        return {}
    meta = read_training_checkpoint(path)['meta']
    model = read_config(meta['cfg'], path).model
    if 'model' in model and str(model.model.get('name')).split('.')[0] in visionssm.list_models('restoration'):
        raise CheckpointError(_not_a_classifier(path, 'a restoration model'))
    if 'model' not in model:
        raise CheckpointError(_not_a_classifier(path))
    if str(model.model.get('name')).split('.')[0] in visionssm.list_models('diffusion'):
        raise CheckpointError(_draws(path))
    arguments = {key: value for key, value in model.model.items() if key not in ('name', 'pretrained')}
    preprocessor = model.get('data_preprocessor') or {}
    cfg = {key: tuple(preprocessor[key]) for key in ('mean', 'std') if preprocessor.get(key)}
    return {'name': model.model.name, 'arguments': arguments, 'pretrained_cfg': cfg,
            'classes': meta.get('dataset_meta', {}).get('classes') or ()}


def _safetensors_config(path: str) -> dict[str, Any]:
    """The config in a file's metadata, or in `config.json` beside it, or nothing."""
    config = json.loads(read_metadata(path).get('config', '{}'))
    if not config and Path(path).with_name('config.json').is_file():
        config = json.loads(Path(path).with_name('config.json').read_text(encoding='utf-8'))
    return config


def _not_a_classifier(path: str, kind: str = 'a detector or segmentor') -> str:
    return (f'{path} holds {kind}: evaluate it by tools/test.py CONFIG {path}, and predict with it by '
            f'tools/predict.py IMAGES --checkpoint {path}')


def _draws(path: str) -> str:
    return (f'{path} holds a model of the task diffusion, and the weights of a classifier are needed: draw with it by '
            f'tools/sample.py CONFIG {path}, and measure it by tools/test.py CONFIG {path} with the config of its '
            'training')


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


class RestorerFacts(NamedTuple):
    """What is known about a restoration model before it is built."""
    name: str
    """Registered name, with or without a tag."""
    checkpoint: str | None
    """File with the weights; None for published ones."""
    arguments: Mapping[str, Any] = {}
    """What the constructor needs beside the name."""


def describe_restorer(checkpoint: str | None, name: str | None = None) -> RestorerFacts | None:
    """Finds out whether a model, or what a weight file holds, restores images.

    Args:
        checkpoint: An export of `ImageRestorer`, a training checkpoint, a published file, or an address; None for
            published weights.
        name: Name of the model; None takes what the file says, or the model that its tensors fit.

    Returns:
        The facts; None for models of other tasks.
    """
    names = visionssm.list_models('restoration')
    architecture = (name or '').partition('.')[0]
    if name and architecture not in names:
        known = [*visionssm.list_models(), *timm.list_models()]
        if architecture not in known and nearest(architecture, known, 1)[:1] <= nearest(architecture, names, 1)[:1]:
            near = nearest(architecture, names)
            if near:
                raise ValueError(f'there is no model {name!r}. Did you mean {" or ".join(map(repr, near))}?')
        return None
    if checkpoint is not None and checkpoint.removeprefix(SCHEME).partition('.')[0] in names:
        return RestorerFacts(name or checkpoint.removeprefix(SCHEME), None)
    if checkpoint is None or '://' in checkpoint:
        return RestorerFacts(name, checkpoint) if name else None
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f'the checkpoint {checkpoint} does not exist')
    config = _safetensors_config(checkpoint) if checkpoint.endswith('.safetensors') else _training_config(checkpoint)
    stored = _stored_restorer(checkpoint, config)
    if name and stored is not None and stored.name.partition('.')[0] != architecture:
        raise CheckpointError(f'{checkpoint} holds {stored.name}, not {name}: leave out --model {name}, or give '
                              'another file')
    if name and stored is not None and '.' in name and '.' in stored.name and stored.name != name:
        logger.warning('%s says that it holds %s; it is used as %s', checkpoint, stored.name, name)
    if stored is not None:
        return stored._replace(name=name or stored.name)
    # trying all models takes seconds, so it is left to files that say nothing
    if name is None and not config:
        name = find_restorer(checkpoint)
        if name is not None:
            logger.info('%s does not say what it holds; its tensors are those of %s', checkpoint, name)
    return RestorerFacts(name, checkpoint) if name else None


def _training_config(path: str) -> Mapping[str, Any]:
    """The config in a training checkpoint, or nothing."""
    return read_config(read_training_checkpoint(path)['meta']['cfg'], path) if is_training_checkpoint(path) else {}


def _stored_restorer(path: str, config: Mapping[str, Any]) -> RestorerFacts | None:
    """The restoration model that the config in an export or a training checkpoint describes."""
    if path.endswith('.safetensors'):
        if config.get('task') != 'restoration':
            return None
        return RestorerFacts(config['architecture'], path, config.get('model_args') or {})
    model = dict(config.get('model', {}).get('model') or {})
    name = str(model.pop('name', ''))
    if name.partition('.')[0] not in visionssm.list_models('restoration'):
        return None
    return RestorerFacts(name, path, {key: value for key, value in model.items()
                                      if key not in ('pretrained', 'checkpoint_path')})


def count_parameters(name: str, **arguments: Any) -> int:
    """Count the parameters of a model without building it in memory.

    Args:
        name: Registered name.
        **arguments: Of `visionssm.create_model`.

    Returns:
        The number.
    """
    with Unfilled():
        return sum(weight.numel() for weight in visionssm.create_model(name, device='meta', **arguments).parameters())


def find_restorer(checkpoint: str) -> str | None:
    """Finds the restoration model whose tensors a weight file holds.

    Args:
        checkpoint: A weight file in our names or in those of the authors.

    Returns:
        The name of the model that fits, or None.
    """
    state = {key: value for key, value in load_any_state(checkpoint).items() if isinstance(value, torch.Tensor)}
    fit = next((fit for fit in fit_families(state) if not fit.gaps), None) or fit_ours(state)
    if fit is None or not type(fit.model).__module__.startswith('visionssm.restoration.'):
        return None
    variant = find_variant(fit)
    return None if variant.arguments else variant.name


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
