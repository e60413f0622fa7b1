"""Classes of data and model must agree before anything runs; later a mismatch is an index error, or not seen at all."""
import re
from typing import Any

from torch import nn

__all__ = ['check_classes', 'head_classes']

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
