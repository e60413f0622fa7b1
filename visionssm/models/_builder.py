"""Model creation through timm, with checkpoints that timm's loader alone would refuse."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from timm.models import build_model_with_cfg, get_pretrained_cfg
from torch import nn

from visionssm.checkpoints.catalogue import find_entry
from visionssm.checkpoints.converted import load_pretrained
from visionssm.checkpoints.download import fetch
from visionssm.checkpoints.load import (
    CheckpointError,
    check_fit,
    compare_shapes,
    load_state_dict,
    safe_settings,
    unwrap,
)
from visionssm.utils.suggest import did_you_mean

from ._official import Official, rename_from_official, translate_keys

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
    source = state_dict = None
    if pretrained:
        cfg = _configuration(variant, kwargs.get('pretrained_cfg'))
        source = _weight_file(cfg, overlay)
        state_dict = load_state_dict(source) if source else _fetch(variant, cfg, overlay, kwargs.get('cache_dir'))
        if state_dict is not None:
            # Our reader takes the weights that the official evaluation uses and explains damaged files.
            overlay.update(state_dict=state_dict, file=None)
    # timm reads the file itself
    with safe_settings() if pretrained and state_dict is None else nullcontext():
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={'out_indices': default_taps, 'feature_cls': 'getter'},
            pretrained_cfg_overlay=overlay,
            **kwargs,
        )
    if pretrained and state_dict is not None:
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


def _fetch(
        variant: str,
        cfg: Mapping[str, Any],
        overlay: Mapping[str, Any],
        cache_dir: str | os.PathLike | None,
) -> dict[str, torch.Tensor] | None:
    """Return the weights of the catalogue, or of an address that stands in none; None where timm is to find them.

    Raises:
        CheckpointError: No weights can be fetched; the error says where they are if that is known.
    """
    given = {**cfg, **overlay}
    if given.get('state_dict') or given.get('source') in ('hf-hub', 'local-dir') or overlay.get('hf_hub_id'):
        return None
    if overlay.get('url'):
        return load_state_dict(fetch(overlay['url'], cache_dir).path)
    name = f"{variant}.{given['tag']}" if given.get('tag') else variant
    try:
        entry = find_entry(name)
    except ValueError:
        entry = None  # a configuration of the caller's own, or a model without weights
    if entry is not None and entry.model == variant:
        return load_pretrained(entry, lambda weights: _convert(entry.family, weights), cache_dir)
    if given.get('hf_hub_id'):
        return None
    if given.get('url'):
        return load_state_dict(fetch(given['url'], cache_dir).path)
    about = f" ({given['description'].rstrip('.')})" if given.get('description') else ''
    raise CheckpointError(
        f'No weights of {name} can be fetched automatically{about}. Leave out pretrained=True, or give a file that '
        f'you have: visionssm.create_model({variant!r}, checkpoint_path=FILE).')


def _convert(family: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return official weights in our names, whatever device, data type and random state the caller works with."""
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device('cpu'), torch.no_grad():
        torch.set_default_dtype(torch.float32)
        try:
            return rename_from_official(family, state_dict)
        finally:
            torch.set_default_dtype(default)


def _weight_file(cfg: Mapping[str, Any], overlay: Mapping[str, Any]) -> str | None:
    """Return the local file that timm would read, if it would read one."""
    if 'file' in overlay:
        return overlay['file']
    if overlay.get('state_dict') or cfg.get('source') == 'local-dir' or cfg.get('state_dict'):
        return None
    return cfg.get('file')


def _record_source(model: nn.Module, source: str | None) -> None:
    """Name the file, if the caller gave one, instead of keeping its tensors alive in the configuration."""
    for holder in (model, getattr(model, 'model', None)):
        cfg = getattr(holder, 'pretrained_cfg', None)
        if isinstance(cfg, dict):
            cfg.pop('state_dict', None)
            if source is not None:
                cfg['file'] = source
