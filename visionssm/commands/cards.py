"""Model cards: what is known about a model, from its file, the catalogue of weights, and by building it.

`visionssm list`, `visionssm info` and the generated parts of the documentation (`tools/make_model_cards.py`) all read
this. What needs a model to be built (sizes) or trained (accuracies) is kept in `measured.json` beside this file, which
that tool writes, so that listing builds nothing.
"""
import dataclasses
import functools
import importlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from timm.models import PretrainedCfg, model_entrypoint
from torch import nn

from .._factory import create_model, list_models
from ..analysis.flops import count_flops
from ..checkpoints import Entry, entries
from ..checkpoints.catalogue import families, split_hub, without_weights
from ..checkpoints.download import look_up
from ..models._detect import Unfilled
from ..models._tasks import task_models
from ..utils.suggest import did_you_mean

__all__ = ['MEASURED', 'Card', 'Paper', 'family_of', 'find_weights', 'format_metric', 'link_of', 'measure_model',
           'measured', 'model_card', 'model_module', 'stated', 'weights_of', 'weights_state']

MEASURED = Path(__file__).with_name('measured.json')
TASKS = ('classification', 'detection', 'segmentation', 'restoration', 'diffusion')
STATED = ('top1', 'top5')
UNITS = {'top1': 'top-1 {}', 'top5': 'top-5 {}', 'box_ap': 'box AP {}', 'mask_ap': 'mask AP {}', 'miou': 'mIoU {}',
         'miou_ms': 'multi-scale mIoU {}', 'fid_50k': 'FID {:.2f} (50,000 pictures)',
         'fashion_mnist_top1': 'top-1 {} on Fashion-MNIST (docs/comparison.md)'}
KINDS = {'psnr_y': 'PSNR (Y) {:.2f} dB', 'psnr_rgb': 'PSNR (RGB) {:.2f} dB', 'psnr': 'PSNR {:.2f} dB',
         'ssim': 'SSIM {}', 'iou': 'IoU {}', 'dsc': 'DSC {}'}
DATA = {'urban100': 'Urban100', 'classic5': 'Classic5', 'sidd': 'SIDD', 'cbsd68': 'CBSD68', 'isic17': 'ISIC 2017',
        'isic18': 'ISIC 2018'}
OPTIONS = ('embed_dim', 'dims', 'patch_size', 'img_size', 'in_chans', 'num_classes', 'upscale', 'window_size')
PREPROCESSING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper: title, identifier on arXiv, year and address."""

    title: str
    arxiv: str

    @property
    def url(self) -> str:
        """Its page."""
        return f'https://arxiv.org/abs/{self.arxiv}'

    def bibtex(self, key: str) -> str:
        """Return an entry for BibTeX; the names of the authors stand on the page of the paper.

        Args:
            key: What to cite it by.
        """
        return (f'@misc{{{key},\n  title = {{{{{self.title}}}}},\n  year = {{20{self.arxiv[:2]}}},\n'
                f'  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}},\n  url = {{{self.url}}}\n}}')


@dataclasses.dataclass(frozen=True)
class Card:
    """What is known about a model.

    Attributes:
        name: Registered name.
        task: 'classification', 'detection', ...
        family: Family of the catalogue; the name of the model's file where the catalogue has none.
        about: One sentence.
        class_name: Class, with its module.
        repository: Official repository.
        paper: The paper; None where the model's file names none.
        licence: Of the weights; empty where none is stated or there are none.
        preprocessing: `input_size`, `mean`, `std`, ... as the weights expect them of images.
        parameters: Their number.
        macs: Multiply-adds of one image of the input size.
        blocks: Name of a part to blocks a stage.
        channels: Of each stage, where the model says them.
        strides: Of each stage's map, where the model gives feature maps.
        options: Sizes and choices that the model states.
        weights: Files of weights of the model itself, released or not.
        dense: Files of weights of detectors and segmenters on top of it.
        no_weights: Why there are none; empty where there are, or where nobody says.
        measured: What was measured here with trained weights.
    """

    name: str
    task: str
    family: str
    about: str
    class_name: str
    repository: str
    paper: Paper | None
    licence: str
    preprocessing: Mapping[str, Any]
    parameters: int
    macs: int
    blocks: Mapping[str, Sequence[int]]
    channels: Sequence[int]
    strides: Sequence[int]
    options: Mapping[str, Any]
    weights: tuple[Entry, ...]
    dense: tuple[Entry, ...]
    no_weights: str
    measured: Mapping[str, float]

    def bibtex(self) -> str:
        """Return an entry for BibTeX; empty where no paper is known."""
        if self.paper is None:
            return ''
        family = next((entry.paper for entry in entries() if entry.family == self.family), None)
        # a family may hold models of another paper, which are cited by the name of their file
        foreign = family not in (None, f'arXiv:{self.paper.arxiv}')
        return self.paper.bibtex(self.class_name.split('.')[-2] if foreign else self.family)


@functools.cache
def tasks() -> Mapping[str, str]:
    """Return all names of models with their tasks."""
    return {name: task for task in TASKS for name in list_models(task)}


def _function(name: str) -> Callable[..., nn.Module]:
    if name not in tasks():
        raise ValueError(f'Unknown model {name!r}. {did_you_mean(name, tasks())} `visionssm list` shows all.')
    return model_entrypoint(name) if tasks()[name] == TASKS[0] else task_models()[tasks()[name]][name]


def model_module(name: str) -> ModuleType:
    """Return the module that registers a model.

    Raises:
        ValueError: There is no such model.
    """
    return importlib.import_module(_function(name).__module__)


@functools.cache
def _families() -> Mapping[str, str]:
    """Return the models that the catalogue names, with their families."""
    return {name: family for family in families()
            for name in (*(entry.model for entry in entries(family)), *without_weights(family))}


def family_of(name: str) -> str:
    """Return the family of a model: that of the catalogue, else the name of the model's file."""
    module = model_module(name)
    known = (_families()[model] for model in (name, *module.default_cfgs) if model in _families())
    return next(known, module.__name__.rpartition('.')[2])


def _cfgs(name: str) -> Mapping[str, PretrainedCfg]:
    default = model_module(name).default_cfgs[name]
    return {tag: default.cfgs[tag] for tag in default.tags}


def _as_entry(name: str, tag: str, cfg: PretrainedCfg) -> Entry:
    """Return weights that only the model's file names."""
    page = re.search(r'https?://\S+', cfg.description or '')
    source = cfg.url or (f'hf://{cfg.hf_hub_id}/{cfg.hf_hub_filename or "model.safetensors"}' if cfg.hf_hub_id else '')
    results = getattr(model_module(name), 'official_results', {}).get(f'{name}.{tag}', {})
    return Entry(
        name=f'{name}.{tag}', family=family_of(name), model=name, task=tasks()[name], repository=cfg.origin_url or '',
        commit='', paper=cfg.paper_ids or '', licence=cfg.license or '', keys='',
        trained_on=results.get('trained_on', 'ImageNet-1K' if tag.endswith('in1k') else ''),
        file=os.path.basename(source), sources=(source,) if source else (), page=page[0] if page else '')


def weights_of(name: str) -> tuple[Entry, ...]:
    """Return the weights of a model itself: those of the catalogue, and those that only the model's file names."""
    found = {entry.name: entry for entry in entries() if entry.model == name and not entry.config}
    for tag, cfg in _cfgs(name).items():
        if tag and f'{name}.{tag}' not in found:
            found[f'{name}.{tag}'] = _as_entry(name, tag, cfg)
    return tuple(found.values())


def find_weights(name: str) -> Entry | None:
    """Return the weights that a name with a tag, or of a config, means; None for the name of a model."""
    if name in tasks():
        return None
    model = name.partition('.')[0]
    known = {entry.name: entry for entry in [*entries(), *(weights_of(model) if model in tasks() else ())]}
    known |= {entry.name.partition('.')[0]: entry for entry in reversed(known.values()) if entry.config}
    if name not in known:
        raise ValueError(f'Unknown model or weights {name!r}. {did_you_mean(name, [*tasks(), *known])} '
                         '`visionssm list` shows all.')
    return known[name]


def weights_state(entry: Entry, cache_dir: str | os.PathLike | None = None) -> str:
    """Return 'here', 'to fetch', 'by hand' or 'not published'."""
    if look_up(entry, cache_dir):
        return 'here'
    return 'to fetch' if entry.sources else 'by hand' if entry.page else 'not published'


def stated(entry: Entry) -> dict[str, float]:
    """Return what the authors state for weights: the catalogue's numbers, and those of the model's file."""
    results: Mapping[str, Any] = {}
    if not entry.config:
        results = getattr(model_module(entry.model), 'official_results', {}).get(entry.name, {})
    return {**{key: results[key] for key in STATED if key in results}, **entry.metric}


def format_metric(name: str, value: float) -> str:
    """Return a number with what it is, as `top-1 82.6` or `PSNR (Y) 34.15 dB on Urban100`."""
    if name in UNITS:
        return UNITS[name].format(value)
    kind, _, data = name.rpartition('_')
    return KINDS.get(kind, kind.replace('_', ' ') + ' {}').format(value) + f' on {DATA.get(data, data)}'


def link_of(entry: Entry) -> str:
    """Return the address of weights for a person: file, page on the hub, or other page; empty where none is known."""
    if not entry.sources:
        return entry.page
    hub = split_hub(entry.sources[0])
    return f'https://huggingface.co/{hub[0]}/blob/main/{hub[1]}' if hub else entry.sources[0]


@functools.cache
def measured() -> Mapping[str, Mapping[str, Any]]:
    """Return what `measured.json` holds: name of a model to what `measure_model` returns, and accuracies measured."""
    return json.loads(MEASURED.read_text(encoding='utf-8')) if MEASURED.is_file() else {}


def _blocks(model: nn.Module) -> dict[str, list[int]]:
    """Count the blocks of every list of stages, and those of lists of blocks."""
    lists = (nn.ModuleList, nn.Sequential)
    found = {}
    for parent, prefix in ((model, ''), *((part, f'{name}.') for name, part in model.named_children())):
        for name, part in parent.named_children():
            if not isinstance(part, lists) or prefix == 'head.' or prefix and isinstance(parent, lists):
                continue
            inner = [getattr(stage, 'blocks', stage) for stage in part]
            if name.endswith('blocks'):
                found[prefix + name] = [len(part)]
            elif inner and all(isinstance(stage, lists) for stage in inner) and 'down' not in name:
                found[prefix + name] = [len(stage) for stage in inner]
    return found


def measure_model(name: str) -> dict[str, Any]:
    """Build a model without memory and count.

    Args:
        name: Registered name.

    Returns:
        `parameters`, `macs` for one image of the model's input size, `blocks`, `channels`, `strides` and `options`, as
        they stand in :class:`Card`.
    """
    with Unfilled():
        model = create_model(name, device='meta')
    taps = {tap['reduction']: tap['num_chs'] for tap in getattr(model, 'feature_info', None) or ()}
    options = {key: getattr(model, key) for key in OPTIONS if isinstance(getattr(model, key, None), int | tuple | list)}
    counts = count_flops(model, next(iter(_cfgs(name).values())).input_size)
    return {
        'parameters': counts['params'],
        'macs': counts['macs'],
        'blocks': _blocks(model),
        'channels': list(taps.values()),
        'strides': list(taps),
        'options': {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()},
    }


def model_card(name: str, counts: Mapping[str, Any] | None = None) -> Card:
    """Collect what is known about a model.

    Args:
        name: Registered name, with or without a tag.
        counts: What :func:`measure_model` gives; None builds the model.

    Raises:
        ValueError: There is no such model; the error names the nearest ones.
    """
    name, _, tag = name.partition('.')
    function = _function(name)
    cfgs = _cfgs(name)
    cfg = cfgs.get(tag, next(iter(cfgs.values())))
    weights = weights_of(name)
    found = dict(measure_model(name) if counts is None else counts)
    family, arxiv = family_of(name), (cfg.paper_ids or '').partition(':')[2]
    first = next((entry for entry in weights if entry.tag == tag), weights[0] if weights else None)
    about = ' '.join((function.__doc__ or '').strip().partition('\n')[0].split())
    return Card(
        name=name, task=tasks()[name], family=family, about=about,
        class_name=f'{function.__module__}.{_class_name(function)}', repository=cfg.origin_url or '',
        paper=Paper(cfg.paper_name, arxiv) if cfg.paper_name and arxiv else None,
        licence=first.licence if first else '', preprocessing={key: getattr(cfg, key) for key in PREPROCESSING},
        parameters=found['parameters'], macs=found['macs'], blocks=found['blocks'], channels=found['channels'],
        strides=found['strides'], options=found['options'], weights=weights,
        dense=tuple(entry for entry in entries() if entry.model == name and entry.config),
        no_weights=without_weights().get(name, ''),
        measured=found.get('measured', measured().get(name, {}).get('measured', {})))


def _class_name(function: Callable[..., nn.Module]) -> str:
    kind = function.__annotations__.get('return')
    return getattr(kind, '__name__', str(kind))
