"""`visionssm list`: which models there are."""
import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..utils.command import Command
from ..utils.suggest import did_you_mean
from .cards import TASKS, family_of, measured, tasks, weights_of, weights_state

__all__ = ['show_list', 'write_table']


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('pattern', nargs='*', metavar='PATTERN', help='names, or parts of them, as in tiny or '
                                                                      'vmamba*; all without one')
    parser.add_argument('--task', choices=TASKS, help='models of this task alone')
    parser.add_argument('--family', metavar='F', help='models of this family alone')
    parser.add_argument('--pretrained', action='store_true', help='models alone of which weights are published')
    parser.add_argument('--json', action='store_true', help='write JSON')


def write_table(rows: Sequence[Sequence[str]]) -> None:
    """Write rows to the standard output, columns side by side.

    Args:
        rows: Cells; the first row is the heading.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        sys.stdout.write('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + '\n')


def _chosen(args: argparse.Namespace) -> list[str]:
    families = sorted({family_of(name) for name in tasks()})
    if args.family not in (None, *families):
        raise ValueError(f'Unknown family {args.family!r}; there are {", ".join(families)}')
    return [name for name, task in tasks().items()
            if args.task in (None, task) and args.family in (None, family_of(name))
            and (not args.pattern or any(fnmatch.fnmatch(name, pattern if set('*?[') & set(pattern) else f'*{pattern}*')
                                         for pattern in args.pattern))
            and (not args.pretrained or any(entry.sources or entry.page for entry in weights_of(name)))]


def _facts(name: str) -> dict[str, Any]:
    known = measured().get(name, {})
    return {'name': name, 'task': tasks()[name], 'family': family_of(name), 'parameters': known.get('parameters'),
            'macs': known.get('macs'),
            'weights': [{'name': entry.name, 'tag': entry.tag, 'licence': entry.licence, 'state': weights_state(entry)}
                        for entry in weights_of(name)]}


def _list(args: argparse.Namespace) -> int:
    found = [_facts(name) for name in _chosen(args)]
    if args.json:
        sys.stdout.write(json.dumps(found, indent=1) + '\n')
    elif found:
        rows = [('name', 'task', 'parameters', 'weights')]
        for facts in found:
            size = facts['parameters']
            weights = ', '.join(f'{row["tag"]} ({row["state"]})'.strip() if row['tag'] else row['state']
                                for row in facts['weights'])
            rows.append((facts['name'], facts['task'], f'{size / 1e6:8.2f} M' if size else '', weights or 'none'))
        write_table(rows)
    if not found:
        hints = [did_you_mean(pattern, tasks()) for pattern in args.pattern]
        sys.stderr.write(' '.join(['error: no model is like that.', *filter(None, hints)]) + '\n')
    return 0 if found else 1


show_list = Command('List the models: task, size, and the tags of their weights with where these are (here: in the '
                    'cache). Nothing is built.', _add_options, _list)
