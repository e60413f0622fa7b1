"""Conversion of weight files: from the layout of the models' authors to ours, and back.

A file in our layout describes itself. Its header holds `config` (from which timm and the tools here build the model),
`official` (from which the authors' layout comes back) and `notes` (where the weights are from).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._factory import create_model
from ._version import __version__
from .checkpoints import CheckpointError, Entry, entries, fetch, find_entry, read_checkpoint, read_ultralytics, unwrap
from .checkpoints.load import (
    find_differences,
    named_average,
    read_metadata,
    save_safetensors,
    save_torch,
    unsafe_globals,
)
from .checkpoints.training import mmengine_values
from .checkpoints.transfer import hash_file
from .models._describe import CLASSIFICATION, family_of, task_of, timm_config
from .models._detect import (
    Fit,
    Unfilled,
    Variant,
    find_rivals,
    find_variant,
    fit_families,
    fit_family,
    fit_ours,
)
from .models._official import find_official, rename_to_official, shapes_of
from .utils.suggest import list_names

__all__ = ['Conversion', 'Source', 'choose_variant', 'convert', 'convert_back', 'read_source']

_SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.ckpt', '.tar')
_BESIDE = 'beside the weights in the file'


@dataclass(frozen=True)
class Source:
    """A weight file that was read.

    Attributes:
        path: The file.
        sha256: Its hash.
        state_dict: The weights of one model, in the names that they have there.
        dropped: What else the file holds: name to reason why it is left out.
        classes: Names of the classes, where the file says them.
        metadata: The header of a safetensors file.
        entry: The entry of the catalogue that the file was asked for by, or that has its hash or name.
    """

    path: Path
    sha256: str
    state_dict: Mapping[str, torch.Tensor]
    dropped: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    entry: Entry | None = None


@dataclass(frozen=True)
class Conversion:
    """Weights in another layout, and what is to be said about them.

    Attributes:
        state_dict: Key to tensor, with the values and data types of the source.
        family: Name of the family.
        official_class: Name of the official class.
        name: Registered name of the model.
        arguments: What it is built with beside the name.
        alike: Other registered names of the same network.
        dense: Whether the weights are those of a backbone without its classifier.
        fitting: Number of keys that fit.
        dropped: What is left out: name to reason.
        gaps: 'missing', 'unexpected' and 'mis-shaped' to the keys; empty where everything fits.
        metadata: For the header of a safetensors file.
    """

    state_dict: Mapping[str, torch.Tensor]
    family: str
    official_class: str
    name: str = ''
    arguments: Mapping[str, Any] = field(default_factory=dict)
    alike: tuple[str, ...] = ()
    dense: bool = False
    fitting: int = 0
    dropped: Mapping[str, str] = field(default_factory=dict)
    gaps: Mapping[str, list[str]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the weights; the file appears whole or not at all.

        Args:
            path: Target: safetensors, or a file of `torch.save` that holds them under 'model'.

        Returns:
            The path.

        Raises:
            CheckpointError: Something does not fit, so there is nothing whole to write.
            OSError: The disk is full or not writable.
        """
        if self.gaps:
            raise CheckpointError(f'The weights do not fit {self.family}: {", ".join(self.gaps)} keys.')
        if Path(path).suffix == '.safetensors':
            return save_safetensors(self.state_dict, path, self.metadata)
        return save_torch({'model': {key: value.detach().contiguous() for key, value in self.state_dict.items()}}, path)


def read_source(source: str | os.PathLike, ema: bool | None = None) -> Source:
    """Read a weight file of any kind without running anything in it.

    Args:
        source: A file, or a name of the catalogue, which is fetched.
        ema: Take the averaged weights (True) or the others (False) of a file with both; as its name says when None.

    Returns:
        What it holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is neither such a file nor such a name.
        CheckpointError: The file cannot be read, or has no second set of weights to choose.
    """
    path, entry = Path(source), None
    if not path.is_file():
        if path.exists() or path.suffix in _SUFFIXES or len(path.parts) > 1:
            raise FileNotFoundError(f'{path} is a folder; give a file in it.' if path.is_dir()
                                    else f'There is no file {str(path)!r}.')
        entry = find_entry(os.fspath(source))
        path = fetch(entry).path
    digest = hash_file(path)
    if entry is None:
        entry = next((known for known in entries() if digest == known.sha256 or path.name == known.file), None)
    if path.suffix != '.safetensors' and any(name.startswith('ultralytics.') for name in unsafe_globals(path)):
        found = read_ultralytics(path)
        names = found['names']
        return Source(path, digest, found['state_dict'], {}, tuple(str(names[i]) for i in sorted(names)), {}, entry)
    with mmengine_values():
        content = read_checkpoint(path)
    state_dict = _choose(content, path, (entry.ema or None) if ema is None and entry else ema)
    dropped = {f'{key!s}': _BESIDE for key, value in content.items() if not _holds(value, state_dict)}
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
    dropped.update({key: 'no tensor' for key in state_dict if key not in tensors})
    if not tensors:
        raise CheckpointError(f'The checkpoint {str(path)!r} holds no tensors. It holds: '
                              f'{list_names(sorted(map(str, content))) or "nothing"}.')
    return Source(path, digest, tensors, dropped, (), read_metadata(path), entry)


def _choose(content: Mapping[str, Any], path: Path, ema: bool | None) -> dict[str, Any]:
    """Take one set of weights out of what a file holds."""
    if ema is None:
        return unwrap(content, ema=named_average(path))
    averaged = unwrap(content, ema=True)
    plain = unwrap({key: value for key, value in content.items() if key != 'ema'} or content)
    if averaged.keys() == plain.keys() and all(averaged[key] is plain[key] for key in plain):
        raise CheckpointError(f'{path} holds one set of weights, so there is none to choose: leave out '
                              f'{"--ema" if ema else "--no-ema"}.')
    return averaged if ema else plain


def _holds(value: Any, state_dict: Mapping[str, Any]) -> bool:
    """Return whether an entry of a file is, or holds, the state dict that was taken out of it."""
    if isinstance(value, Mapping):
        return any(_holds(item, state_dict) for item in value.values())
    return any(value is item for item in state_dict.values())


def convert(
        source: Source,
        family: str | None = None,
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
        backbone: bool = False,
) -> Conversion:
    """Bring weights from the layout of their authors into ours.

    Args:
        source: What `read_source` returned.
        family: Name of the family; what the keys tell when None.
        config: Keyword arguments of the official constructor; what keys and shapes tell when None.
        name: Registered name of the model; the one with these shapes when None.
        backbone: Take the backbone of a detector or segmenter (`backbone.`) alone.

    Returns:
        The weights in our layout; where something does not fit, `gaps` says what, and there is nothing to save.

    Raises:
        ValueError: Unknown family or name.
        CheckpointError: No family has such keys, several have, or a given one has not.
    """
    state_dict, dropped = source.state_dict, dict(source.dropped)
    if backbone:
        part = _backbone(state_dict)
        dropped.update({key: 'not of the backbone' for key in state_dict if not key.startswith('backbone.')})
        if not part:
            raise CheckpointError(f'{source.path} has no keys that begin with "backbone."; leave out --backbone.')
        state_dict = part
    fit = _find_fit(source, state_dict, family, config, backbone)
    dropped.update(_left_out(fit, state_dict))
    report: dict[str, Any] = {'family': fit.family, 'official_class': fit.official_class, 'fitting': fit.fitting,
                              'dropped': dropped}
    if fit.gaps:
        return Conversion({}, gaps=fit.gaps, dense=fit.dense, name=name or '', **report)
    variant = _prefer(source.entry, find_variant(fit, name), name)
    metadata = {
        'config': json.dumps(_describe(variant, fit, source.classes)),
        'official': json.dumps({'family': fit.family, 'class': fit.official_class, 'config': dict(fit.config)}),
        'notes': json.dumps(_notes(source, variant)), 'producer': f'visionssm {__version__}'}
    return Conversion(fit.state_dict, name=variant.name, arguments=variant.arguments, alike=variant.alike,
                      dense=fit.dense, metadata=metadata, **report)


def _backbone(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = 'backbone.'
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _find_fit(
        source: Source,
        state_dict: Mapping[str, torch.Tensor],
        family: str | None,
        config: Mapping[str, Any] | None,
        backbone: bool,
) -> Fit:
    """Fit a state dict to the given family, or to the one whose keys it has."""
    path = source.path
    if family is not None:
        try:
            fit = fit_family(family, state_dict, config)
        except CheckpointError as error:
            others = [fit.family for fit in fit_families(state_dict) if not fit.gaps]
            raise CheckpointError(f'{path} as {family}: {error}' + (
                f'\nAll its keys fit {others[0]}.' if others and family not in others else '')) from error
        if fit.gaps and not backbone:
            _refuse_whole(path, state_dict, [fit])
        return fit
    fits = fit_families(state_dict)
    whole = [fit for fit in fits if not fit.gaps]
    if len(whole) > 1:
        raise CheckpointError(f'{path} fits several families, {", ".join(fit.family for fit in whole)}: choose by '
                              '--family.')
    if not whole and not backbone:
        _refuse_whole(path, state_dict, fits)
    if not fits:
        raise CheckpointError(_unknown(source, state_dict))
    return fits[0] if config is None else fit_family(fits[0].family, state_dict, config)


def _refuse_whole(path: Path, state_dict: Mapping[str, torch.Tensor], fits: list[Fit]) -> None:
    """Raise where a file is a detector or segmenter, of which a backbone can be taken."""
    part = _backbone(state_dict)
    inner = [fit for fit in fit_families(part) if not fit.gaps] if part else []
    if inner and all(len(part) > fit.fitting for fit in fits):
        others = sorted({key.partition('.')[0] for key in state_dict if not key.startswith('backbone.')})
        raise CheckpointError(
            f'{path} holds a detector or segmenter: {len(part)} keys of a backbone ({inner[0].family}, '
            f'{inner[0].official_class}) and {len(state_dict) - len(part)} of {", ".join(others)}. --backbone converts '
            'the backbone; the whole loads as it is, by load_from in the config of such a model.')


def _unknown(source: Source, state_dict: Mapping[str, torch.Tensor]) -> str:
    path = source.path
    try:
        own = json.loads(source.metadata.get('config', '{}')).get('architecture')
    except (AttributeError, ValueError):
        own = None
    ours = fit_ours(state_dict) if own is None else None
    model = own or (ours.family if ours else '')
    if model:
        return (f'{path} is in our layout already ({model}): --to-official goes the other way, and `visionssm export '
                f'NAME --checkpoint {path} --format safetensors` writes such weights alone.')
    return (f'{path} has the keys of no known family; the first of its {len(state_dict)} are: '
            f'{", ".join(list(state_dict)[:5])}. With --family, what a family misses is told.')


def _left_out(fit: Fit, state_dict: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return which keys have no counterpart in our layout, and why."""
    official, found = find_official(fit.family), dict.fromkeys(
        [key for key in fit.derived if key in state_dict], 'computed from the configuration')
    for key, value in state_dict.items():
        settled = list(official.settle({key: value}))
        if not settled:
            found[key] = 'not of the model'
        elif settled[0] != key and settled[0] in state_dict:
            found[key] = f'the same as {settled[0]}'
    return found


def _prefer(entry: Entry | None, variant: Variant, name: str | None) -> Variant:
    """Take the name that the catalogue gives a file, among those of the same network."""
    if name is None and entry is not None and entry.model in variant.alike:
        others = tuple(sorted({*variant.alike, variant.name} - {entry.model}))
        return Variant(entry.model, variant.arguments, variant.model, others)
    return variant


def _describe(variant: Variant, fit: Fit, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the `config` of a file."""
    task = task_of(variant.name)
    if task == CLASSIFICATION and not fit.dense:
        return timm_config(variant.model, classes)
    config = {'architecture': variant.name, 'task': 'backbone' if fit.dense else task, 'model_args': variant.arguments}
    return {**config, 'classes': list(classes)} if classes else config


def _notes(source: Source, variant: Variant) -> dict[str, Any]:
    notes: dict[str, Any] = {'source': source.path.name, 'source_sha256': source.sha256}
    entry = source.entry
    if entry is not None and entry.model in (variant.name, *variant.alike):
        notes.update(weights=entry.name, licence=entry.licence, licence_note=entry.licence_note,
                     repository=entry.repository, paper=entry.paper, trained_on=entry.trained_on,
                     metrics=dict(entry.metric))
    return notes


def convert_back(source: Source, name: str | None = None) -> Conversion:
    """Bring weights from our layout back into that of the authors.

    Args:
        source: What `read_source` returned, of a file of `convert` or of a training here.
        name: Registered name of the model; what the file says, or its keys tell, when None.

    Returns:
        The weights in the official layout; where something does not fit, `gaps` says what.

    Raises:
        CheckpointError: The keys are not ours, or the model has no official counterpart.
    """
    state_dict, known = _ours(source, name)
    model = known.build(meta=True)
    given, wanted = shapes_of(state_dict), shapes_of(model.state_dict())
    gaps = find_differences(wanted, given)
    fitting = sum(given.get(key) == shape for key, shape in wanted.items())
    family, official_class = family_of(model), known.official_class or str(getattr(model, 'official_class', ''))
    if family is None or not official_class:
        raise CheckpointError(f'{known.name or type(model).__name__} has no official code, so there is no layout to go '
                              'back to.')
    report: dict[str, Any] = {'family': family, 'official_class': official_class, 'name': known.name,
                              'fitting': fitting, 'dropped': dict(source.dropped), 'gaps': gaps}
    if gaps:
        return Conversion({}, **report)
    official = find_official(family)
    if official.derived(model) and not any(value.is_meta for value in state_dict.values()):
        model = known.build(meta=False)
    back = rename_to_official(family, model, state_dict, official_class=official_class)
    if known.config is None:
        _check_counterpart(known.name, family, official_class, back)
    return Conversion(back, metadata={'producer': f'visionssm {__version__}'}, **report)


def _check_counterpart(name: str, family: str, official_class: str, back: Mapping[str, torch.Tensor]) -> None:
    """Raise where the official code cannot build a model of these shapes, because ours has options of its own."""
    try:
        fit = fit_family(family, back, official_class=official_class)
    except ValueError:
        return  # the keys do not tell the configuration, so there is nothing to compare with
    if fit.gaps:
        parts = '; '.join(f'{len(keys)} {label}, the first one {keys[0]}' for label, keys in fit.gaps.items())
        raise CheckpointError(f'This {name} has no counterpart in the code of its authors ({family}, '
                              f'{official_class}): {parts}.')


@dataclass(frozen=True)
class _Known:
    """What is known of a file in our layout."""

    name: str = ''
    arguments: Mapping[str, Any] = field(default_factory=dict)
    family: str = ''
    official_class: str = ''
    config: Mapping[str, Any] | None = None

    def build(self, meta: bool) -> nn.Module:
        if meta:
            with Unfilled(), torch.device('meta'):
                return self._build()
        with torch.random.fork_rng(devices=[]), torch.device('cpu'):
            return self._build()

    def _build(self) -> nn.Module:
        if self.config is not None:
            return find_official(self.family).build(self.official_class, self.config)
        return create_model(self.name, **self.arguments)


def _ours(source: Source, name: str | None) -> tuple[Mapping[str, torch.Tensor], _Known]:
    """Find out what model a file in our layout is of."""
    state_dict = source.state_dict
    try:
        config = dict(json.loads(source.metadata.get('config', '{}')))
        official = dict(json.loads(source.metadata.get('official', '{}')))
        stored = tuple(official[part] for part in ('family', 'class', 'config')) if official else ()
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f'The header of {source.path} is damaged: {error}.') from error
    architecture, arguments = config.get('architecture'), dict(config.get('model_args') or {})
    if stored and name in (None, architecture):
        return state_dict, _Known(architecture or '', arguments, *stored)
    if architecture and name in (None, architecture):
        if 'num_classes' in config:
            arguments.setdefault('num_classes', config['num_classes'])
        return state_dict, _Known(architecture, arguments)
    fit = fit_ours(state_dict)
    if fit is not None:
        state_dict = fit.state_dict
    if fit is None:
        if name is None:
            raise CheckpointError(_foreign(source))
        return state_dict, _Known(name)
    variant = choose_variant(source.path, fit, name)
    if fit.dense:
        return state_dict, _Known(variant.name, variant.arguments, fit.family, fit.official_class, fit.config)
    return state_dict, _Known(variant.name, variant.arguments)


def choose_variant(path: Path, fit: Fit, name: str | None = None) -> Variant:
    """Find the one registered model of a file that does not say its model.

    Args:
        path: The file.
        fit: How its keys fit.
        name: Registered name of the model; the one that the keys tell when None.

    Raises:
        ValueError: There is no such model.
        CheckpointError: The keys tell none, or several.
    """
    variant = find_variant(fit, name)
    others = () if name else find_rivals(variant, fit)
    if others:
        raise CheckpointError(f'{path} does not say what model it is of, and its keys are those of '
                              f'{", ".join((variant.name, *others))}: give --name.')
    return variant


def _foreign(source: Source) -> str:
    whole = [fit.family for fit in fit_families(source.state_dict) if not fit.gaps]
    if whole:
        return f'{source.path} is in the layout of the authors of {whole[0]} already: leave out --to-official.'
    return f'{source.path} does not say what model it is of, and its keys tell none: give --name.'
