"""Which family, and which registered model, a state dict belongs to: told by its keys and shapes, without weights."""

import inspect
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from timm.models import list_models, model_entrypoint
from torch import nn
from torch.overrides import TorchFunctionMode

from visionssm.checkpoints.load import CheckpointError, find_differences
from visionssm.utils.suggest import did_you_mean

from ._official import (
    Official,
    check_derived,
    families,
    find_official,
    official_shapes,
    read_official,
    shapes_of,
    translate_keys,
)
from ._tasks import task_models

__all__ = ['Fit', 'Unfilled', 'Variant', 'find_rivals', 'find_variant', 'fit_families', 'fit_family', 'fit_ours']

# what a foreign state dict makes of the readers of a family
_FOREIGN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# arguments that a registered model may be given and stay what it is; the last one only where shapes depend on it, as
# the keys do not tell a size that is no multiple of the patches
_FREE = ('in_chans', 'num_classes', 'img_size')
# arguments without which no two models have the same shapes
_SIZES = {'depths', 'depth', 'dims', 'embed_dim'}
_NEAREST = 3
_LOCK = threading.RLock()


class Unfilled(TorchFunctionMode):
    """Tensors without memory need no initial values, whose drawing costs more than all the rest of a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.endswith('_') and not func.__name__.endswith('__') and func.__name__ != 'requires_grad_':
            target = args[0] if args else (kwargs or {}).get('tensor')  # which torch.nn.init hands over by name
            if isinstance(target, torch.Tensor) and target.is_meta:
                return target
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Fit:
    """How a state dict fits a family.

    Attributes:
        family: Name of the family.
        official_class: Name of the official class.
        config: Keyword arguments of its constructor.
        model: Our model, without memory.
        state_dict: What is trained, in our names; of a state dict that does not fit, what it has.
        derived: Official keys of what the configuration gives, which our models do not keep.
        gaps: What does not fit, as `find_differences` returns it.
        fitting: Number of keys with the shapes that the model has.
        inferred: Whether keys and shapes told the configuration.
    """

    family: str
    official_class: str
    config: Mapping[str, Any]
    model: nn.Module
    state_dict: Mapping[str, torch.Tensor]
    derived: tuple[str, ...]
    gaps: Mapping[str, list[str]]
    fitting: int
    inferred: bool

    @property
    def dense(self) -> bool:
        """Whether it is the backbone of a detector or segmenter, which has no classifier."""
        return hasattr(self.model, 'out_indices') and hasattr(self.model, 'backbone')


@dataclass(frozen=True)
class Variant:
    """A registered model.

    Attributes:
        name: Its name.
        arguments: What it is built with beside the name.
        model: The model, without memory.
        alike: Other names of the same network.
    """

    name: str
    arguments: dict[str, Any]
    model: nn.Module = field(repr=False)
    alike: tuple[str, ...] = ()


def fit_family(
        family: str,
        state_dict: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None = None,
        official_class: str | None = None,
) -> Fit:
    """Compare an official state dict with what a family makes of it.

    Args:
        family: Name of the family.
        state_dict: The official state dict.
        config: As in `from_official`.
        official_class: As in `from_official`.

    Returns:
        The fit; what does not fit stands in its `gaps`.

    Raises:
        ValueError: Unknown family or class, or a configuration that has no counterpart here.
        CheckpointError: The configuration cannot be told, or is not the one that the tables in the file were made for.
    """
    official = find_official(family)
    given = read_official(family, state_dict, config, official_class)
    model = _without_memory(partial(official.build, given.official_class, given.config))
    derived = official.derived(model)
    gaps, fitting = _compare(official_shapes(official, given.official_class, model, derived),
                             shapes_of(given.state_dict))
    if derived and not gaps and not any(given.state_dict[key].is_meta for key in derived):
        check_derived(given.state_dict, official.derived(_with_memory(official, given.official_class, given.config)))
    ours = translate_keys({key: value for key, value in given.state_dict.items() if key not in derived},
                          official.keys(given.official_class))
    return Fit(family, given.official_class, given.config, model, ours, tuple(derived), gaps, fitting, config is None)


def fit_families(
        state_dict: Mapping[str, torch.Tensor],
        ours: bool = False,
        names: Iterable[str] | None = None,
) -> list[Fit]:
    """Compare a state dict with all families.

    Args:
        state_dict: A state dict.
        ours: Whether it is in our names, else in official ones.
        names: The families to try; all when None.

    Returns:
        The fits, best first; families whose keys have no part in the state dict are left out.
    """
    found = []
    for family in families() if names is None else names:
        try:
            fit = _fit_ours(family, state_dict) if ours else fit_family(family, state_dict)
        except _FOREIGN:
            continue
        if fit is not None and fit.fitting:
            found.append(fit)
    return sorted(found, key=lambda fit: (bool(fit.gaps), -fit.fitting))


def fit_ours(state_dict: Mapping[str, torch.Tensor]) -> Fit | None:
    """Find out which model a state dict in our names is of.

    Args:
        state_dict: The weights; of a model inside a wrapper of a training (`model.`) too.

    Returns:
        The fit; None where the keys are not ours, or tell no model.
    """
    inner = {key.removeprefix('model.'): value for key, value in state_dict.items() if key.startswith('model.')}
    for weights in (state_dict, inner):
        fits = fit_families(weights, ours=True)
        if fits and not fits[0].gaps:
            return fits[0]
    return None


def find_variant(fit: Fit, name: str | None = None) -> Variant:
    """Find the registered model of a fit; where none has its shapes, the nearest one with the arguments that differ.

    Args:
        fit: A fit without gaps.
        name: Name of the model; what comes nearest when None.

    Returns:
        A model that takes `fit.state_dict`; of a dense fit its trunk does.

    Raises:
        ValueError: There is no such model.
        CheckpointError: No registered model is of this kind, or the named one is not.
    """
    trunk = fit.model.get_submodule('backbone') if fit.dense else fit.model
    official = find_official(fit.family)
    candidates = _registered(type(trunk))
    if name is not None and name not in candidates:
        raise ValueError(f'{name!r} is no model of the family {fit.family}. {did_you_mean(name, candidates)}')
    if not candidates:
        raise CheckpointError(f'The weights are of the {fit.official_class}, a part of models of {fit.family}: no '
                              'registered model consists of it alone')
    wanted = _arguments(type(trunk), partial(official.build, fit.official_class, fit.config))
    known = {own: _arguments(type(trunk), entry) for own, entry in candidates.items()}
    gaps = {own: _differences(wanted, arguments) for own, arguments in known.items()}
    ranked = sorted(gaps, key=lambda own: (len(gaps[own]), len(own), own)) if name is None else [name]
    if fit.inferred:
        # keys and shapes tell no more than a registered model of these shapes knows, and round what it has
        for own, free in itertools.product(ranked[:_NEAREST], (_FREE[:-1], _FREE)):
            variant = _build(candidates, own, {key: wanted[key] for key in free if key in gaps[own]}, fit, known)
            if variant is not None:
                return variant
        # ratios are told roughly, and often are those of the model
        exact = {key: value for key, value in gaps[ranked[0]].items() if not isinstance(value, float)}
        variant = _build(candidates, ranked[0], exact, fit, known)
        if variant is not None:
            return variant
    variant = _build(candidates, ranked[0], gaps[ranked[0]], fit, known)
    if variant is None:
        raise CheckpointError(f'The weights are no {ranked[0]}, whatever its arguments are')
    return variant


def find_rivals(variant: Variant, fit: Fit) -> tuple[str, ...]:
    """Return the other registered models that have the same keys and shapes and compute something else.

    Args:
        variant: What `find_variant` returned.
        fit: The fit that it was found for.
    """
    trunk = type(fit.model.get_submodule('backbone') if fit.dense else fit.model)
    candidates = _registered(trunk)
    known = {own: _arguments(trunk, partial(entry, **variant.arguments)) for own, entry in candidates.items()}
    gaps = {own: _differences(known[own], known[variant.name]) for own in candidates}
    return tuple(own for own in candidates if gaps[own] and not gaps[own].keys() & _SIZES
                 and _build(candidates, own, variant.arguments, fit, known) is not None)


def _build(
        candidates: Mapping[str, Callable[..., nn.Module]],
        name: str,
        arguments: Mapping[str, Any],
        fit: Fit,
        known: Mapping[str, Mapping[str, Any]],
) -> Variant | None:
    """Build a registered model; return it if it has the shapes of a fit."""
    arguments = {key: value for key, value in arguments.items() if not (fit.dense and key == 'num_classes')}
    try:
        model = _without_memory(lambda: candidates[name](**arguments))
    except _FOREIGN:
        return None
    shapes, wanted = shapes_of(model.state_dict()), shapes_of(fit.model.state_dict())
    if fit.dense:
        trunk = fit.model.get_submodule('backbone').state_dict()
        if any(shapes.get(key) != tuple(value.shape) for key, value in trunk.items()) or any(
                key.partition('.')[0] in ('stages', 'layers') for key in shapes if key not in trunk):
            return None
    elif shapes != wanted:
        return None
    alike = tuple(own for own in sorted(known) if own != name and known[own] == known[name])
    return Variant(name, arguments, model, alike)


def _fit_ours(family: str, state_dict: Mapping[str, torch.Tensor]) -> Fit | None:
    """Fit a state dict in our names; the official ones tell the configuration."""
    official = find_official(family)
    best = None
    for official_class in official.classes:
        try:
            given = read_official(family, translate_keys(state_dict, official.keys(official_class), reverse=True))
            if given.official_class != official_class:
                continue
            model = _without_memory(partial(official.build, given.official_class, given.config))
        except _FOREIGN:
            continue
        gaps, fitting = _compare(shapes_of(model.state_dict()), shapes_of(state_dict))
        if best is None or fitting > best.fitting:
            best = Fit(family, official_class, given.config, model, state_dict, (), gaps, fitting, True)
    return best


def _compare(
        wanted: Mapping[str, tuple[int, ...]],
        given: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, list[str]], int]:
    return find_differences(wanted, given), sum(given.get(key) == shape for key, shape in wanted.items())


def _without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    with Unfilled(), torch.device('meta'):
        return build()


def _with_memory(official: Official, official_class: str, config: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device('cpu'):
        return official.build(official_class, config)


def _registered(model_cls: type[nn.Module]) -> dict[str, Callable[..., nn.Module]]:
    """Return the registered functions that say that they return a model of a class."""
    place = model_cls.__module__
    # timm notes the arguments of a model where it creates one by name
    found: dict[str, Callable[..., nn.Module]] = {
        name: partial(timm.create_model, name) for name in list_models(module=place.rpartition('.')[2])
        if _returns(model_entrypoint(name), model_cls)}
    found.update({name: entry for group in task_models().values() for name, entry in group.items()
                  if _returns(entry, model_cls)})
    return dict(sorted(found.items()))


def _returns(entry: Callable[..., nn.Module], model_cls: type[nn.Module]) -> bool:
    return entry.__module__ == model_cls.__module__ and inspect.signature(entry).return_annotation is model_cls


class _Seen(Exception):
    """Ends a construction whose arguments are known."""


def _arguments(model_cls: type[nn.Module], build: Callable[[], nn.Module]) -> dict[str, Any]:
    """Return the arguments that a function constructs a class with, without building anything.

    The class's constructor is replaced in the meantime, because the functions that know the arguments keep them to
    themselves; other threads still build models by it.
    """
    original, thread = model_cls.__init__, threading.get_ident()
    signature = inspect.signature(original)
    found: dict[str, Any] = {}

    def note(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != thread:
            original(self, *args, **kwargs)
            return
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        found.update(list(bound.arguments.items())[1:])
        raise _Seen

    with _LOCK:
        model_cls.__init__ = note
        try:
            build()
        except _Seen:
            pass
        finally:
            model_cls.__init__ = original
    return {key: value for key, value in found.items() if key not in ('device', 'dtype')}


def _differences(wanted: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that differ, as they are wanted; rates of training do not count."""
    return {key: value for key, value in wanted.items()
            if 'drop' not in key.split('_') and _plain(value) != _plain(own.get(key))}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple | torch.Size) else value
