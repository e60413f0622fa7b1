"""Conversion between the official state dicts of a family and ours.

A model file declares `OFFICIAL = Official(...)`; everything here works from that declaration, so a new family needs no
change in this module.
"""

import importlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from visionssm.checkpoints.load import CheckpointError, compare_shapes
from visionssm.utils.suggest import did_you_mean

from ._tasks import public_modules, task_modules

__all__ = [
    'Official', 'Reading', 'check_derived', 'count_blocks', 'dense_keys', 'families', 'find_official', 'find_taps',
    'from_official', 'official_shapes', 'read_official', 'rename_from_official', 'rename_to_official', 'shapes_of',
    'take_known', 'to_official', 'translate_keys',
]

_logger = logging.getLogger('visionssm')

KeyTable = tuple[tuple[str, str], ...]


def _no_derived(model: nn.Module) -> dict[str, torch.Tensor]:
    return {}


def _already_tidy(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    return state_dict


def _nothing_to_restore(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> Mapping[str, torch.Tensor]:
    return state_dict


def _as_given(config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
    return config


def _nothing_assumed(config: Mapping[str, Any]) -> str:
    return ''


@dataclass(frozen=True)
class Official:
    """What a family's file says about the official code.

    Attributes:
        classes: Names of the official classes; the first one is the default.
        keys: Official class to rows of (official pattern, our pattern). `{}` stands for a part of one dotted
            component, and the n-th one on the left equals the n-th one on the right, so a row reads both ways.
        build: (official class, keyword arguments of its constructor) to our model.
        infer: (state dict) to (official class, keyword arguments) as far as keys and shapes tell.
        derived: (model) to official entries that hold nothing trained: they are checked and left out on the way in,
            computed anew on the way out.
        complete: (arguments, state dict) to the arguments with what releases differ in and only the keys tell.
        tidy: (state dict) to the same with names and shapes of older official code brought to those of `keys`, and
            without what official files hold beside a model.
        aliases: Rows of (pattern of an entry that repeats another, pattern of that other). On the way in one of them is
            enough and the other one wins, as in the official code, which loads it last; both are written.
        restore: (state dict, model) to the same with those names and shapes that `tidy` changes and that the official
            code still has.
        assumed: What `infer` returned to a sentence on a guess in it that may be wrong without an error; empty where
            there is none.
        family: Name of the family; that of the file when empty.
    """

    classes: tuple[str, ...]
    keys: Callable[[str], KeyTable]
    build: Callable[[str, Mapping[str, Any]], nn.Module]
    infer: Callable[[Mapping[str, torch.Tensor]], tuple[str, dict[str, Any]]]
    derived: Callable[[nn.Module], dict[str, torch.Tensor]] = _no_derived
    complete: Callable[[Mapping[str, Any], Mapping[str, torch.Tensor]], Mapping[str, Any]] = _as_given
    tidy: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _already_tidy
    aliases: KeyTable = ()
    restore: Callable[[Mapping[str, torch.Tensor], nn.Module], Mapping[str, torch.Tensor]] = _nothing_to_restore
    assumed: Callable[[Mapping[str, Any]], str] = _nothing_assumed
    family: str = ''

    def settle(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a state dict as `keys` describes it: tidy, and each tensor under one name."""
        state_dict = self.tidy(state_dict)
        if not self.aliases:
            return state_dict
        proper = {key: value for key, value in state_dict.items() if translate_key(key, self.aliases) == key}
        return {**translate_keys(state_dict, self.aliases), **proper}

    def repeat(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return an official state dict with the entries that the official code stores twice."""
        return {**translate_keys(state_dict, self.aliases, reverse=True), **state_dict}


@cache
def _compile(table: KeyTable, reverse: bool) -> tuple[tuple[re.Pattern, str], ...]:
    rows = [(ours, theirs) if reverse else (theirs, ours) for theirs, ours in table]
    return tuple((re.compile(re.escape(source).replace(r'\{\}', r'([^.]+)')), target) for source, target in rows)


def translate_key(key: str, table: KeyTable, reverse: bool = False) -> str:
    """Translate one key; a key that no row matches stays as it is.

    Args:
        key: A state-dict key.
        table: Rows of (official pattern, our pattern).
        reverse: From ours to the official one.

    Returns:
        The key in the other language.
    """
    for pattern, target in _compile(table, reverse):
        match = pattern.fullmatch(key)
        if match:
            return target.format(*match.groups())
    return key


def translate_keys(state_dict: Mapping[str, Any], table: KeyTable, reverse: bool = False) -> dict[str, Any]:
    """Translate all keys of a state dict; our own keys pass unchanged.

    Args:
        state_dict: Key to value.
        table: Rows of (official pattern, our pattern).
        reverse: From ours to the official ones.

    Returns:
        The same values under their new keys.
    """
    return {translate_key(key, table, reverse): value for key, value in state_dict.items()}


def dense_keys(keys: KeyTable) -> KeyTable:
    """Return the table of a dense class, a `DenseBackbone` here, from that of the classifier."""
    return (*((theirs, f'backbone.{ours}') for theirs, ours in keys), ('outnorm{}.{}', 'out_norms.{}.{}'))


def find_taps(state_dict: Mapping[str, Any]) -> list[int]:
    """Return the stages whose maps a dense class normalises; none for a classifier."""
    return sorted({int(key[len('outnorm'):].partition('.')[0]) for key in state_dict if key.startswith('outnorm')})


def count_blocks(state_dict: Mapping[str, Any], part: str = '.blocks.') -> list[int]:
    """Return the depth of each stage, told by the first two numbers of the keys that contain `part`."""
    blocks = {tuple(map(int, re.findall(r'\d+', key)[:2])) for key in state_dict if part in key}
    return [sum(stage == i for stage, _ in blocks) for i in range(1 + max(stage for stage, _ in blocks))]


def take_known(
        family: str,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any],
        no_effect: Iterable[str],
) -> dict[str, Any]:
    """Return the official arguments over their defaults, and log those that the official constructor swallows.

    Args:
        family: Name of the family, for the log.
        config: Keyword arguments of the official constructor.
        defaults: What it takes where the caller says nothing, for all arguments that matter here.
        no_effect: Names of arguments that change nothing that is computed here.
    """
    swallowed = sorted(set(config) - set(defaults) - set(no_effect))
    if swallowed:
        _logger.warning(
            'Ignored arguments that the official constructor of %s swallows: %s.', family, ', '.join(swallowed))
    return {**defaults, **{key: value for key, value in config.items() if key in defaults}}


def _declarations() -> dict[str, Official]:
    """Return every family's declaration: those of the models and those of the folders of tasks, which stand above."""
    models = public_modules(importlib.import_module('visionssm.models'))
    found: dict[str, Official] = {}
    for module in [*models, *task_modules()]:
        official = getattr(module, 'OFFICIAL', None)
        if official is None:
            continue
        family = official.family or module.__name__.rpartition('.')[2]
        if family in found:
            raise ImportError(f'{module.__name__} declares the family {family!r}, which another file declares too.')
        found[family] = official
    return found


def families() -> list[str]:
    """Return the names of the families that can be built from official state dicts."""
    return sorted(_declarations())


def find_official(family: str) -> Official:
    """Return the declaration of a family.

    Args:
        family: Name of the family, for example 'vim'.

    Returns:
        The `OFFICIAL` of its file.

    Raises:
        ValueError: There is no such family.
    """
    known = _declarations()
    if family not in known:
        raise ValueError(f'Unknown family {family!r}. {did_you_mean(family, known)}')
    return known[family]


def from_official(
        family: str,
        state_dict: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        official_class: str | None = None,
) -> nn.Module:
    """Build our model from the official constructor's arguments and load the official weights strictly.

    Args:
        family: Name of the family, for example 'vim'.
        state_dict: The official state dict, without a training checkpoint around it.
        config: Keyword arguments of the official constructor; what keys and shapes tell when None.
        official_class: Name of the official class; the family's usual one, or what the keys tell, when None.

    Returns:
        Our model in training mode. It takes the official inputs in the official order and returns the official
        output: for a dense class the list of (B, C, H, W) maps.

    Raises:
        TypeError: `state_dict` is no dictionary.
        ValueError: Unknown family or class, or a configuration that has no counterpart here.
        CheckpointError: The state dict does not fit; the error lists every missing, unexpected and mis-shaped key.
    """
    official = find_official(family)
    given = read_official(family, state_dict, config, official_class)
    said = official.assumed(given.config) if config is None else ''
    if said:
        _logger.warning('%s If the model was trained with others, outputs are wrong: give config, the keyword '
                        'arguments of the official constructor, which were taken to be %s.', said, dict(given.config))
    headline = ' that its keys tell; give config if they mislead' if config is None else ''
    return _build(official, given, headline)


def rename_from_official(family: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return official weights in our names, checked against the model that keys and shapes tell.

    Args:
        family: Name of the family.
        state_dict: As in `from_official`.

    Returns:
        The state dict of a model of ours.

    Raises:
        CheckpointError: As in `from_official`.
    """
    return _build(find_official(family), read_official(family, state_dict), ' that its keys tell').state_dict()


def _build(official: Official, given: 'Reading', headline: str) -> nn.Module:
    model = official.build(given.official_class, given.config)
    table = official.keys(given.official_class)
    derived = official.derived(model)
    compare_shapes(
        official_shapes(official, given.official_class, model, derived), shapes_of(given.state_dict),
        f'The state dict does not fit the {given.official_class}{headline}')
    check_derived(given.state_dict, derived)
    trained = {key: value for key, value in given.state_dict.items() if key not in derived}
    model.load_state_dict(translate_keys(trained, table))
    return model


@dataclass(frozen=True)
class Reading:
    """An official state dict and what it belongs to.

    Attributes:
        official_class: Name of the official class.
        config: Keyword arguments of its constructor.
        state_dict: Key to tensor as the rows of `Official.keys` describe them.
    """

    official_class: str
    config: Mapping[str, Any]
    state_dict: Mapping[str, torch.Tensor]


def read_official(
        family: str,
        state_dict: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None = None,
        official_class: str | None = None,
) -> Reading:
    """Tell class and arguments of an official state dict; nothing is built or compared.

    Args:
        family: Name of the family.
        state_dict: The official state dict.
        config: As in `from_official`.
        official_class: As in `from_official`.

    Returns:
        What the state dict belongs to.

    Raises:
        TypeError: It is no dictionary of tensors.
        ValueError: Unknown family or class.
        CheckpointError: Keys and shapes tell no configuration.
    """
    official = find_official(family)
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f'state_dict is a {type(state_dict).__name__}, not a dictionary of tensors; read a file with '
            f'visionssm.checkpoints.load_state_dict(path) first.')
    _check_entries(state_dict)
    state_dict = official.settle(state_dict)
    if config is None:
        inferred_class, config = _infer(official, state_dict)
        official_class = official_class or inferred_class
        _logger.info('Inferred %s(%s) from the state dict.', official_class, config)
    elif not isinstance(config, Mapping):
        raise TypeError(f'config is a {type(config).__name__}; give the keyword arguments of the official constructor '
                        f'as a dictionary, or None.')
    official_class = official_class or _infer(official, state_dict)[0]
    _check_class(official_class, family, official)
    return Reading(official_class, official.complete(config, state_dict), state_dict)


def to_official(
        family: str,
        model: nn.Module,
        *,
        official_class: str | None = None,
) -> dict[str, torch.Tensor]:
    """Return the state dict of our model in the official names: the inverse of `from_official`.

    Names alone are changed: of a model with options that the official code has not, such as a Mamba2D with another
    `d_state`, the result fits no official model, which `visionssm convert --to-official` refuses.

    Args:
        family: Name of the family, for example 'vim'.
        model: A model of that family.
        official_class: Name of the official class; what the model was built as, or the family's usual one, when None.

    Returns:
        Official key to tensor, with the entries that the official code stores though they can be computed or repeat
        others.
    """
    return rename_to_official(family, model, model.state_dict(), official_class=official_class)


def rename_to_official(
        family: str,
        model: nn.Module,
        state_dict: Mapping[str, torch.Tensor],
        *,
        official_class: str | None = None,
) -> dict[str, torch.Tensor]:
    """Return weights of our model in the official names.

    Args:
        family: Name of the family.
        model: The model that the weights belong to; it says what can be computed, and its own weights do not count.
        state_dict: The weights, in our names.
        official_class: As in `to_official`.

    Returns:
        As `to_official`.
    """
    official = find_official(family)
    if official_class is None:
        official_class = str(getattr(model, 'official_class', ''))
        if not official_class:
            raise ValueError(f'This {type(model).__name__} has no counterpart in the official code of {family!r}.')
    _check_class(official_class, family, official)
    table = official.keys(official_class)
    renamed = official.repeat({**translate_keys(state_dict, table, reverse=True), **official.derived(model)})
    return dict(official.restore(renamed, model))


def _check_entries(state_dict: Mapping[str, Any]) -> None:
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise TypeError(
                f'state_dict must hold tensors by name; {key!r} is a {type(value).__name__}. The weights of a training '
                f'checkpoint are inside it: visionssm.checkpoints.load_state_dict(path) finds them.')


def _infer(official: Official, state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer class and arguments, or say that the keys do not tell them."""
    try:
        return official.infer(state_dict)
    except (LookupError, TypeError, ValueError) as error:
        why = str(error).rstrip('.')
        raise CheckpointError(
            f'The configuration cannot be told from these keys and shapes: {why}. With config, the keyword arguments '
            f'of the official constructor, every key that does not fit is listed.') from error


def _check_class(official_class: str, family: str, official: Official) -> None:
    if official_class not in official.classes:
        raise ValueError(
            f'{official_class!r} is no official class of the family {family!r}. '
            f'{did_you_mean(official_class, official.classes)}')


def official_shapes(
        official: Official,
        official_class: str,
        model: nn.Module,
        derived: Mapping[str, torch.Tensor],
) -> dict[str, tuple[int, ...]]:
    """Return the keys that an official state dict of a model of ours has, with their shapes."""
    table = official.keys(official_class)
    return shapes_of({**translate_keys(model.state_dict(), table, reverse=True), **derived})


def shapes_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return key to shape."""
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def check_derived(state_dict: Mapping[str, torch.Tensor], derived: Mapping[str, torch.Tensor]) -> None:
    """Raise where an entry that follows from the configuration is not what the configuration gives.

    Args:
        state_dict: The official state dict.
        derived: What `Official.derived` returns.

    Raises:
        CheckpointError: They differ by 0.001 or more; what has no values is not compared.
    """
    for key, value in derived.items():
        given = state_dict[key]
        if 'meta' in (given.device.type, value.device.type):
            continue
        gap = (given.double() - value.to(given.device).double()).abs().max().item()
        if not gap < 1e-3:
            raise CheckpointError(
                f'{key} differs by up to {gap:.3g} from the table that the configuration gives: '
                f'the configuration is not the one that the weights were trained with.')
