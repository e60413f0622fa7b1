"""`visionssm download`: fetch, check and list official weights."""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._factory import create_model
from ..checkpoints import CheckpointError, Entry, add_file, entries, fetch, find_entry
from ..checkpoints.converted import read_entry
from ..checkpoints.download import Cached, fetch_many, look_up
from ..checkpoints.load import compare_shapes
from ..models._official import rename_from_official
from ..utils.command import Command

__all__ = ['download']


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('names', nargs='*', metavar='NAME', help='as in vmamba_tiny, vssd_tiny.mesa_in1k, '
                                                                 'mask-rcnn_vmamba-tiny_fpn_1x_coco')
    parser.add_argument('--family', action='append', default=[], metavar='F', help='all weights of a family')
    parser.add_argument('--all', action='store_true', help='all weights of all families')
    parser.add_argument('--list', action='store_true', help='show what there is instead; all without NAME')
    parser.add_argument('--from-file', metavar='FILE', help='put a file fetched by hand in place of NAME')
    parser.add_argument('--cache-dir', metavar='DIR', help='folder of the weights (default: VISIONSSM_CACHE, else '
                                                           "checkpoints/visionssm in torch.hub's folder)")
    parser.add_argument('--offline', action='store_true', help='use no network, just what is there')
    parser.add_argument('--json', action='store_true', help='write JSON')
    parser.add_argument('--workers', type=int, default=4, metavar='N', help='files at a time (default: 4)')


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.workers < 1:
        parser.error(f'--workers must be at least 1, got {args.workers}')
    if args.from_file and (len(args.names) != 1 or args.family or args.all or args.list):
        parser.error('--from-file takes exactly one NAME, and neither --family, --all nor --list')
    if not (args.names or args.family or args.all or args.list):
        parser.error('give a NAME, --family, --all or --list')


def _download(args: argparse.Namespace) -> int:
    named = [find_entry(name) for name in args.names]
    found = named + [entry for family in args.family for entry in entries(family)]
    if args.all or (args.list and not found):
        found += entries()
    chosen = list(dict.fromkeys(found))
    if args.list:
        return _list(chosen, args)
    if args.from_file:
        check = functools.partial(_check_file, chosen[0])
        return _report([(chosen[0], add_file(chosen[0], args.from_file, check, args.cache_dir))], args)
    by_hand = [entry for entry in chosen if not entry.sources and entry not in named]
    if by_hand:
        sys.stderr.write(f'skipped, to be fetched by hand: {", ".join(entry.name for entry in by_hand)}\n')
    one = functools.partial(fetch, cache_dir=args.cache_dir, offline=args.offline or None)
    return _report(list(fetch_many([entry for entry in chosen if entry not in by_hand], one, args.workers)), args)


def _facts(entry: Entry, cached: Cached | None, error: str = '') -> dict[str, Any]:
    facts = {**dataclasses.asdict(entry), 'path': str(cached.path) if cached else None}
    if cached:
        facts.update(sha256=cached.sha256, size=cached.path.stat().st_size)
    return {**facts, 'error': error} if error else facts


def _list(chosen: Sequence[Entry], args: argparse.Namespace) -> int:
    cached = {entry.name: look_up(entry, args.cache_dir) for entry in chosen}
    if args.json:
        sys.stdout.write(json.dumps([_facts(entry, cached[entry.name]) for entry in chosen], indent=1) + '\n')
        return 0
    rows = [('name', 'task', 'size', 'licence', 'state')]
    for entry in chosen:
        there = cached[entry.name]
        size = there.path.stat().st_size if there else entry.size
        state = 'here' if there else 'to fetch' if entry.sources else 'by hand' if entry.page else 'not published'
        rows.append((entry.name, entry.task, f'{size / 1e6:.0f} MB' if size else entry.about, entry.licence, state))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        sys.stdout.write('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + '\n')
    return 0


def _report(results: Sequence[tuple[Entry, Cached | Exception]], args: argparse.Namespace) -> int:
    failed = [(entry, result) for entry, result in results if isinstance(result, Exception)]
    if args.json:
        sys.stdout.write(json.dumps([
            _facts(entry, None, str(result)) if isinstance(result, Exception) else _facts(entry, result)
            for entry, result in results], indent=1) + '\n')
    else:
        for entry, result in results:
            if isinstance(result, Cached):
                sys.stdout.write(f'{entry.name}  {result.path}  sha256 {result.sha256}\n')
    for _, error in failed:
        sys.stderr.write(f'error: {error}\n')
    return 1 if failed else 0


def _check_file(entry: Entry, path: Path) -> None:
    """Raise where a file is not what an entry stands for: nothing of it is built, keys and shapes tell."""
    state_dict = read_entry(entry, path)
    if entry.config:
        if not any(key.startswith('backbone.') for key in state_dict):
            raise CheckpointError(f'{path.name} holds no detector or segmenter: no key begins with "backbone."')
        return
    with torch.device('meta'):
        shapes = {key: torch.empty_like(value, device='meta') for key, value in state_dict.items()}
        given = rename_from_official(entry.family, shapes)
        wanted = create_model(entry.model).state_dict()
    compare_shapes({key: tuple(value.shape) for key, value in wanted.items()},
                   {key: tuple(value.shape) for key, value in given.items()}, f'The file is not of {entry.model}')


download = Command('Fetch, check and list official weights.', _add_options, _download, _check_options,
                   errors=(OSError, ValueError),
                   stopped='stopped; what has come is kept, and the same command goes on from there')
