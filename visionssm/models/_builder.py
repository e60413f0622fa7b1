"""Model creation through timm, with checkpoints that timm's loader alone would refuse."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models import build_model_with_cfg, get_pretrained_cfg
from torch import nn

from visionssm.checkpoints.load import (
    CheckpointError,
    check_fit,
    compare_shapes,
    load_state_dict,
    safe_settings,
    unwrap,
)
from visionssm.utils.suggest import did_you_mean

from ._official import Official, translate_keys

__all__ = ['build_model', 'build_task_model', 'filter_official', 'load_file', 'load_official_keys']

Adapt = Callable[[dict[str, torch.Tensor], nn.Module], dict[str, torch.Tensor]]


def build_model(
        model_cls: type[nn.Module],
        variant: str,
        pretrained: bool,
        filter_fn: Adapt,
        default_taps: tuple[int, ...] = (0, 1, 2, 3),
        **kwargs: Any,
) -> nn.Module:
    """Build a model by its registered name, with NCHW feature maps and official weights understood.

    Args:
        model_cls: Class to build.
        variant: Registered name.
        pretrained: Load the weights that the configuration names.
        filter_fn: The family's `checkpoint_filter_fn`.
        default_taps: Feature levels of `features_only` where the caller names none.
        **kwargs: Arguments of the class and of `timm.create_model`.

    Returns:
        The model, or timm's feature wrapper around it.
    """
    overlay = dict(kwargs.pop('pretrained_cfg_overlay', None) or {})
    source = None
    if pretrained:
        cfg = _configuration(variant, kwargs.get('pretrained_cfg'))
        _check_source(variant, {**cfg, **overlay})
        source = _weight_file(cfg, overlay)
    if source:
        # Our reader takes the weights that the official evaluation uses and explains damaged files.
        overlay.update(state_dict=load_state_dict(source), file=None)
    with safe_settings():
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={'out_indices': default_taps, 'feature_cls': 'getter'},
            pretrained_cfg_overlay=overlay,
            **kwargs,
        )
    if source:
        _record_source(model, source)
    return model


def build_task_model(
        model_cls: type[nn.Module],
        variant: str,
        default_cfgs: Mapping[str, Any],
        filter_fn: Callable[..., dict[str, Any]],
        pretrained: bool = False,
        checkpoint_path: str | os.PathLike | None = None,
        pretrained_cfg: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Build a model of a task by its registered name.

    Args:
        model_cls: Class to build.
        variant: Registered name.
        default_cfgs: What `timm.models.generate_default_cfgs` returns for the file's models.
        filter_fn: The family's `checkpoint_filter_fn`.
        pretrained: Load the weights that the configuration names.
        checkpoint_path: Load this file instead.
        pretrained_cfg: Tag of the weights, or a whole configuration; the variant's first one when None.
        **kwargs: Arguments of the class.

    Returns:
        The model.
    """
    if kwargs.pop('features_only', False):
        raise ValueError(f'{variant} is no backbone: features_only is for the models of the task classification.')
    if pretrained_cfg is None or isinstance(pretrained_cfg, str):
        known = default_cfgs[variant]
        if pretrained_cfg and pretrained_cfg not in known.cfgs:
            raise ValueError(f'{variant} has no weights {pretrained_cfg!r}. '
                             f'{did_you_mean(pretrained_cfg, [tag for tag in known.cfgs if tag])}')
        tag = pretrained_cfg or known.tags[0]
        pretrained_cfg = {**known.cfgs[tag].to_dict(), 'architecture': variant, 'tag': tag}
    model = build_model(
        model_cls, variant, pretrained and checkpoint_path is None, filter_fn,
        pretrained_cfg=dict(pretrained_cfg), **kwargs)
    if checkpoint_path is not None:
        load_file(model, checkpoint_path)
    return model


def load_file(model: nn.Module, path: str | os.PathLike) -> None:
    """Load all weights of a file, classifier included, in our names or the official ones of the model's family.

    Args:
        model: A model whose file may define `checkpoint_filter_fn`.
        path: A safetensors file, or one written by `torch.save`.

    Raises:
        CheckpointError: The file cannot be read or belongs to another model.
    """
    state_dict = load_state_dict(path)
    filter_fn = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    state_dict = filter_fn(state_dict, model) if filter_fn else state_dict
    # timm would drop a classifier of another size without a word; who names a file means all of it.
    check_fit(model, state_dict, f'The checkpoint {os.fspath(path)!r}')
    model.load_state_dict(state_dict)


def filter_official(
        state_dict: Mapping[str, Any],
        model: nn.Module,
        official: Official,
        adapt: Adapt | None = None,
) -> dict[str, torch.Tensor]:
    """Turn a checkpoint into a state dict for `model`: unwrap, rename, adapt, and refuse a foreign one.

    Args:
        state_dict: A state dict in our names or the official ones, or a training checkpoint around one.
        model: The model that is to take it.
        official: The family's declaration.
        adapt: Changes that depend on the model, such as resizing of tables.

    Returns:
        A state dict in our names; one in our names already comes back with the same entries.

    Raises:
        CheckpointError: Keys or shapes belong to another model. The classifier is left out of this check, because
            timm drops it where the number of classes differs, and so are the channels of the first convolution.
    """
    state_dict = _rename(unwrap(state_dict), model, official)
    if adapt is not None:
        state_dict = adapt(state_dict, model)
    cfg = getattr(model, 'pretrained_cfg', {})
    free = tuple(f'{name}.' for name in _names(cfg.get('classifier')) + _names(cfg.get('first_conv')))
    compare_shapes(
        {key: tuple(value.shape) for key, value in model.state_dict().items() if not key.startswith(free)},
        {key: tuple(value.shape) for key, value in state_dict.items() if not key.startswith(free)},
        f"The checkpoint does not fit {cfg.get('architecture', type(model).__name__)}")
    return state_dict


def load_official_keys(state_dict: dict[str, Any], prefix: str, model: nn.Module, official: Official) -> None:
    """Rename official keys below `prefix` in place, so that a plain `load_state_dict` understands them.

    Meant for `_load_from_state_dict` of a model: weights then load whoever reads the file (timm's `checkpoint_path`,
    a training engine, the user).

    Args:
        state_dict: What `load_state_dict` hands down; a private copy.
        prefix: Path of the model inside the module that loads, with its dot.
        model: The model.
        official: The family's declaration.
    """
    own = {key[len(prefix):]: key for key in state_dict if key.startswith(prefix)}
    renamed = _rename({name: state_dict[key] for name, key in own.items()}, model, official)
    if renamed.keys() != own.keys():
        for key in own.values():
            del state_dict[key]
        state_dict.update({prefix + name: value for name, value in renamed.items()})


def _rename(state_dict: Mapping[str, Any], model: nn.Module, official: Official) -> dict[str, Any]:
    official_class = getattr(model, 'official_class', official.classes[0])
    derived = official.derived(model)
    return translate_keys(
        {key: value for key, value in official.settle(state_dict).items() if key not in derived},
        official.keys(official_class))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if not entry:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _configuration(variant: str, cfg: Any) -> Mapping[str, Any]:
    """Return the configuration of weights that timm would use, given as such, by its tag, or not at all."""
    if cfg is None or isinstance(cfg, str):
        cfg = get_pretrained_cfg(f'{variant}.{cfg}' if cfg else variant)
    return cfg if isinstance(cfg, Mapping) else vars(cfg) if cfg is not None else {}


def _check_source(variant: str, cfg: Mapping[str, Any]) -> None:
    """Raise where a configuration names no weights that can be fetched, and say where they are if it says so."""
    if any(cfg.get(source) for source in ('url', 'file', 'state_dict', 'hf_hub_id')):
        return
    name = f"{variant}.{cfg['tag']}" if cfg.get('tag') else variant
    about = f" ({cfg['description'].rstrip('.')})" if cfg.get('description') else ''
    raise CheckpointError(
        f'No weights of {name} can be fetched automatically{about}. Leave out pretrained=True, or give a file that '
        f'you have: visionssm.create_model({variant!r}, checkpoint_path=FILE).')


def _weight_file(cfg: Mapping[str, Any], overlay: Mapping[str, Any]) -> str | None:
    """Return the local file that timm would read, if it would read one."""
    if 'file' in overlay:
        return overlay['file']
    if overlay.get('state_dict') or cfg.get('source') == 'local-dir' or cfg.get('state_dict'):
        return None
    return cfg.get('file')


def _record_source(model: nn.Module, source: str) -> None:
    """Name the file instead of keeping its tensors alive in the configuration."""
    for holder in (model, getattr(model, 'model', None)):
        cfg = getattr(holder, 'pretrained_cfg', None)
        if isinstance(cfg, dict):
            cfg.pop('state_dict', None)
            cfg['file'] = source
