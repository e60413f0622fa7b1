"""Time kernels beside their definitions, other algorithms and other packages; refused where results differ.

    python tools/benchmark_kernels.py --op selective_scan --threads 2 --json kernels.json --markdown kernels.md
    python tools/benchmark_kernels.py --preset cpu --threads 2 --bars --json cpu.json --plot cpu.png
    python tools/benchmark_kernels.py --preset gpu --device cuda --bars --json gpu.json
    python tools/benchmark_kernels.py --render --json cpu.json --plot cpu.png       # measures nothing

All contestants run in alternation on each case, and ratios are medians of the quotients within rounds. Finished cases
are kept in the JSON: after a stop the same command goes on.
"""
import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    from visionssm_launcher import importing

    with importing():
        import torch
        from _figures import make_figure, save_figure, share_legend
        from _kernel_cases import BOUNDS, OPS, OURS, PASSES, measure, own_backends, usual_contestants

        from visionssm.analysis.cells import (
            Cell,
            Judged,
            add_result_options,
            describe_failure,
            describe_megabytes,
            describe_places,
            describe_quotient,
            describe_setup,
            judge,
            make_table,
            measure_cells,
            quotient,
            report_cells,
        )
        from visionssm.analysis.timing import check_threads
        from visionssm.utils.command import Command
except ImportError as error:
    sys.exit(f'{error}: install the checkout first, with `pip install -e .`')

Shapes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """What a preset measures of an op: cases, and peers beside its backends (None for the usual ones).

    Layouts of maps are those of the op where there are none here.
    """
    op: str
    shapes: Shapes
    passes: tuple[str, ...] = PASSES
    dtypes: tuple[str, ...] = ('float32',)
    peers: tuple[str, ...] | None = None
    layouts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Bar:
    """A limit to the op, run as models run it, beside a peer.

    Attributes:
        op: Name of the op.
        peer: Of the contestant.
        kind: 'speed': at least so many times as fast; 'time' and 'memory': at most so many times as much.
        limit: That number.
        shapes: Cases.
        passes: With all shapes.
        dtypes: With all passes.
        gpu: On an accelerator instead of a CPU.
    """
    op: str
    peer: str
    kind: str
    limit: float
    shapes: Shapes
    passes: tuple[str, ...] = PASSES
    dtypes: tuple[str, ...] = ('float32',)
    gpu: bool = False


BOTH = ('bfloat16', 'float32')
SCANS = ((1, 384, 197, 16), (4, 384, 197, 16), (1, 768, 1024, 16))
LONG = ((8, 768, 4096, 16),)
STAGES = OPS['selective_scan_2d'].shapes
STAGES_64 = tuple((64, *shape[1:]) for shape in STAGES)
WAVEFRONT = ((1, 96, 56, 56, 16),)
PRESETS = {
    'cpu': (
        Part('selective_scan', SCANS[:1], peers=('plain', 'parallel', 'compiled', 'attention')),
        Part('selective_scan', SCANS[1:], peers=('plain', 'parallel', 'attention')),
        Part('selective_scan_2d', STAGES), Part('wavefront_scan_2d', WAVEFRONT),
        Part('nc_ssd', OPS['nc_ssd'].shapes), Part('ssd', OPS['ssd'].shapes[:2])),
    'gpu': (
        Part('selective_scan', LONG, dtypes=BOTH),
        Part('selective_scan_2d', STAGES_64, PASSES[1:], BOTH, layouts=('',)),
        Part('wavefront_scan_2d', ((64, 64, 56, 56, 16), (8, 64, 224, 224, 16)), dtypes=BOTH, peers=()),
        Part('nc_ssd', ((64, 3136, 2, 64, 1, 64),), dtypes=BOTH),
        Part('ssd', ((8, 4096, 24, 64, 1, 64),), dtypes=BOTH)),
}
BARS = (
    Bar('selective_scan', 'plain', 'speed', 40, SCANS, PASSES[:1]),
    Bar('selective_scan', 'plain', 'speed', 20, SCANS, PASSES[1:]),
    Bar('selective_scan_2d', 'four-scans', 'time', 1.15, STAGES),
    Bar('selective_scan_2d', 'cross-scan', 'memory', .5, STAGES),
    Bar('wavefront_scan_2d', 'plain', 'speed', 20, WAVEFRONT),
    Bar('nc_ssd', 'matmuls', 'time', 1.3, OPS['nc_ssd'].shapes),
    Bar('selective_scan', 'mamba_ssm', 'speed', 1, LONG, dtypes=BOTH, gpu=True),
    Bar('selective_scan_2d', 'cross-scan+mamba_ssm', 'speed', 1.5, STAGES_64, PASSES[1:], BOTH, True),
    Bar('selective_scan_2d', 'cross-scan+mamba_ssm', 'memory', .5, STAGES_64, PASSES[1:], BOTH, True),
)
# ours in strong colours
STYLES = {'native': ('#d9822b', 'o'), 'triton': ('#d9822b', 'D'), 'chunked': ('#2563a8', 's'),
          'reference': ('#2563a8', 'v'), 'plain': ('#111111', 'X'), 'compiled': ('#8a6d3b', 'P'),
          'parallel': ('#7b4ea3', '^'), 'mamba_ssm': ('#c62828', '*'), 'cross-scan+mamba_ssm': ('#c62828', '*'),
          'cross-scan': ('#d16ba5', '<'), 'four-scans': ('#2e7d32', '>'), 'matmuls': ('#2e7d32', 'd'),
          'attention': ('#9a9a9a', 'p')}
KNOWN = list(dict.fromkeys([*OURS, *(name for op in OPS.values() for name in op.peers)]))


def describe(settings: dict[str, Any], whole: bool = True) -> str:
    """Return in words what is measured; without the shape, what the lines of a table share."""
    shape = f' {tuple(settings["shape"])}' if whole else ''
    where = f'{settings["threads"]} thread(s)' if settings['device'] == 'cpu' else ''
    return ', '.join(filter(None, (settings['op'] + shape, settings['pass'], settings['dtype'],
                                   settings.get('layout'), settings['device'], where)))


def chosen(cell: Cell) -> str | None:
    """Return the contestant that models run with."""
    return next((row['contestant'] for row in cell['rows'] if row.get('chosen')), None)


def time_over(cell: Cell, first: str | None, second: str | None) -> tuple[float, float, float] | None:
    """Return how many times as long one contestant takes as another: median, lower and upper quartile."""
    return quotient(cell['rows'], 'contestant', first, second) if first and second else None


def memory_over(cell: Cell, first: str | None, second: str) -> float | None:
    """Return how many times as many bytes a run of one contestant adds as one of another."""
    peaks = {row['contestant']: row.get('peak_memory') for row in cell['rows']}
    return peaks[first] / peaks[second] if peaks.get(first) and peaks.get(second) else None


def _table_row(cell: Cell, row: dict[str, Any]) -> list[str]:
    shape = ' x '.join(map(str, cell['settings']['shape']))
    if 'error' in row:
        return [shape, row['contestant'], describe_failure(row), *[''] * 6]
    found = time_over(cell, row['contestant'], chosen(cell))
    return [shape, row['contestant'], f'{row["ms"]:.3f}', f'{row["least_ms"]:.3f}',
            describe_quotient(found) if found and not row.get('chosen') else '',
            describe_megabytes(row['peak_memory']) if row.get('peak_memory') is not None else '',
            f'{row["bandwidth"] / 1e9:.1f}' if 'bandwidth' in row else '',
            f'{100 * row["bandwidth"] / row["copy_bandwidth"]:.0f} %' if 'bandwidth' in row else '',
            f'{row["difference"]:.1e}' if 'difference' in row else 'not compared']


def groups(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return cells that differ in nothing but their shape, by what they share, in words."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(describe(cell['settings'], False), []).append(cell)
    return found


def make_report(cells: Sequence[Cell]) -> str:
    """Return the tables in Markdown, and where it was measured."""
    lines = []
    for words, group in groups(cells).items():
        axes = ' x '.join(OPS[group[0]['settings']['op']].axes)
        heading = (axes, 'contestant', 'ms', 'least ms', 'time / ours', 'peak MB', 'GB/s', 'of a copy', 'rel. RMS')
        rows = [_table_row(cell, row) for cell in group for row in cell['rows']]
        used = [i for i in range(len(heading)) if i < 3 or any(row[i] for row in rows)]
        lines += [f'## {words}', '',
                  *make_table([heading[i] for i in used], [[row[i] for i in used] for row in rows], 2), '']
    return '\n'.join([*lines, *describe_places(cells)])


def _verdict(bar: Bar, cell: Cell) -> Judged | None:
    layout = f'{cell["settings"]["layout"]}, ' if 'layout' in cell['settings'] else ''
    if bar.kind == 'memory':
        found = memory_over(cell, chosen(cell), bar.peer)
        return found and (found <= bar.limit, f'{layout}{found:.2f} of its memory, at most {bar.limit}')
    ends = (bar.peer, chosen(cell)) if bar.kind == 'speed' else (chosen(cell), bar.peer)
    times = time_over(cell, *ends)
    if times is None:
        return None
    words = layout + describe_quotient(times)
    if bar.kind == 'speed':
        return times[0] >= bar.limit, f'{words} times as fast, at least {bar.limit:g}'
    return times[0] <= bar.limit, f'{words} of its time, at most {bar.limit:g}'


def _on_gpu(cell: Cell) -> bool:
    return torch.device(cell['settings']['device']).type != 'cpu'


def judge_bars(cells: Sequence[Cell]) -> list[Judged]:
    """Return for each limit on the devices of these cells whether it is met, None where it was not measured."""
    kinds = set(map(_on_gpu, cells))
    found: list[Judged] = []
    for bar in (bar for bar in BARS if bar.gpu in kinds):
        for stage, dtype in itertools.product(bar.passes, bar.dtypes):
            what, missing = f'{bar.op}, {stage}, {dtype}, beside {bar.peer}', []
            for shape in bar.shapes:
                about = [cell for cell in cells if _on_gpu(cell) is bar.gpu and [bar.op, list(shape), stage, dtype] == [
                    cell['settings'][key] for key in ('op', 'shape', 'pass', 'dtype')]]
                judged = judge(f'{what}, {shape}', about, lambda cell, bar=bar: _verdict(bar, cell))
                missing += [str(shape) for met, _ in judged if met is None]
                found += [one for one in judged if one[0] is not None]
            if missing:
                found.append((None, f'{what}, {", ".join(missing)}'))
    return found


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw times on log axes: a panel for each op, dtype and pass, a line for each shape, a mark a contestant."""
    panels: dict[str, dict[str, list[Cell]]] = {}
    for words, group in groups(cells).items():
        stage = group[0]['settings']['pass']
        panels.setdefault(words.replace(f'{stage}, ', '', 1), {})[stage] = group
    heights = [1.2 + .34 * max(map(len, row.values())) for row in panels.values()]
    stages = [stage for stage in PASSES if any(stage in row for row in panels.values())]
    figure = make_figure(5 + 4 * len(stages), .4 + sum(heights))
    grid = figure.subplots(len(panels), len(stages), squeeze=False, gridspec_kw={'height_ratios': heights})
    for (words, row), line in zip(panels.items(), grid, strict=True):
        for stage, axes in zip(stages, line, strict=True):
            if stage not in row:
                axes.set_axis_off()
                continue
            _fill(axes, row[stage], f'{words}: {stage}')
    share_legend(figure, STYLES)
    save_figure(figure, path)


def _fill(axes: Any, group: Sequence[Cell], title: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    times = [{row['contestant']: row['ms'] for row in cell['rows'] if 'ms' in row} for cell in group]
    lanes = {name: .17 * (-1) ** i for i, name in enumerate(name for name in STYLES if name not in OURS)}
    for name, (colour, marker) in STYLES.items():
        # peers above and below the line, or some would lie under ours
        points = [(found[name], y + lanes.get(name, 0)) for y, found in enumerate(times) if name in found]
        if points:
            axes.plot(*zip(*points), marker, color=colour, markersize=9 if marker == '*' else 7, label=name,
                      zorder=2 + (name in OURS))
    axes.set_xscale('log')
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(group)), [' x '.join(map(str, cell['settings']['shape'])) for cell in group], fontsize=8)
    axes.set_ylim(len(group) - .4, -.6)
    axes.set_xlabel('ms', fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=9, loc='left')
    axes.grid(True, axis='both', color='#e5e5e5', linewidth=.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right', 'left']].set_visible(False)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--op', nargs='+', choices=[*OPS, 'all'], metavar='OP',
                        help=f'{", ".join(OPS)}, or all (default: selective_scan, or those of the preset)')
    parser.add_argument('--preset', choices=PRESETS, help='the cases of the published limits; other options override '
                                                          'it')
    parser.add_argument('--shape', nargs='+', type=int, action='append', metavar='N',
                        help='sizes of one op: ' + '; '.join(f'{" ".join(op.axes)} for {name}'
                                                             for name, op in OPS.items()) + '; may repeat')
    parser.add_argument('--dtype', nargs='+', choices=BOUNDS, help='of the maps (default: float32); parameters are '
                                                                   'float32')
    parser.add_argument('--passes', nargs='+', choices=PASSES, help='default: both')
    parser.add_argument('--contestants', nargs='+', choices=KNOWN, metavar='NAME',
                        help=f'{", ".join(KNOWN)}, where an op has them')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), metavar='N', help='on a CPU')
    parser.add_argument('--device', default='cpu', help='where to compute (default: cpu)')
    parser.add_argument('--rounds', type=int, default=10, metavar='N', help='rounds (default: 10)')
    parser.add_argument('--min-seconds', type=float, default=.5, metavar='S',
                        help='run quick contestants more often in a round, so that its rounds take this long together '
                             '(default: 0.5)')
    parser.add_argument('--max-seconds', type=float, default=60., metavar='S',
                        help='fewer rounds (but 3) of a case that takes longer (default: 60)')
    parser.add_argument('--compile-seconds', type=float, default=300., metavar='S',
                        help='leave torch.compile out of a case where it takes longer (default: 300)')
    parser.add_argument('--memory', action=argparse.BooleanOptionalAction,
                        help='peaks of memory (default: of selective_scan_2d; of all ops on a GPU)')
    parser.add_argument('--bandwidth', action=argparse.BooleanOptionalAction,
                        help='bytes that must be moved over the time, beside a copy (default: on a GPU)')
    add_result_options(parser, 'cases')


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.render and (args.json is None or args.op or args.preset):
        parser.error('--render takes --json, and no --op or --preset')
    args.op = list(OPS) if args.op and 'all' in args.op else args.op
    if args.shape:
        names = args.op or ['selective_scan']
        axes = OPS[names[0]].axes
        if len(names) > 1:
            parser.error(f'--shape is of one op, got {", ".join(names)}')
        for shape in args.shape:
            if len(shape) != len(axes) or min(shape) < 1:
                parser.error(f'--shape of {names[0]} takes {" ".join(axes)}, each 1 or more, got {shape}')
    for option, value, least in (('--rounds', args.rounds, 1), ('--threads', args.threads, 1),
                                 ('--min-seconds', args.min_seconds, 0), ('--max-seconds', args.max_seconds, 0)):
        if not least <= value < math.inf:
            parser.error(f'{option} must be {least} or more, got {value}')
    if args.preset == 'gpu' and torch.device(args.device).type == 'cpu' and not args.shape:
        parser.error('--preset gpu is for a GPU: give --device, or small cases by --op and --shape')
    if not 0 < args.compile_seconds < math.inf:
        parser.error(f'--compile-seconds must be above 0, got {args.compile_seconds}')


def _parts(args: argparse.Namespace) -> Iterator[Part]:
    names = args.op or (OPS if args.preset else ['selective_scan'])
    parts = [part for part in PRESETS.get(args.preset, ()) if part.op in names]
    if args.shape or not args.preset:
        parts = [dataclasses.replace(next((part for part in parts if part.op == name), Part(name, ())),
                                     shapes=tuple(map(tuple, args.shape or OPS[name].shapes))) for name in names]
    for part in parts:
        yield dataclasses.replace(part, passes=tuple(args.passes or part.passes),
                                  dtypes=tuple(args.dtype or part.dtypes))


def _contestants(part: Part, args: argparse.Namespace) -> list[str]:
    op = OPS[part.op]
    usual = usual_contestants(op, torch.device(args.device))
    if args.contestants:
        return [name for name in args.contestants if name in op.peers or name in own_backends(op)]
    return usual if part.peers is None else [*part.peers, *(name for name in usual if name in OURS)]


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the settings of every case that the options ask for."""
    jobs, gpu = [], torch.device(args.device).type != 'cpu'
    for part in _parts(args):
        common = {'op': part.op, 'contestants': _contestants(part, args), 'device': args.device,
                  'threads': args.threads, 'memory': OPS[part.op].memory or gpu if args.memory is None else args.memory,
                  'bandwidth': gpu if args.bandwidth is None else args.bandwidth}
        if common['contestants']:
            jobs += [{**common, 'shape': list(shape), 'dtype': dtype, 'pass': stage,
                      **({'layout': layout} if layout else {})}
                     for layout in part.layouts or OPS[part.op].layouts
                     for dtype in part.dtypes for stage in part.passes for shape in part.shapes]
    if not jobs:
        raise ValueError(f'nothing to measure: no op asked for has {" or ".join(args.contestants or ["cases"])}')
    return jobs


def _measure_all(args: argparse.Namespace, kept: list[Cell]) -> list[Cell]:
    check_threads(args.threads)
    options = {'rounds': args.rounds, 'min_seconds': args.min_seconds, 'max_seconds': args.max_seconds,
               'compile_seconds': args.compile_seconds}
    return measure_cells(plan(args), kept, lambda settings: measure(settings, options),
                         lambda: describe_setup(torch.device(args.device), args.threads), describe, 'contestant',
                         options, args.json, args.again)


def _benchmark(args: argparse.Namespace) -> int:
    return report_cells(args, lambda kept: _measure_all(args, kept), make_report, judge_bars, draw,
                        ('op', 'shape', 'pass', 'dtype'))


# a device that cannot be used raises a RuntimeError or an AssertionError
main = Command((__doc__ or '').partition('\n')[0], _add_options, _benchmark, _check_options,
               (OSError, ValueError, ImportError, RuntimeError, AssertionError),
               'stopped; with --json finished cases are kept, and the same command goes on from there')

if __name__ == '__main__':
    sys.exit(main())
