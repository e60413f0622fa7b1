"""Measure whole models beside those of timm: latency, images per second and peak memory over batches and resolutions.

    python tools/benchmark.py vmamba_tiny vssd_tiny --peers swin_tiny --size 224 512 1024 --threads 2 --json tiny.json
    python tools/benchmark.py --preset classification --bars --json cpu.json --plot cpu.png --markdown cpu.md
    python tools/benchmark.py --preset training --device cuda --json train.json     # AMP, batch 128
    python tools/benchmark.py --render --json cpu.json --plot cpu.png               # measures nothing

All models of one size and batch run in alternation in a process of their own, and ratios are medians of the quotients
within rounds. Finished sizes are kept in the JSON: after a stop the same command goes on.
"""
import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    from visionssm_launcher import importing

    with importing():
        import numpy as np
        import timm
        import torch
        from _figures import make_figure, save_figure, share_legend

        import visionssm
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
        from visionssm.commands.bench import DTYPES, REFUSALS, Case, compare_apart
        from visionssm.utils.command import Command
        from visionssm.utils.suggest import did_you_mean
except ImportError as error:
    sys.exit(f'{error}: install the checkout first, with `pip install -e .`')


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is measured where options do not say otherwise."""
    models: tuple[str, ...]
    peers: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]  # size, batch
    task: str = 'forward'
    dtype: str = 'float32'


@dataclasses.dataclass(frozen=True)
class Bar:
    """How long models may take beside a peer."""
    models: tuple[str, ...]
    peer: str
    size: int
    batches: tuple[int, ...]
    limit: float


SHORT = {'deit_tiny': 'deit_tiny_patch16_224', 'deit_small': 'deit_small_patch16_224',
         'swin_tiny': 'swin_tiny_patch4_window7_224'}
HIERARCHICAL = ('vmamba_tiny', 'vssd_tiny', 'spatial_mamba_tiny', 'mamba2d_tiny')
PRESETS = {
    'classification': Preset(
        ('vim_tiny', *HIERARCHICAL), ('deit_tiny', 'deit_small', 'swin_tiny', 'convnext_tiny', 'mambaout_tiny'),
        ((224, 1), (224, 8), (384, 1), (512, 1), (1024, 1), (2048, 1))),
    'training': Preset(HIERARCHICAL, ('swin_tiny', 'convnext_tiny'), ((224, 128),), 'train', 'bfloat16'),
}
BARS = (Bar(('vim_tiny',), 'deit_tiny', 224, (1, 8), 1.5), Bar(HIERARCHICAL, 'swin_tiny', 224, (1, 8), 1.5),
        Bar(('vim_tiny', *HIERARCHICAL), 'deit_small', 1024, (1,), 1.))
LINEAR = .1  # how far memory may lie from a straight line over pixels
PAGES = 2e6  # bytes by which the memory of a process differs from run to run
# families told apart by colour-blind readers too
COLOURS = {'vim': '#2563a8', 'vmamba': '#d9822b', 'vssd': '#2e7d32', 'spatial_mamba': '#c62828', 'mamba2d': '#7b4ea3',
           'deit': '#111111', 'swin': '#8a6d3b', 'convnext': '#3aa6b9', 'mambaout': '#d16ba5'}
OTHERS = ('#666666', '#9aa51b', '#5b8def', '#b35900')
MARKERS = 'osD^vPX*<>'


def short(name: str) -> str:
    """Return a name without the patches and the size that timm's have."""
    return re.sub(r'_patch\d+.*', '', name)


def resolve(name: str) -> str:
    """Return the full name of a model of this package or of timm."""
    full = SHORT.get(name, name)
    if not timm.is_model(full.partition('.')[0]) and full not in visionssm.list_models():
        known = [*SHORT, *visionssm.list_models(), *timm.list_models()]
        raise ValueError(f'Unknown model {name!r}. {did_you_mean(name, known)}')
    return full


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Describe what numbers depend on."""
    return {**describe_setup(device, threads), 'timm': timm.__version__}


def measure(settings: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure all models at one size and batch; a model that does not run has a row with its error."""
    names = dict.fromkeys([*settings['models'], *settings['peers']])
    train = settings['task'] == 'train'
    cases = [Case(name, settings['batch_size'], settings['size'], train, settings['dtype'], settings['device'],
                  settings['compiled'], settings['channels_last'], update=train) for name in names]
    try:
        rows = compare_apart(cases, settings['threads'], keep_going=True, memory=settings['memory'], **options)
    except REFUSALS as error:
        rows = [{'model': name, 'error': str(error).partition('\n')[0]} for name in names]
    kept = ('model', 'error', 'ms', 'least_ms', 'images_per_s', 'rounds_ms', 'peak_memory', 'held_memory')
    return [{key: row[key] for key in kept if row.get(key) is not None} for row in rows]


def ratio(cell: Cell, model: str, peer: str) -> tuple[float, float, float] | None:
    """Return how many times as long a model takes as a peer in one cell: median, lower and upper quartile."""
    return quotient(cell['rows'], 'model', model, peer)


def fit_memory(pixels: Sequence[int], memory: Sequence[float]) -> dict[str, Any] | None:
    """Fit memory over the number of pixels by a power law and by a straight line, relative errors alike at all sizes.

    Args:
        pixels: Pixels of a picture.
        memory: Bytes, above 0.

    Returns:
        `exponent` and its `residual` (RMS, relative) of the power law; `constant` and `slope` (bytes a pixel) of the
        line and the largest relative `deviation` from it. `linear` is True where the line fits and a constant with
        the square of the pixels does not, False where the line does not fit, and None where both do, as they always
        do with fewer than three sizes. None with fewer than two sizes.
    """
    if len(set(pixels)) < 2 or min(memory) <= 0:
        return None
    p, m = np.array(pixels, float), np.array(memory, float)
    exponent, level = np.polyfit(np.log(p), np.log(m), 1)
    residual = np.log(m) - exponent * np.log(p) - level
    (constant, slope), deviation = _fit_line(p, m)
    linear = None if deviation <= LINEAR and _fit_line(p ** 2, m)[1] <= LINEAR else deviation <= LINEAR
    return {'exponent': float(exponent), 'residual': float(np.sqrt((residual ** 2).mean())), 'constant': constant,
            'slope': slope, 'deviation': deviation, 'linear': linear}


def _fit_line(x: np.ndarray, y: np.ndarray) -> tuple[list[float], float]:
    """Return the constant and the slope of least relative squares, and the largest relative deviation."""
    known = y + PAGES
    relative = np.stack([1 / known, x / known], 1)
    scale = relative.max(0)
    line = np.linalg.lstsq(relative / scale, y / known, rcond=None)[0] / scale
    return line.tolist(), float(abs(relative @ line - y / known).max())


def groups(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Return cells that differ in nothing but their size, by what they share, in words."""
    found: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell['settings']['batch_size'], cell['settings']['size'])):
        found.setdefault(describe(cell['settings']), []).append(cell)
    return found


def describe(settings: dict[str, Any]) -> str:
    """Return in words what the cells of a sweep over sizes share."""
    words = ['training step' if settings['task'] == 'train' else 'forward', f'batch {settings["batch_size"]}',
             settings['dtype'], settings['device']]
    if settings['device'] == 'cpu':
        words.append(f'{settings["threads"]} thread(s)')
    return ', '.join([*words, *(word for key, word in (('channels_last', 'channels last'), ('compiled', 'compiled'))
                                if settings[key])])


def curves(cells: Sequence[Cell], field: str) -> dict[str, dict[int, float]]:
    """Return sizes and values of every model in a group of cells; 'memory' is what a run adds to what is held."""
    found: dict[str, dict[int, float]] = {}
    for cell in cells:
        for row in cell['rows']:
            value = row.get('ms') if field == 'ms' else row.get('peak_memory', 0) - row.get('held_memory', 0)
            if value:
                found.setdefault(row['model'], {})[cell['settings']['size']] = value
    return found


def _cell_table(cell: Cell) -> list[str]:
    peers = cell['settings']['peers']
    rows = []
    for row in cell['rows']:
        name = f'`{row["model"]}`'
        if 'error' in row:
            rows.append([name, describe_failure(row), *[''] * (2 + len(peers))])
            continue
        ratios = []
        for peer in peers:
            found = None if row['model'] == peer else ratio(cell, row['model'], peer)
            ratios.append(describe_quotient(found) if found else '')
        memory = describe_megabytes(row['peak_memory']) if 'peak_memory' in row else ''
        speed = row['images_per_s']
        rows.append([name, f'{row["ms"]:.2f}', f'{speed:.{1 if speed >= 10 else 3}f}', memory, *ratios])
    return make_table(['model', 'ms', 'images/s', 'peak MB', *(f'time / {short(peer)}' for peer in peers)], rows)


def _memory_rows(cells: Sequence[Cell]) -> Iterator[list[str]]:
    for name, values in curves(cells, 'memory').items():
        found = fit_memory([size * size for size in values], list(values.values()))
        if found is None:
            continue
        law = f'pixels^{found["exponent"]:.2f} (residual {100 * found["residual"]:.1f} %)'
        line = (f'{found["constant"] / 1e6:.1f} MB + {found["slope"]:.0f} B a pixel '
                f'(within {100 * found["deviation"]:.1f} %)')
        verdict = {True: 'yes', False: 'no', None: 'not told by these sizes'}[found['linear']]
        yield [f'`{name}`', ', '.join(map(str, values)), law, line, verdict]


def make_report(cells: Sequence[Cell]) -> str:
    """Return the tables in Markdown: times and ratios of each cell, memory over pixels, and where it was measured."""
    lines = []
    for words, group in groups(cells).items():
        for cell in group:
            size = cell['settings']['size']
            lines += [f'## {words.capitalize()}, {size} x {size}', '', *_cell_table(cell), '']
        rows = list(_memory_rows(group))
        if rows:
            heading = ('model', 'sizes', 'memory ~', 'straight line', 'linear in pixels')
            lines += [f'## Memory over pixels: {words}', '', *make_table(heading, rows, 5), '']
    return '\n'.join([*lines, *describe_places(cells)])


def judge_bars(cells: Sequence[Cell]) -> list[Judged]:
    """Return for each bar whether it is met, None where it was not measured, and what was found."""
    found: list[Judged] = []
    for bar in BARS:
        for batch, model in ((batch, model) for batch in bar.batches for model in bar.models):
            about = [cell for cell in cells if (bar.size, batch, 'forward') == tuple(
                cell['settings'][key] for key in ('size', 'batch_size', 'task'))]
            found += judge(f'{model} / {bar.peer}, batch {batch}, {bar.size} x {bar.size}', about,
                           lambda cell, bar=bar, model=model: _verdict(bar, model, cell))
    return found


def _verdict(bar: Bar, model: str, cell: Cell) -> Judged | None:
    taken = ratio(cell, model, resolve(bar.peer))
    return taken and (taken[0] < bar.limit if bar.limit == 1 else taken[0] <= bar.limit,
                      f'{describe_quotient(taken)}, limit {bar.limit} [{describe(cell["settings"])}]')


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw latency and memory over the size on log axes, a row of panels for each batch and kind of run with sizes."""
    sweeps = groups(cells)
    # a single size is no curve, unless there is nothing else to draw
    sweeps = {words: group for words, group in sweeps.items() if len(group) > 1} or sweeps
    figure = make_figure(12, 4.4 * len(sweeps))
    panels = figure.subplots(len(sweeps), 2, squeeze=False)
    names = {name: name in cell['settings']['peers'] for cell in cells for name in
             [*cell['settings']['models'], *cell['settings']['peers']]}
    styles = _styles(names)
    for (words, group), (left, right) in zip(sweeps.items(), panels, strict=True):
        for axes, field, unit, scale in ((left, 'ms', 'latency (ms)', 1), (right, 'memory', 'peak memory (MB)', 1e-6)):
            found = curves(group, field)
            for name, values in found.items():
                axes.plot(list(values), [scale * value for value in values.values()], label=short(name), **styles[name])
            _guide(axes, [{size: scale * value for size, value in values.items()} for values in found.values()])
            _dress(axes, sorted({size for values in found.values() for size in values}), f'{unit}: {words}')
    share_legend(figure, [*(short(name) for name in names), 'linear in pixels'])
    save_figure(figure, path)


def _styles(names: dict[str, bool]) -> dict[str, dict[str, Any]]:
    """Return the look of each curve: a colour for each family, peers dashed, members of a family by markers."""
    families: dict[str, list[str]] = {}
    for name in names:
        known = next((family for family in COLOURS if name.startswith(f'{family}_')), None)
        families.setdefault(known or name.partition('_')[0], []).append(name)
    spare = iter(OTHERS * len(names))
    colours = {family: COLOURS.get(family) or next(spare) for family in families}
    dashes = ('--', ':', '-.')
    return {name: {'color': colours[family], 'marker': MARKERS[(i + j) % len(MARKERS)], 'markersize': 5,
                   'linewidth': 1.4 if names[name] else 2., 'linestyle': dashes[j % 3] if names[name] else '-'}
            for i, (family, members) in enumerate(families.items()) for j, name in enumerate(members)}


def _guide(axes: Any, found: list[dict[int, float]]) -> None:
    """Draw the slope of what is linear in pixels, below the curves."""
    sizes = sorted({size for values in found for size in values})
    if len(sizes) > 1:
        least = .7 * min(value * (sizes[0] / size) ** 2 for values in found for size, value in values.items())
        axes.plot([sizes[0], sizes[-1]], [least, least * (sizes[-1] / sizes[0]) ** 2], color='#bbbbbb', linewidth=1,
                  label='linear in pixels', zorder=1)


def _dress(axes: Any, sizes: list[int], title: str) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_xscale('log', base=2)
    axes.set_yscale('log')
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=9)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    axes.set_xlabel('height and width in pixels', fontsize=9)
    axes.set_title(title, fontsize=10, loc='left')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.grid(True, color='#e5e5e5', linewidth=.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('names', nargs='*', metavar='NAME', help='models of this package')
    parser.add_argument('--peers', nargs='*', metavar='NAME', help='models that ratios are taken to; deit_tiny, '
                                                                   'deit_small and swin_tiny stand for those of timm')
    parser.add_argument('--preset', choices=PRESETS, help='models, peers, sizes and kind of run of the published '
                                                          'comparison; other options override it')
    parser.add_argument('--task', choices=('forward', 'train'), help='train: forward, backward and a step of AdamW')
    parser.add_argument('--batch-size', type=int, nargs='+', metavar='N', help='pictures at a time (default: 1)')
    parser.add_argument('--size', type=int, nargs='+', metavar='PIXELS', help='height and width (default: 224)')
    parser.add_argument('--dtype', choices=DTYPES, help='of autocast (default: float32, which is none)')
    parser.add_argument('--channels-last', action='store_true', help='memory format of weights and pictures')
    parser.add_argument('--compile', action='store_true', help='run what torch.compile makes of the models')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), metavar='N', help='on a CPU')
    parser.add_argument('--device', default='cpu', help='where to compute (default: cpu)')
    parser.add_argument('--rounds', type=int, default=10, metavar='N', help='rounds (default: 10)')
    parser.add_argument('--warmup', type=int, default=2, metavar='N', help='runs before (default: 2)')
    parser.add_argument('--min-seconds', type=float, default=0., metavar='S',
                        help='run quick models more often in a round, so that its rounds take this long together')
    parser.add_argument('--no-memory', action='store_true', help='measure times alone')
    add_result_options(parser, 'sizes')


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.render and (args.json is None or args.names or args.preset):
        parser.error('--render takes --json, and no models')
    if not (args.render or args.names or args.preset):
        parser.error('give models or --preset')
    least = {'--batch-size': min(args.batch_size or [1]), '--size': min(args.size or [1]), '--rounds': args.rounds,
             '--threads': args.threads}
    for option, value in least.items():
        if value < 1:
            parser.error(f'{option} must be 1 or more, got {value}')
    if args.warmup < 0 or not 0 <= args.min_seconds < math.inf:
        parser.error('--warmup and --min-seconds must be 0 or more')


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the settings of every cell that the options ask for."""
    preset = PRESETS[args.preset] if args.preset else Preset((), (), ((224, 1),))
    models = [resolve(name) for name in args.names or preset.models]
    peers = [resolve(name) for name in (preset.peers if args.peers is None else args.peers)]
    cells = list(preset.cells)
    if args.size or args.batch_size:
        sizes = args.size or list(dict.fromkeys(size for size, _ in cells))
        batches = args.batch_size or list(dict.fromkeys(batch for _, batch in cells))
        cells = [(size, batch) for batch in batches for size in sizes]
    common = {'models': models, 'peers': peers, 'task': args.task or preset.task, 'dtype': args.dtype or preset.dtype,
              'channels_last': args.channels_last, 'compiled': args.compile, 'device': args.device,
              'threads': args.threads, 'memory': not args.no_memory}
    return [{**common, 'size': size, 'batch_size': batch} for size, batch in cells]


def _measure_all(args: argparse.Namespace, kept: list[Cell]) -> list[Cell]:
    check_threads(args.threads)
    options = {'rounds': args.rounds, 'warmup': args.warmup, 'min_seconds': args.min_seconds}
    return measure_cells(plan(args), kept, lambda settings: measure(settings, options),
                         lambda: environment(torch.device(args.device), args.threads),
                         lambda settings: f'{describe(settings)}, {settings["size"]} x {settings["size"]}', 'model',
                         options, args.json, args.again)


def _benchmark(args: argparse.Namespace) -> int:
    return report_cells(args, lambda kept: _measure_all(args, kept), make_report, judge_bars, draw,
                        ('task', 'size', 'models', 'peers'))


# a device that cannot be used raises a RuntimeError or an AssertionError
main = Command((__doc__ or '').partition('\n')[0], _add_options, _benchmark, _check_options,
               (OSError, ValueError, ImportError, RuntimeError, AssertionError),
               'stopped; with --json finished cells are kept, and the same command goes on from there')

if __name__ == '__main__':
    sys.exit(main())
