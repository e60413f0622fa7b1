"""Benchmarks cell by cell: finished cells are kept in a JSON, so that a stopped run goes on, and limits are judged.

A cell is a dictionary of JSON: its `settings`, the `options` and the `environment` of the measurement, and one row for
each contestant, which has times or the `error` of one that does not run.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from visionssm_kernels._dispatch import backend_states
from visionssm_kernels._native import LIBRARY, native_why_not

from .._version import __version__
from ..utils.command import check_folder
from ..utils.files import atomic_write
from .timing import Timing, describe_machine

__all__ = ['Cell', 'Judged', 'add_result_options', 'describe_failure', 'describe_megabytes', 'describe_places',
           'describe_quotient', 'describe_setup', 'judge', 'make_table', 'measure_cells', 'quotient', 'read_cells',
           'report_cells', 'same_setup']

Cell = dict[str, Any]
Judged = tuple[bool | None, str]


def describe_setup(device: torch.device, threads: int) -> dict[str, Any]:
    """Return what numbers depend on: machine, threads, versions, the chosen kernels and the build of the library."""
    kernels = [f'{state.op} {state.backend}' for state in backend_states()
               if state.device == device.type and state.state == 'chosen']
    found = {**describe_machine(device), 'threads': threads, 'visionssm': __version__, 'kernels': '; '.join(kernels)}
    if not native_why_not(device.type):
        found['native library'] = hashlib.sha256(LIBRARY.read_bytes()).hexdigest()[:8]
    return found


def same_setup(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether numbers of two environments belong together: all but the day and the load are equal."""
    passing = {'date', 'load average'}
    return all(first.get(key) == second.get(key) for key in (first.keys() | second.keys()) - passing)


def read_cells(path: Path | None, fields: Iterable[str] = ()) -> list[Cell]:
    """Return the finished cells of a file; none where there is no file yet.

    Args:
        path: The JSON, or None.
        fields: Names of settings that every cell of the tool has.

    Raises:
        ValueError: The file holds something else, as cells of another tool, or is damaged.
    """
    if path is None or not path.is_file():
        return []
    try:
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        for cell in cells:
            cell['environment'], cell['rows'], *(cell['settings'][field] for field in fields)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is no file of this tool, or is damaged ({error!r}). Remove it, and all is measured '
                         'again, or give another name') from error
    return cells


def _in_words(seconds: float) -> str:
    return f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.0f} min'


def measure_cells(
        jobs: Sequence[dict[str, Any]],
        kept: list[Cell],
        measure: Callable[[dict[str, Any]], list[dict[str, Any]]],
        environment: Callable[[], dict[str, Any]],
        words: Callable[[dict[str, Any]], str],
        name: str,
        options: dict[str, Any],
        path: Path | None = None,
        again: bool = False,
) -> list[Cell]:
    """Measure the cells that are not finished, and say on the standard error how far it is.

    Args:
        jobs: Settings of every cell, ready for JSON.
        kept: Cells of before; what is measured is added, or takes the place of an older cell.
        measure: Settings to the rows of a cell.
        environment: What numbers depend on now.
        words: Settings to a few words about them.
        name: Field of a row that names its contestant.
        options: How it is measured, which is kept with the cells.
        path: JSON that is written after every cell.
        again: Measure what is finished too.

    Returns:
        The cells of the jobs, in their order.
    """
    reported, seconds = [], []
    for number, settings in enumerate(jobs, 1):
        here = environment()
        said = f'[{number}/{len(jobs)}] {words(settings)}'
        old = next((cell for cell in kept if cell['settings'] == settings), None)
        if old and same_setup(old['environment'], here) and not again:
            sys.stderr.write(f'{said}: kept from {old["environment"]["date"]}\n')
            reported.append(old)
            continue
        sys.stderr.write(f'{said}\n')
        start = time.monotonic()
        rows = measure(settings)
        if old:
            kept.remove(old)
        kept.append({'settings': settings, 'options': options, 'environment': here, 'rows': rows})
        reported.append(kept[-1])
        for row in rows:
            if 'error' in row:
                sys.stderr.write(f'  {row[name]} failed: {row["error"]}\n')
        seconds.append(time.monotonic() - start)
        left = (len(jobs) - number) * sum(seconds) / len(seconds)
        sys.stderr.write(f'  {_in_words(seconds[-1])}' + (f', about {_in_words(left)} left\n' if left else '\n'))
        if path:
            # another run may have written there meanwhile
            kept += [cell for cell in read_cells(path) if all(cell['settings'] != own['settings'] for own in kept)]
            atomic_write(json.dumps({'cells': kept}, indent=1) + '\n', path)
    return reported


def quotient(rows: Iterable[dict[str, Any]], name: str, first: str, second: str) -> tuple[float, float, float] | None:
    """Return how many times as long one contestant takes as another: median, lower and upper quartile over the rounds.

    Args:
        rows: Rows of a cell.
        name: Field of a row that names its contestant.
        first: The contestant whose time is divided.
        second: The one that it is divided by.

    Returns:
        The quotients; None where one of both was not timed.
    """
    times = {row[name]: Timing(row['rounds_ms'], row['least_ms']) for row in rows if 'ms' in row}
    return times[first].speed_of(times[second]) if first in times and second in times else None


def describe_quotient(found: tuple[float, float, float]) -> str:
    """Return what `quotient` returned, in words."""
    return '{:.2f} ({:.2f} to {:.2f})'.format(*found)


def describe_megabytes(memory: int) -> str:
    """Return bytes in megabytes, with three digits."""
    return f'{memory / 1e6:.0f}' if memory >= 1e8 else f'{memory / 1e6:.3g}'


def describe_failure(row: dict[str, Any]) -> str:
    """Return the error of a row, fit for a table in Markdown."""
    return f'failed: {row["error"][:200]}'.replace('|', '/')


def make_table(heading: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table in Markdown; all but the first `left` columns are aligned to the right."""
    return [f'| {" | ".join(heading)} |', '|' + '---|' * left + '---:|' * (len(heading) - left),
            *(f'| {" | ".join(row)} |' for row in rows)]


def describe_places(cells: Iterable[Cell]) -> list[str]:
    """Return lines in Markdown that say where cells were measured, and under which load."""
    places: dict[str, list[float]] = {}
    for cell in cells:
        known = {key: value for key, value in cell['environment'].items() if value != ''}
        load = known.pop('load average', None)
        places.setdefault(', '.join(f'{key} {value}' for key, value in known.items()), []).append(load or 0)
    return [line for where, loads in places.items()
            for line in (f'Measured on: {where}; load average {min(loads)} to {max(loads)}.', '')]


def judge(what: str, cells: Iterable[Cell], verdict: Callable[[Cell], Judged | None]) -> list[Judged]:
    """Judge one limit in all cells that it is about.

    Args:
        what: The limit, in words.
        cells: All cells.
        verdict: A cell to whether the limit is met in it, and what was found; None where the cell tells nothing.

    Returns:
        One entry for each cell that tells; a single one with None where none does.
    """
    found = [(judged[0], f'{what}: {judged[1]}') for judged in map(verdict, cells) if judged]
    return found or [(None, what)]


def add_result_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options of what becomes of the cells, `what` for short."""
    parser.add_argument('--again', action='store_true', help='measure what is finished too')
    parser.add_argument('--render', action='store_true', help='measure nothing, and report all that --json holds')
    parser.add_argument('--bars', action='store_true', help='say which limits to the ratios are met; exit code 1 if '
                                                            'one that was measured is not')
    parser.add_argument('--json', type=Path, metavar='FILE', help=f'all times; finished {what} are kept there')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='a PNG of what was measured')
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='the tables, which are printed too')


def report_cells(
        args: argparse.Namespace,
        measure_all: Callable[[list[Cell]], list[Cell]],
        report: Callable[[Sequence[Cell]], str],
        limits: Callable[[Sequence[Cell]], list[Judged]],
        draw: Callable[[Sequence[Cell], Path], None],
        fields: Iterable[str],
) -> int:
    """Measure, or read what was measured, and write tables, limits and picture, as the options ask.

    Args:
        args: Those of `add_result_options`.
        measure_all: Cells that are kept in the JSON to those to report.
        report: Cells to tables in Markdown.
        limits: Cells to the limits.
        draw: Cells to a picture in a file.
        fields: Those of `read_cells`.

    Returns:
        The exit code: 1 if a limit is not met.
    """
    for option, path in (('--json', args.json), ('--plot', args.plot), ('--markdown', args.markdown)):
        if path is not None:
            check_folder(path.parent, f'{option} {path}')
            if path.is_dir():
                raise IsADirectoryError(f'{option} {path} is a folder: give the name of a file')
    if args.plot and args.plot.suffix.lower() != '.png':
        raise ValueError(f'--plot {args.plot}: the file must end in .png')
    if args.plot and importlib.util.find_spec('matplotlib') is None:
        raise ImportError("--plot needs matplotlib, which is not installed: pip install 'visionssm[mm]'")
    cells = read_cells(args.json, fields)
    if args.render and not cells:
        raise ValueError(f'{args.json} holds nothing to report')
    if not args.render:
        cells = measure_all(cells)
    text, judged = report(cells), limits(cells) if args.bars else []
    if judged:
        words = {True: 'met', False: 'not met', None: 'not measured'}
        text += '\n'.join(['', '## Limits', '', *(f'- {words[met]}: {found}' for met, found in judged), ''])
    sys.stdout.write(text)
    if args.markdown:
        atomic_write(text, args.markdown)
    if args.plot:
        draw(cells, args.plot)
    return 1 if any(met is False for met, _ in judged) else 0
