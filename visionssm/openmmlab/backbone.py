"""Any model of timm's registry as the backbone of MMDetection's and MMSegmentation's models."""
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn as nn
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit
from timm.layers import BatchNormAct2d, LayerNorm2d, SyncBatchNormAct, convert_sync_batchnorm
from timm.models import group_parameters, model_entrypoint
from timm.models._hub import download_cached_file, load_model_config_from_hf, load_model_config_from_path
from torch.nn.modules.batchnorm import _BatchNorm

import visionssm  # noqa: F401  (puts our models into timm's registry)

from ..checkpoints import CheckpointError, load_state_dict
from ..checkpoints.load import compare_shapes
from ..checkpoints.training import mmengine_values
from ..models._builder import load_official_keys
from ..registry import MODELS
from ..utils.suggest import list_names
from .checkpoint import SCHEME, load_from_visionssm
from .classifier import create_timm_model


@MODELS.register_module()
class Backbone(BaseModule):
    """Any model of timm's registry, ours or timm's: images to a tuple of NCHW maps.

    A model of ours says itself, by its method ``dense``, what its official dense backbone looks like: the norms behind
    the taps, the names of the weights, Vim's pyramids. Any other model works through timm's ``features_only``. Official
    weights of whole detectors and segmenters (``backbone.*`` in the authors' names) load by ``load_state_dict``.

    Args:
        name: A name of timm's registry, with or without the tag of its weights; or ``local-dir:FOLDER`` (such as the
            ``best`` of a training here) or ``hf-hub:NAME``.
        out_indices: Maps to return; None for those that the model has.
        pretrained: Load the weights that belong to the name.
        drop_path_rate: Stochastic depth of the last block; the model's own when None.
        frozen_stages: -1 trains everything, 0 freezes the stem, k also the first k stages.
        norm_eval: Keep BatchNorm in evaluation mode.
        with_cp: Recompute blocks in the backward pass to save memory.
        out_norms: Normalise the maps, or not; as the official dense backbone of the family does when None.
        pyramid: For models without stages: ``dict(type='simple', out_channels=256)`` as in Vim's official detection,
            ``dict(type='plain')`` as in its segmentation.
        in_chans: Channels of the images.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` with a file or an address (``visionssm://NAME`` too) of
            classification weights, ours, the authors' or timm's; with ``prefix='backbone.'`` of a whole detector or
            segmenter.
        **kwargs: Arguments of the model.
    """

    # what a config says beside the arguments below is for the model, which refuses what it does not know
    passes_arguments_on = True

    def __init__(
            self,
            name: str,
            out_indices: Sequence[int] | None = None,
            pretrained: bool = False,
            drop_path_rate: float | None = None,
            frozen_stages: int = -1,
            norm_eval: bool = False,
            with_cp: bool = False,
            out_norms: bool | None = None,
            pyramid: dict | None = None,
            in_chans: int = 3,
            init_cfg: dict | None = None,
            **kwargs: Any,
    ) -> None:
        super().__init__(init_cfg=_check_init_cfg(init_cfg))
        self.name = name
        self.norm_eval = norm_eval
        rate = {} if drop_path_rate is None else {'drop_path_rate': drop_path_rate}
        self._options = {'in_chans': in_chans, **rate, **kwargs}
        self._dense_options: dict[str, Any] = {'out_indices': out_indices, 'out_norms': out_norms, 'pyramid': pyramid}
        self.model, self.trunk_name = self._build(pretrained)
        info = self.model.feature_info
        info = info if isinstance(info, list) else info.get_dicts()
        self.out_channels: list[int] = [entry['num_chs'] for entry in info]
        self.strides: list[int] = [entry['reduction'] for entry in info]
        own_norms = out_norms and self.trunk_name != 'backbone'
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in self.out_channels) if own_norms else None
        if with_cp:
            self._recompute_blocks()
        plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        self._special_norms = {path: module for path, module in self.named_modules()
                               if isinstance(module, _BatchNorm) and type(module) not in plain}
        self._frozen = self._freeze(frozen_stages)
        self.train(self.training)

    @property
    def trunk(self) -> nn.Module:
        """The timm model inside."""
        return getattr(self.model, self.trunk_name) if self.trunk_name else self.model

    def _build(self, pretrained: bool) -> tuple[nn.Module, str]:
        """Return the model, and the name of its part that is the timm model."""
        if _has_dense(self.name):
            net = create_timm_model(self.name, pretrained=pretrained, num_classes=0, **self._options)
            return net.dense(**self._dense_options), 'backbone'
        if self._dense_options['pyramid'] is not None:
            raise ValueError(f"pyramid is {self._dense_options['pyramid']}; {self.name} offers none: put a neck of "
                             'MMDetection or MMSegmentation behind it.')
        indices = self._dense_options['out_indices']
        options = {'pretrained': pretrained, 'features_only': True, **self._options}
        if indices is not None:
            options['out_indices'] = tuple(indices)
        try:
            net = create_timm_model(self.name, feature_cls='getter', **options)
            if not hasattr(getattr(net, 'model', None), 'forward_intermediates'):
                return create_timm_model(self.name, **options), ''
        except (AssertionError, IndexError, RuntimeError) as error:
            maps = list(range(len(create_timm_model(self.name, **self._options).feature_info)))
            raise ValueError(f'{self.name} cannot return the maps out_indices={indices}, it has {maps}: '
                             f'{error}') from error
        return net, 'model'

    def _recompute_blocks(self) -> None:
        try:
            self.trunk.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ValueError(f'with_cp is True; {self.name} cannot recompute its blocks: leave it out.') from error

    def _freeze(self, stages: int) -> list[str]:
        """Freeze the stem and the first stages, and return the names of the modules that stay in evaluation mode."""
        if stages < 0:
            return []
        trunk = self.trunk
        if not hasattr(trunk, 'group_matcher'):
            raise ValueError(f'frozen_stages is {stages}; {self.name} does not tell its stages: use -1.')
        if stages > 0 and len({entry['reduction'] for entry in trunk.feature_info}) == 1:
            raise ValueError(f'frozen_stages is {stages}; {self.name} has no stages: only -1 and 0, the embedding.')
        layers = group_parameters(trunk, trunk.group_matcher(coarse=True), reverse=True)
        if stages > max(layers.values()):
            raise ValueError(f'frozen_stages is {stages}; {self.name} has {max(layers.values())} stages.')
        norms = list(getattr(self.model, 'out_norms', self.norms) or ())
        frozen = {id(p) for norm in norms[:stages] for p in norm.parameters()}
        frozen |= {id(p) for name, p in trunk.named_parameters() if layers[name] <= stages}
        for param in self.parameters():
            if id(param) in frozen:
                param.requires_grad_(False)
        whole = []
        for name, module in self.named_modules():
            ids = {id(p) for p in module.parameters()}
            if ids and ids <= frozen:
                whole.append(name)
        return whole

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a module. MMEngine's ``sync_bn`` adds the model anew, with PyTorch's kind in place of every BatchNorm:
        those that do more than normalise, such as timm's with an activation inside, are then mended.

        Args:
            name: Its name.
            module: The module.
        """
        super().add_module(name, module)
        for path, own in self.__dict__.get('_special_norms', {}).items():
            new = self.get_submodule(path)
            if new is own or isinstance(new, SyncBatchNormAct):
                continue
            for key in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
                setattr(own, key, getattr(new, key))
            own.train(new.training)
            synchronised = isinstance(new, nn.SyncBatchNorm)
            if synchronised and isinstance(own, BatchNormAct2d):
                own = convert_sync_batchnorm(own)
            elif synchronised:
                print_log(f'{self.name}: {path} cannot be synchronised and stays as it is', logger='current')
            parent, _, leaf = path.rpartition('.')
            setattr(self.get_submodule(parent), leaf, own)

    def train(self, mode: bool = True) -> 'Backbone':
        """Switch the mode; frozen stages, and BatchNorm with ``norm_eval``, stay in evaluation mode.

        Args:
            mode: Whether to train.

        Returns:
            The backbone.
        """
        super().train(mode)
        if mode:
            for name in self._frozen:
                self.get_submodule(name).eval()
            for module in self.modules():
                if self.norm_eval and isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map images to features.

        Args:
            x: Images (B, in_chans, H, W).

        Returns:
            One map (B, C, H', W') for each of ``out_channels``.
        """
        maps = self.model(x)
        if not self.trunk_name and getattr(self.model, 'output_fmt', None) == 'NHWC':
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        if self.norms is not None:
            maps = [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
        return tuple(maps)

    def get_layer_depth(self, param_name: str, prefix: str = 'backbone.') -> tuple[int, int]:
        """Layer of a parameter, as mmpretrain's layer-decay constructor asks for it.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: Path of this module in the whole model, with its dot.

        Returns:
            The layer's number, counted from the input, and the number of layers; the last layer is the head.
        """
        from .optim import parameter_roles
        roles = parameter_roles(self)
        depth = max(role.below for role in roles.values())
        role = roles.get(param_name.removeprefix(prefix)) if param_name.startswith(prefix) else None
        return depth - (role.below if role else 0), depth + 1

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names. Nothing else happens: timm initialised the model when it was built."""
        if self.init_cfg and not self._is_init:
            self._load(self.init_cfg['checkpoint'], self.init_cfg.get('prefix'))
        self._is_init = True

    def _load(self, source: str, prefix: str | None) -> None:
        state = _read(source)
        if prefix:
            prefix = f"{prefix.removesuffix('.')}."
            found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if not found:
                raise CheckpointError(f'The checkpoint {source!r} has no keys that start with {prefix!r}, its keys are '
                                      f'{list_names(sorted(state))}; mend init_cfg.prefix.')
            state = found
        if not self._load_dense(state, source):
            self._load_classifier(state, source)

    def _load_dense(self, state: Mapping[str, torch.Tensor], source: str) -> bool:
        """Load weights that fit this backbone as it stands; return whether they did."""
        own = self.state_dict()
        state = dict(state)
        self._rename(state, '')
        official = getattr(sys.modules[type(self.trunk).__module__], 'OFFICIAL', None)
        if official is not None and getattr(self.model, 'official_class', None):
            load_official_keys(state, 'model.', self.model, official)
        trunk = f'model.{self.trunk_name}.' if self.trunk_name else 'model.'
        if any(key not in state or state[key].shape != own[key].shape for key in own if key.startswith(trunk)):
            return False
        heads = tuple(f'{trunk}{name}' for name in ('norm.', 'head.', 'fc.', *self._classifier_names()))
        foreign = [key for key in state if key.startswith(trunk) and key not in own and not key.startswith(heads)]
        if foreign:
            raise CheckpointError(f'The checkpoint {source!r} belongs to another model than {self.name}, it also has '
                                  f'{list_names(foreign)}.')
        self._take({key: value for key, value in state.items() if key in own}, source)
        return True

    def _load_classifier(self, state: Mapping[str, torch.Tensor], source: str) -> None:
        """Load weights of the whole timm model."""
        options = {'num_classes': 0, **self._options}
        net = create_timm_model(self.name, **options)
        names = net.state_dict()
        if not names.keys() & state.keys() and any(key.startswith('model.') for key in state):
            state = {key.removeprefix('model.'): value for key, value in state.items() if key.startswith('model.')}
        rename = getattr(sys.modules[type(net).__module__], 'checkpoint_filter_fn', None)
        if rename is not None and any(key not in names or value.shape != names[key].shape
                                      for key, value in state.items()):
            state = rename(state, net)
        heads = tuple(self._classifier_names())
        used = {key for key in names if not key.startswith(('norm.', 'head.', *heads))}
        shapes = {key: tuple(value.shape) for key, value in state.items()
                  if isinstance(value, torch.Tensor) and not key.startswith(('norm.', 'head.', *heads))}
        compare_shapes({key: tuple(names[key].shape) for key in used}, shapes,
                       f'The checkpoint {source!r} does not fit the backbone {self.name}')
        net.load_state_dict({key: value for key, value in state.items() if key in names
                             and value.shape == names[key].shape}, strict=False)
        if hasattr(net, 'dense'):
            prefix, net = 'model.', net.dense(**self._dense_options)
        else:
            prefix = f'model.{self.trunk_name}.' if self.trunk_name else 'model.'
        trunk = f'model.{self.trunk_name}.' if self.trunk_name else prefix
        new = {prefix + key: value for key, value in net.state_dict().items()}
        self._take({key: value for key, value in new.items() if key.startswith(trunk)}, source)

    def _take(self, state: dict[str, torch.Tensor], source: str) -> None:
        own = self.state_dict()
        rest = [key.removeprefix('model.') for key in own if key not in state]
        self.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
        print_log(f'{self.name}: loaded {len(own) - len(rest)} entries of {source}'
                  + (f'; not in it and new: {list_names(rest, 12)}' if rest else ''), logger='current')

    def _classifier_names(self) -> list[str]:
        names = (getattr(self.trunk, 'pretrained_cfg', None) or {}).get('classifier') or ()
        return [f'{name}.' for name in ((names,) if isinstance(names, str) else names)]

    def _rename(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Put keys that name the model's own parts where the model is."""
        place = 'model.model.' if self.trunk_name == 'model' else 'model.'
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if not name.startswith(('model.', 'norms.')):
                state_dict[f'{prefix}{place}{name}'] = state_dict.pop(key)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._rename(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_init_cfg(init_cfg: dict | list | None) -> dict | None:
    if isinstance(init_cfg, list | tuple) and len(init_cfg) == 1:
        init_cfg = init_cfg[0]
    if not init_cfg:
        return None
    if not isinstance(init_cfg, dict) or init_cfg.get('type') not in ('Pretrained', PretrainedInit) \
            or 'checkpoint' not in init_cfg:
        raise ValueError(f'init_cfg is {init_cfg}; it must be dict(type="Pretrained", checkpoint=...) or None, because '
                         'timm initialises the model itself.')
    return init_cfg


def _has_dense(name: str) -> bool:
    """Return whether the models of a name say themselves what they look like in dense prediction."""
    source, _, place = name.partition(':')
    if place:
        name = (load_model_config_from_hf if source == 'hf-hub' else load_model_config_from_path)(place)[1]
    if not timm.is_model(name.split('.')[0]):
        return False  # the error for unknown names comes from create_timm_model
    module = sys.modules[model_entrypoint(name.split('.')[0]).__module__]
    return any(hasattr(value, 'dense') for value in vars(module).values() if inspect.isclass(value))


def _read(source: str) -> dict[str, torch.Tensor]:
    if source.startswith(SCHEME):
        return dict(load_from_visionssm(source)['state_dict'])
    if source.startswith(('http://', 'https://')):
        source = download_cached_file(source)
    with mmengine_values():
        return load_state_dict(source)
