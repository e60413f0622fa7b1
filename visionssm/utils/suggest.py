"""Suggestions for misspelt names, and short listings of many names."""

import difflib
import re
from collections.abc import Iterable

__all__ = ['check_choice', 'did_you_mean', 'list_names', 'nearest']


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """Return the allowed names that look most like `name`.

    Args:
        name: The name that was given.
        allowed: The names that exist.
        count: How many to return at most.

    Returns:
        Best match first; empty when nothing comes near.
    """
    return difflib.get_close_matches(name, sorted(set(allowed)), n=count, cutoff=0.5)


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise a ValueError that names the argument, its value and the allowed ones, unless `value` is among them."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f'{name} is {value!r}; allowed are {", ".join(map(repr, allowed))}.')


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return a sentence that names the nearest allowed names, or all of them when none comes near and they are few.

    Args:
        name: The name that was given.
        allowed: The names that exist.

    Returns:
        A sentence to append to an error message; empty when there is nothing useful to say.
    """
    allowed = sorted(set(allowed))
    matches = nearest(name, allowed)
    if matches:
        return f"Did you mean {' or '.join(repr(m) for m in matches)}?"
    if 0 < len(allowed) <= 12:
        return f"Allowed: {', '.join(allowed)}."
    return ''


def list_names(names: Iterable[str], limit: int = 40) -> str:
    """Write all names on one line; above `limit`, names that differ in numbers only are folded into one pattern.

    Args:
        names: Names such as state-dict keys.
        limit: The largest number of names that are written out one by one.

    Returns:
        For example `a, b` or `blocks.{0..23}.norm.weight (24)`.
    """
    names = list(names)
    if len(names) <= limit:
        return ', '.join(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r'\d+', '#', name), []).append(name)
    return ', '.join(_fold(pattern, members) for pattern, members in groups.items())


def _fold(pattern: str, members: list[str]) -> str:
    if len(members) == 1:
        return members[0]
    columns = zip(*(re.findall(r'\d+', member) for member in members), strict=True)
    folded = pattern
    for column in columns:
        values = sorted({int(value) for value in column})
        folded = folded.replace('#', str(values[0]) if len(values) == 1 else f'{{{values[0]}..{values[-1]}}}', 1)
    return f'{folded} ({len(members)})'
