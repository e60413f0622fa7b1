"""Export models to ONNX, compare each file with its model at two sizes, and write the table in docs/export.md.

    python tools/make_export_table.py                  # a small model of every family
    python tools/make_export_table.py vmamba_small     # a model more; --all for every model there is
    python tools/make_export_table.py --dynamic vim_pico    # a graph for any number of pictures, compared with 1 and 3
    python tools/make_export_table.py --check          # exit 1 unless the page shows what was measured

Each row is a run of tools/export.py in a process of its own. Finished rows are kept in docs/export.json: after a stop
the same command goes on, and a row is measured again where versions or machine are others.
"""
import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    from visionssm_launcher import importing

    with importing():
        import torch
        from timm.models import model_entrypoint
        from tqdm import tqdm

        import visionssm
        from visionssm.analysis.timing import device_name
        from visionssm.models._tasks import task_models
        from visionssm.utils.command import Command
        from visionssm.utils.files import atomic_write
except ImportError as error:
    sys.exit(f'{error}: install the checkout first, with `pip install -e .[export]`')

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'export.md'
ROWS = ROOT / 'docs' / 'export.json'
# a small one of every family, at its published size
MODELS = ('vim_tiny', 'vmamba_tiny', 'vssd_micro', 'spatial_mamba_tiny', 'mamba2d_nano', 'mhs_vm_tiny', 'vim2_tiny',
          'mamba_yolo_tiny', 'vm_unet', 'mhs_vm_unet_3h', 'mambair_light_sr_x2', 'mambairv2_light_sr_x2',
          'dis_small_patch4')
BEGIN, END = '<!-- made by tools/make_export_table.py; do not edit below -->', '<!-- end of the table -->'
COLUMNS = ('model', 'task', 'input', 'pictures', 'largest relative difference', 'nodes', 'MB', 'ONNX Runtime (ms)',
           'PyTorch (ms)', 'ONNX Runtime / PyTorch')


def tasks() -> dict[str, str]:
    """Return the task of every model."""
    names = dict.fromkeys(visionssm.list_models('classification'), 'classification')
    return names | {name: task for task, entries in task_models().items() for name in entries}


def family(name: str, task: str) -> str:
    """Return the module that a model is written in."""
    return (model_entrypoint(name) if task == 'classification' else task_models()[task][name]).__module__


def sizes(name: str, task: str) -> list[tuple[int, int]]:
    """Return the two sizes to export at: the model's own, and one that is not square unless the model demands it."""
    with torch.device('meta'):
        model = visionssm.create_model(name)
    height, width = model.pretrained_cfg['input_size'][-2:]
    step = 32 if height >= 128 else 8
    less = max(height * 3 // 4 // step * step, step)
    return [(height, width), (less, less if task == 'diffusion' else width)]


def setup() -> dict[str, str]:
    """Describe what numbers depend on."""
    import onnx
    import onnxruntime

    return {'device': f'{device_name(torch.device("cpu"))}, {torch.get_num_threads()} thread(s)',
            'torch': torch.__version__, 'onnx': onnx.__version__, 'onnxruntime': onnxruntime.__version__,
            'visionssm': visionssm.__version__}


def measure(name: str, size: tuple[int, int], dynamic: bool, runs: int) -> dict[str, Any]:
    """Run the export, and return what it says; its error where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, os.fspath(ROOT / 'tools' / 'export.py'), name, '--size', *map(str, size),
                   '--runs', str(runs), '--json', '-o', os.fspath(Path(folder, 'model.onnx')),
                   *(['--dynamic'] if dynamic else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
        return {'error': said.removeprefix('error: ').replace(os.fspath(Path(folder, 'model.onnx')), 'the file')}
    return json.loads(done.stdout.splitlines()[-1])


def read_rows() -> dict[str, dict[str, Any]]:
    """Return the finished rows by model and size."""
    try:
        return json.loads(ROWS.read_text(encoding='utf-8')) if ROWS.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f'{ROWS} is damaged: {error}. Remove it, and all rows are measured again') from error


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield from (f'`{row["name"]}`', row['task'], ' x '.join(map(str, row['size'])))
    if 'error' in row:
        yield from ('', f'failed: {row["error"]}', *[''] * 5)
        return
    slow, torch_ms, error = row['onnxruntime_ms'], row['pytorch_ms'], f'{row["relative_error"]:.1e}'
    if 'own_rounding' in row:
        error += f' (the model from itself in float64: {row["own_rounding"]:.1e})'
    yield from (', '.join(map(str, row['pictures'])), error, str(row['nodes']),
                f'{row["megabytes"]:.1f}', f'{slow:.0f}', f'{torch_ms:.0f}', f'{slow / torch_ms:.2f}')


def make_section(rows: dict[str, dict[str, Any]]) -> str:
    """Return what stands between the marks of the page."""
    lines = [f'| {" | ".join(COLUMNS)} |', '|---|---|---|' + '---:|' * (len(COLUMNS) - 3)]
    shown = sorted(rows.values(), key=lambda row: (row['task'], row['name'], -row['size'][0] * row['size'][1]))
    lines += [f'| {" | ".join(_cells(row))} |' for row in shown]
    days = sorted({row['date'] for row in shown})
    for where in sorted({json.dumps(row['setup']) for row in shown}):
        lines += ['', ', '.join(f'{key} {value}' for key, value in json.loads(where).items()) + '.']
    lines += ['', f'{len(shown)} comparisons, {" to ".join(dict.fromkeys([days[0], days[-1]]))}.'] if days else []
    return '\n'.join([BEGIN, '', *lines, '', END])


def update_page(rows: dict[str, dict[str, Any]], check: bool) -> bool:
    """Put the table in the page, or compare only; return whether it was there already."""
    page = PAGE.read_text(encoding='utf-8')
    if BEGIN not in page or END not in page:
        raise ValueError(f'{PAGE} lacks the lines {BEGIN!r} and {END!r}, between which the table belongs')
    head, rest = page.split(BEGIN)
    new = head + make_section(rows) + rest.split(END)[1]
    if new != page and not check:
        atomic_write(new, PAGE)
    return new == page


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('names', nargs='*', metavar='NAME', help='models (default: a small one of each family)')
    parser.add_argument('--all', action='store_true', help='every model, which takes hours')
    parser.add_argument('--dynamic', action='store_true', help='graphs for any number of pictures, which take twice as '
                                                               'long to write')
    parser.add_argument('--runs', type=int, default=5, help='timed runs of each (default: 5)')
    parser.add_argument('--again', action='store_true', help='measure finished rows too')
    parser.add_argument('--check', action='store_true', help='measure nothing; exit code 1 if the page is stale')


def _make(args: argparse.Namespace) -> int:
    rows = read_rows()
    if args.check:
        current = update_page(rows, check=True)
        sys.stderr.write('' if current else f'{PAGE} does not show what {ROWS} holds; run tools/make_export_table.py\n')
        return 0 if current else 1
    known, here = tasks(), setup()
    unknown = [name for name in args.names if name not in known]
    if unknown:
        raise ValueError(f'no models of this package: {", ".join(unknown)}')
    names = list(known) if args.all else args.names or MODELS
    jobs = [(name, size) for name in names for size in sizes(name, known[name])]
    failed = 0
    for name, size in tqdm(jobs, unit='file', disable=None):
        key = f'{name} {size[0]} x {size[1]}'
        if not args.again and key in rows and rows[key]['setup'] == here and 'error' not in rows[key]:
            continue
        row = measure(name, size, args.dynamic, args.runs)
        tqdm.write(f'{key}: {row.get("error") or row["relative_error"]}', file=sys.stderr)
        failed += 'error' in row
        kept = {key: row[key] for key in ('pictures', 'relative_error', 'own_rounding', 'nodes', 'megabytes',
                                          'onnxruntime_ms', 'pytorch_ms', 'error') if key in row}
        rows[key] = {'name': name, 'task': known[name], 'size': list(size), **kept, 'setup': here,
                     'date': datetime.date.today().isoformat()}
        atomic_write(json.dumps(dict(sorted(rows.items())), indent=1) + '\n', ROWS)
        update_page(rows, check=False)
    update_page(rows, check=False)
    return 1 if failed else 0


main = Command((__doc__ or '').partition('\n')[0], _add_options, _make,
               stopped='stopped; finished rows are kept, and the same command goes on from there')

if __name__ == '__main__':
    sys.exit(main())
