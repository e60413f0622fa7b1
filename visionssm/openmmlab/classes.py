"""What data and the parts of a model must agree on, checked before anything runs: classes and channels."""
import re
from typing import Any

from torch import nn

__all__ = ['check_channels', 'check_classes', 'head_classes']

# heads that score the classes of the data; others, as those that propose regions, have classes of their own
HEAD = re.compile(r'(?:^|\.)(?:bbox_head|mask_head|decode_head|auxiliary_head)(?:\.\d+)?$')


def head_classes(model: nn.Module) -> dict[str, int]:
    """Number of classes of each head that scores the classes of the data.

    Args:
        model: A detector or segmentor.

    Returns:
        Path of the module to number.
    """
    found = {name: getattr(module, 'num_classes', None) for name, module in model.named_modules() if HEAD.search(name)}
    return {name: number for name, number in found.items() if isinstance(number, int)}


def _classes(loader: Any) -> tuple[str, ...]:
    classes = (getattr(getattr(loader, 'dataset', None), 'metainfo', None) or {}).get('classes') or ()
    if isinstance(classes, str):
        raise ValueError(f'the classes of {type(loader.dataset).__name__} are the text {classes!r}; one class needs a '
                         f"comma: metainfo=dict(classes=('{classes}',))")
    return tuple(classes)


def check_classes(model: nn.Module, first: Any, second: Any = None) -> None:
    """Refuse data with other classes than the model, and splits whose labels mean different classes.

    Args:
        model: The model.
        first: Loader of the data that are trained or tested on.
        second: Loader of the validation data.
    """
    train, val = _classes(first), _classes(second)
    heads = head_classes(model)
    for name, number in heads.items():
        if train and number != len(train):
            raise ValueError(f'the data have {len(train)} classes ({_some(train)}) and model.{name} has {number}; set '
                             f'model.{_option(name)}.num_classes={len(train)}, or the classes of the data by '
                             "dataset.metainfo=dict(classes=('first class', ...))")
    number = getattr(model, 'num_classes', None)
    if not heads and isinstance(number, int) and len(train) > number:
        raise ValueError(f'the training data has {len(train)} classes ({_some(train)}) and the model {number}; set '
                         f'model.model.num_classes={len(train)}')
    if train and val and train[:len(val)] != val:
        place = next(i for i, name in enumerate(val) if train[i:i + 1] != (name,))
        raise ValueError(f'label {place} is {val[place]!r} in the validation data and '
                         f'{train[place] if place < len(train) else "missing"!r} in the training data, which have '
                         f'{len(val)} and {len(train)} classes; give both datasets the same folders, or one class '
                         "order by class_map=['first class', 'second class', ...] or metainfo=dict(classes=...)")


def _some(names: tuple[str, ...]) -> str:
    return ', '.join(names[:5]) + (' ...' if len(names) > 5 else '')


def _option(name: str) -> str:
    """The config's key of a module: a list's number stays, the name of a wrapped model does not."""
    return name.removeprefix('module.')


def check_channels(model: nn.Module) -> None:
    """Refuse a neck or head that reads other channels than our backbone gives.

    Args:
        model: A detector or segmentor.
    """
    given = getattr(getattr(model, 'backbone', None), 'out_channels', None)
    neck = getattr(model, 'neck', None)
    if not isinstance(given, list | tuple):
        return
    if neck is not None and isinstance(getattr(neck, 'in_channels', None), list | tuple):
        _compare_channels('neck', list(neck.in_channels), list(given))
    for name in ('decode_head', 'auxiliary_head') if neck is None else ():
        head = getattr(model, name, None)
        index = getattr(head, 'in_index', None)
        if index is None or getattr(head, 'input_transform', None) is None and not isinstance(index, int):
            continue
        indices = [index] if isinstance(index, int) else list(index)
        if max(indices) < len(given):
            wanted = head.in_channels if isinstance(head.in_channels, list | tuple) else [head.in_channels]
            # concatenated inputs are one number, their sum
            if len(wanted) == len(indices):
                _compare_channels(name, list(wanted), [given[place] for place in indices])


def _compare_channels(name: str, wanted: list[int], given: list[int]) -> None:
    if wanted != given:
        raise ValueError(f'model.{name}.in_channels is {wanted} and model.backbone gives {given}; set '
                         f'model.{name}.in_channels={given if len(given) > 1 else given[0]}')
