"""Optimizers by name, with timm's rules for weight decay and layer-wise learning rates."""
import logging
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch.nn as nn
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from timm.models import group_parameters
from timm.optim import get_optimizer_class, list_optimizers
from timm.optim._param_groups import auto_group_layers

from ..models._official import translate_key
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from ..utils.suggest import did_you_mean
from .backbone import Backbone

_logger = logging.getLogger('visionssm')

PARAMWISE_KEYS = ('layer_decay', 'no_weight_decay', 'force_decay', 'min_lr_scale', 'decay_1d', 'custom_keys',
                  'official_names')


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Number the layer of each parameter, counted from the input.

    Args:
        model: A timm model; its ``group_matcher`` says what belongs together.

    Returns:
        Layer by name of the parameter.
    """
    if hasattr(model, 'group_matcher'):
        return group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return auto_group_layers(model)


class Role(NamedTuple):
    """What is known of a parameter beside its value."""
    label: str
    """The name that patterns are compared with."""
    below: int
    """Number of layers between it and the head."""
    exempt: bool
    """The model's ``no_weight_decay()`` names it."""


def parameter_roles(model: nn.Module, official_names: bool = False) -> dict[str, Role]:
    """Find out what each parameter of a classifier, a detector or a segmenter is.

    Args:
        model: A timm model, a model whose attribute ``model`` is one, or one that contains a :class:`Backbone`; all
            that stands beside the timm model then belongs to the head.
        official_names: Label the parameters of our models as their authors do.

    Returns:
        Role by name of the parameter. Labels have no ``model.`` of the wrappers: ``stages.0.blocks.0.norm1.weight`` in
        a classifier, ``backbone.stages.0.blocks.0.norm1.weight`` in a detector.
    """
    backbones = {path: module for path, module in model.named_modules() if isinstance(module, Backbone)}
    if not backbones:
        net = getattr(model, 'model', model)
        prefix = 'model.' if net is not model else ''
        table = _key_table(net, getattr(net, 'official_class', '') if official_names else '')
        roles = {prefix + name: role._replace(label=translate_key(role.label, table, reverse=True))
                 for name, role in _timm_roles(net)}
        return {name: roles.get(name) or Role(name, 0, False) for name, _ in model.named_parameters()}
    roles = {name: Role(name, 0, False) for name, _ in model.named_parameters()}
    for path, backbone in backbones.items():
        head = f'{path}.' if path else ''
        trunk = f'{backbone.trunk_name}.' if backbone.trunk_name else ''
        table = _key_table(backbone.trunk, getattr(backbone.model, 'official_class', '') if official_names else '')
        own = dict(_timm_roles(backbone.trunk))
        for name in [name for name in roles if name.startswith(f'{head}model.')]:
            inner = name.removeprefix(f'{head}model.')
            timm_name = inner.removeprefix(trunk)
            label = translate_key(inner, table, reverse=True) if table else timm_name
            role = own.get(timm_name) if inner.startswith(trunk) else None
            # the head is one layer more than the timm model has without its classifier
            roles[name] = Role(head + label, role.below + 1, role.exempt) if role else Role(head + label, 0, False)
    return roles


def _timm_roles(net: nn.Module) -> Iterator[tuple[str, Role]]:
    layers = layer_ids(net)
    depth = max(layers.values())
    exempt = net.no_weight_decay() if hasattr(net, 'no_weight_decay') else ()
    for name, layer in layers.items():
        yield name, Role(name, depth - layer, any(fnmatchcase(name, pattern) for pattern in exempt))


def _key_table(net: nn.Module, official_class: str) -> tuple[tuple[str, str], ...]:
    official = getattr(sys.modules[type(net).__module__], 'OFFICIAL', None)
    return official.keys(official_class) if official is not None and official_class else ()


def optimizer_class(name: str | type) -> type:
    """Find an optimizer among PyTorch's (``AdamW``) and timm's (``lamb``, ``adopt``, ``muon``, ...).

    Args:
        name: Its name, or the class itself.

    Returns:
        The class.
    """
    if not isinstance(name, str):
        return name
    found = OPTIMIZERS.get(name)
    if found is not None:
        return found
    if name.lower() in list_optimizers():
        return get_optimizer_class(name.lower(), bind_defaults=False)
    known = [key for registry in (OPTIMIZERS, OPTIMIZERS.parent) for key in registry.module_dict] + list_optimizers()
    raise ValueError(f'Unknown optimizer {name!r}. {did_you_mean(name, known)} '
                     "PyTorch's class names and timm.optim.list_optimizers() are known.")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimConstructor:
    """Build the optimizer with timm's parameter groups.

    Parameters of one dimension, and those that the model's ``no_weight_decay()`` names (state matrices, position
    embeddings), have no weight decay. With ``layer_decay`` the learning rate falls geometrically from the head to
    the input, by the layers of the model's ``group_matcher``. In detectors and segmenters this holds for the
    :class:`Backbone`; neck and heads are the last layer.

    The Swin recipe of most official detectors and segmenters, in which names alone decide, is
    ``dict(official_names=True, force_decay=['*'], custom_keys={'*norm*': dict(decay_mult=0.)})``.

    Args:
        optim_wrapper_cfg: ``optimizer`` (its ``type`` of PyTorch or timm) and arguments of the wrapper.
        paramwise_cfg: ``layer_decay`` (1.0), ``min_lr_scale`` (0.0), ``no_weight_decay`` (further name patterns),
            ``force_decay`` (name patterns that have weight decay although the model exempts them),
            ``decay_1d`` (False), ``custom_keys`` (name pattern -> dict(lr_mult=, decay_mult=)), ``official_names``
            (False; patterns see the names that the authors of a model give its parameters). Patterns are compared with
            the labels of :func:`parameter_roles`.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if 'optimizer' not in optim_wrapper_cfg:
            raise ValueError(f'optim_wrapper needs an optimizer, as in dict(optimizer=dict(type="AdamW", lr=1e-3)): '
                             f'got {dict(optim_wrapper_cfg)}')
        self.wrapper_cfg = dict(optim_wrapper_cfg)
        self.optimizer_cfg = dict(self.wrapper_cfg.pop('optimizer'))
        self.paramwise = dict(paramwise_cfg or {})
        for key in self.paramwise:
            if key not in PARAMWISE_KEYS:
                raise ValueError(f'paramwise_cfg has no key {key!r}. {did_you_mean(key, PARAMWISE_KEYS)} '
                                 f'It takes {", ".join(PARAMWISE_KEYS)}.')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the wrapped optimizer.

        Args:
            model: The model, wrapped for distributed training or not.

        Returns:
            The optimizer wrapper.
        """
        model = model.module if is_model_wrapper(model) else model
        cfg = dict(self.optimizer_cfg)
        build = optimizer_class(cfg.pop('type'))
        groups = self.param_groups(model, cfg.get('lr'), cfg.get('weight_decay', 0.0))
        _logger.info('%d parameter groups, %d of them without weight decay', len(groups),
                     sum(group['weight_decay'] == 0 for group in groups))
        optimizer = build(groups, **cfg)
        return OPTIM_WRAPPERS.build({'type': 'OptimWrapper', **self.wrapper_cfg}, default_args={'optimizer': optimizer})

    def param_groups(self, model: nn.Module, lr: float | None, weight_decay: float) -> list[dict]:
        """Split the trainable parameters by learning rate and weight decay.

        Args:
            model: The model.
            lr: Base learning rate; None (optimizers with a default of their own) allows no layer decay.
            weight_decay: Base weight decay.

        Returns:
            Groups with ``params``, ``weight_decay``, ``lr_scale`` and, unless ``lr`` is None, ``lr``.
        """
        decay, floor = self.paramwise.get('layer_decay', 1.0), self.paramwise.get('min_lr_scale', 0.0)
        if not 0 < decay <= 1:
            raise ValueError(f'layer_decay must be in (0, 1], got {decay}')
        custom = self.paramwise.get('custom_keys', {})
        if lr is None and (decay != 1.0 or custom):
            raise ValueError('layer_decay and custom_keys scale the learning rate: give optimizer.lr')
        roles = parameter_roles(model, self.paramwise.get('official_names', False))
        exempt, forced = self.paramwise.get('no_weight_decay', ()), self.paramwise.get('force_decay', ())

        groups: dict[tuple, dict] = {}
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            label, below, free = roles[name]
            scale = max(floor, decay ** below)
            flat = param.ndim <= 1 and not self.paramwise.get('decay_1d', False)
            free = free or flat or any(fnmatchcase(label, pattern) for pattern in exempt)
            free = free and not any(fnmatchcase(label, pattern) for pattern in forced)
            own_decay = 0.0 if free else weight_decay
            for pattern, mult in custom.items():
                if fnmatchcase(label, pattern):
                    scale, own_decay = scale * mult.get('lr_mult', 1.0), own_decay * mult.get('decay_mult', 1.0)
            group = groups.setdefault((scale, own_decay), {'params': [], 'weight_decay': own_decay, 'lr_scale': scale})
            group['params'].append(param)
        if lr is not None:
            for group in groups.values():
                group['lr'] = lr * group['lr_scale']
        return list(groups.values())
