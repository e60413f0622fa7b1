"""Checking a config before anything is built: every key must mean something to what reads it."""
import difflib
import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.runner import IterBasedTrainLoop, TestLoop, ValLoop
from mmengine.runner import Runner as _Runner
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

from ..registry import OPTIM_WRAPPERS
from ..utils.suggest import did_you_mean, nearest
from .loops import ResumableEpochLoop
from .optim import optimizer_class
from .runner import OWN_HOOKS
from .scopes import SCOPES, registries

__all__ = ['ConfigError', 'accepted_arguments', 'check_config', 'check_overrides', 'optimizer_sections']

EXTRA_TOP_KEYS = {'activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval',
                  'find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'sync_bn', 'tta_model', 'tta_pipeline'}
LOADER_KEYS = {'dataset', 'sampler', 'batch_sampler', 'collate_fn', 'worker_init_fn', 'num_batch_per_epoch',
               'disable_subprocess_warning'}
PLAIN_KEYS = {
    'auto_scale_lr': {'enable', 'base_batch_size'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'randomness': {'seed', 'diff_rank_seed', 'deterministic'},
}
# where a section's type is looked up; elsewhere a type may belong to another library and is left to its reader
REGISTRY_OF = {'model': 'MODELS', 'dataset': 'DATASETS', 'sampler': 'DATA_SAMPLERS', 'batch_sampler': 'DATA_SAMPLERS',
               'custom_hooks': 'HOOKS', 'default_hooks': 'HOOKS', 'val_evaluator': 'METRICS',
               'test_evaluator': 'METRICS', 'param_scheduler': 'PARAM_SCHEDULERS', 'visualizer': 'VISUALIZERS',
               'pipeline': 'TRANSFORMS', 'tta_pipeline': 'TRANSFORMS', 'backbone': 'MODELS', 'neck': 'MODELS',
               'tta_model': 'MODELS'}
# the registries that a section's parts come from: names such as Resize or RandomSampler mean other things elsewhere
SECTIONS = {'model': ('MODELS', 'TASK_UTILS'), 'tta_model': ('MODELS', 'TASK_UTILS'),
            'dataloader': ('DATASETS', 'TRANSFORMS', 'DATA_SAMPLERS', 'FUNCTIONS'), 'pipeline': ('TRANSFORMS',),
            'evaluator': ('METRICS', 'EVALUATORS', 'EVALUATOR'), 'hooks': ('HOOKS', 'TRANSFORMS', 'MODELS'),
            'cfg': ('LOOPS',), 'scheduler': ('PARAM_SCHEDULERS',), 'visualizer': ('VISUALIZERS', 'VISBACKENDS'),
            'processor': ('LOG_PROCESSORS',)}
# OpenMMLab's builders take keys out of such dictionaries that the class of the type does not know
BUILDER_KEYS = {'nms', 'plugins', 'order', 'dcn'}
# classes that are registered without the package that they need: its module, and its name for pip
PACKAGES = {'FasterCocoMetric': ('faster_coco_eval', 'faster-coco-eval')}
HOOK_NAMES = {'runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint', 'visualization',
              *OWN_HOOKS}
PIPELINES = {'train_pipeline', 'val_pipeline', 'test_pipeline'}


class ConfigError(ValueError):
    """A config that says something nobody reads, or lacks something that is needed."""


def accepted_arguments(build: Any) -> tuple[set[str], bool]:
    """What a class or function takes as keyword arguments, followed through ``**kwargs`` of its bases.

    Args:
        build: A class or a function.

    Returns:
        The names, and whether these are all (False: it passes unknown names on to something that cannot be seen).
    """
    inits = [vars(base)['__init__'] for base in build.__mro__ if '__init__' in vars(base) and base is not object] \
        if inspect.isclass(build) else [build]
    names: set[str] = set()
    # OpenMMLab's heads call any of their bases, and drop what is left in **kwargs
    single = not build.__module__.startswith(('mmdet', 'mmseg'))
    for init in inits:
        parameters = inspect.signature(init).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if getattr(build, 'passes_arguments_on', False):
            return names - {'self'}, False
        if not any(p.kind is p.VAR_KEYWORD for p in parameters) and (single or init is inits[0]):
            return names - {'self'}, True
    return names - {'self'}, False


def top_level_keys() -> set[str]:
    """The keys of a config's top level that something reads."""
    return (set(inspect.signature(_Runner.__init__).parameters) - {'self', 'cfg'}) | EXTRA_TOP_KEYS


def check_overrides(options: Iterable[str]) -> None:
    """Raise for an override that comes too late: a variable of a config file has been read when overrides are applied.

    Args:
        options: Dotted keys, as given to ``--cfg-options``.
    """
    known = top_level_keys()
    for option in options:
        key = option.partition('.')[0]
        if key not in known:
            raise ConfigError(f'--cfg-options {option}: nothing reads the key {key!r}; a variable of a config file has '
                              f'been read when overrides are applied, so name the section that uses it, for example '
                              f'train_cfg.max_epochs. {did_you_mean(key, known)}')


def check_config(cfg: Config) -> None:
    """Raise an error for the first misspelt key, naming the nearest that exists.

    Checked are the keys of the top level, of loaders, loops and other fixed sections, and the arguments of every
    registered class. Top-level names that resemble no known key are variables of the config and are let through.

    Args:
        cfg: The config.
    """
    known = top_level_keys()
    for key in cfg:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if key not in known | PIPELINES and near and not key.startswith(near[0]):
            raise ConfigError(f'The config has the key {key!r}, which nothing reads. {did_you_mean(key, known)}')
    for key in ('model', 'work_dir'):
        if key not in cfg:
            raise ConfigError(f'The config lacks the key {key!r}')
    if isinstance(cfg.model, bool | int | float | str | list | tuple | None):
        raise ConfigError(f"model is {cfg.model!r}; it must be a dict with a 'type'")

    types = _Types(cfg.get('default_scope', SCOPES[0]))
    for key, value in cfg.items():
        if key not in known:
            continue
        if not isinstance(value, Mapping) or key == 'model_wrapper_cfg':
            _check_nested(key, value, types)
            continue
        fixed = _fixed_keys(key, value)
        if fixed is not None:
            _compare(key, value, fixed, closed=key != 'default_hooks')
        for name in ('max_epochs', 'max_iters', 'val_interval', 'val_begin') if key == 'train_cfg' else ():
            number = value.get(name, 0)
            if not isinstance(number, int) and not (isinstance(number, float) and number.is_integer()):
                raise ConfigError(f'train_cfg.{name} must be a whole number, got {number!r}')
        if key == 'optim_wrapper':
            for place, section in optimizer_sections(value).items():
                _check_optimizer(place, section)
        else:
            _check_nested(key, value, types)


class _Types:
    """What the types in a config mean, by the config's scope and the section."""

    def __init__(self, scope: str) -> None:
        self.registries = registries(scope)
        self.found: dict[tuple[str, str], Any] = {}

    def find(self, where: str, kind: str) -> Any:
        section = where.partition('.')[0].partition('[')[0]
        names = SECTIONS.get(section.rpartition('_')[2]) or SECTIONS.get(section) or tuple(self.registries)
        key = section, kind
        if key not in self.found:
            classes = (self.registries[name].get(kind) for name in names if name in self.registries)
            self.found[key] = next((cls for cls in classes if cls is not None), None)
        return self.found[key]

    def check_registered(self, where: str, kind: str) -> None:
        leaf = where.rpartition('.')[2].partition('[')[0]
        name = REGISTRY_OF.get(leaf) or REGISTRY_OF.get(where.partition('.')[0])
        # a scope or a dotted path names another package, which is imported when the object is built
        if name is None or '.' in kind or (where.count('.') > 1 and leaf != 'pipeline'):
            return
        home = self.registries[name]
        known = [*home.module_dict, *home.parent.module_dict]
        raise ConfigError(f'{where}.type is {kind!r}, which is not registered. {did_you_mean(kind, known)} A class of '
                          "your own needs custom_imports=dict(imports=['its_module'])")

    def is_scheduler(self, cls: Any) -> bool:
        return self.registries['PARAM_SCHEDULERS'].get(cls.__name__) is cls


def _fixed_keys(key: str, value: Mapping) -> set[str] | None:
    """Keys that a section of fixed form may have; None where a ``type`` or nothing decides."""
    if key.endswith('_dataloader'):
        return (accepted_arguments(DataLoader)[0] | LOADER_KEYS) - {'self'}
    if key == 'default_hooks':
        return HOOK_NAMES
    if 'type' in value:
        return None
    if key == 'train_cfg':
        loop = ResumableEpochLoop if value.get('by_epoch') else IterBasedTrainLoop
        return {'by_epoch'} | accepted_arguments(loop)[0]
    if key in ('val_cfg', 'test_cfg'):
        return accepted_arguments(ValLoop if key == 'val_cfg' else TestLoop)[0]
    return PLAIN_KEYS.get(key)


def _compare(where: str, given: Iterable[str], known: set[str], closed: bool = True) -> None:
    for key in given:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.81)
        # MMEngine writes the last one into what a config takes from another package
        if key not in known and (closed or near) and key != '_scope_':
            # an argument that the caller fills in is nothing to write into a config
            listed = sorted(known - {'params', 'parameters'})
            hint = f'Did you mean {" or ".join(map(repr, nearest(key, listed)))}? ' if nearest(key, listed) else ''
            raise ConfigError(f'{where} has no key {key!r}. {hint}It takes {", ".join(listed)}.')


def optimizer_sections(cfg: Mapping) -> dict[str, Any]:
    """The parts of a config's `optim_wrapper` that describe one optimizer each, by their place.

    Args:
        cfg: The config's `optim_wrapper`.

    Returns:
        Place to section: `optim_wrapper` alone, or `optim_wrapper.generator` and the like where there are several.
    """
    several = {f'optim_wrapper.{key}': part for key, part in cfg.items()
               if isinstance(part, Mapping) and 'optimizer' in part}
    return several or {'optim_wrapper': cfg}


def _check_optimizer(place: str, section: Mapping) -> None:
    wrapper = OPTIM_WRAPPERS.get(section.get('type', 'visionssm.OptimWrapper'))
    if wrapper is not None:
        names, closed = accepted_arguments(wrapper)
        _compare(place, section, names | {'type', 'constructor', 'paramwise_cfg', 'optimizer'}, closed)
    optimizer = section.get('optimizer')
    if isinstance(optimizer, Mapping) and 'type' in optimizer:
        names, closed = accepted_arguments(optimizer_class(optimizer['type']))
        _compare(f'{place}.optimizer', optimizer, names | {'type'}, closed)
        for key in ('lr', 'weight_decay'):
            if not isinstance(optimizer.get(key, 0.0), int | float):
                raise ConfigError(f'{place}.optimizer.{key} must be a number, got {optimizer[key]!r}')
    clip = section.get('clip_grad')
    if isinstance(clip, Mapping):
        clipper = clip_grad_value_ if clip.get('type') == 'value' else clip_grad_norm_
        _compare(f'{place}.clip_grad', clip, accepted_arguments(clipper)[0] | {'type'})


def _check_nested(where: str, value: Any, types: _Types) -> None:
    if isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_nested(f'{where}[{number}]', item, types)
    if not isinstance(value, Mapping):
        return
    kind = value.get('type')
    found = types.find(where, kind) if isinstance(kind, str) else kind if inspect.isclass(kind) else None
    if found is not None:
        module, package = PACKAGES.get(found.__name__, ('', ''))
        if module and importlib.util.find_spec(module) is None:
            raise ConfigError(f'{where}: {found.__name__} needs a package that is not installed: pip install {package}')
        names, closed = accepted_arguments(found)
        extra = {'type'} | ({'convert_to_iter_based'} if types.is_scheduler(found) else set())
        # read by whoever builds the part: the runner, and the heads of DETR's family
        extra |= {'priority'} if where.startswith('custom_hooks') else set()
        extra |= {'by_epoch'} if where == 'train_cfg' else set()
        extra |= {'bg_cls_weight'} if where.endswith('.loss_cls') else set()
        _compare(f'{where} ({found.__name__})', value, names | extra, closed)
    elif isinstance(kind, str):
        types.check_registered(where, kind)
    for key, item in value.items():
        if key not in BUILDER_KEYS and (not key.endswith('_cfg') or key in ('train_cfg', 'test_cfg')):
            _check_nested(f'{where}.{key}', item, types)
