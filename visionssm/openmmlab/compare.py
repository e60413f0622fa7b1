"""A comparison of model families: the same short training for each, a table and a plot."""
import argparse
import datetime
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.config import Config
from mmengine.device import get_device

from .._version import __version__
from ..analysis import count_flops
from ..analysis.timing import device_name
from ..utils.command import run_command
from ..utils.files import atomic_write
from ..utils.paths import config_root
from .check import ConfigError
from .classifier import create_timm_model
from .cli import USER_ERRORS, train, train_config
from .visuals import read_scalars, save_comparison, write_json

__all__ = ['compare', 'find_configs', 'format_report', 'summarise_run']

BASE = '_base_/pico_fashion-mnist.py'
# what makes two runs the same experiment
SAME = ('model', 'train_dataloader', 'val_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'randomness')


def find_configs() -> list[str]:
    """Names of the configs that only add a model to the shared base of the comparison."""
    folder = config_root() / 'classification'
    return sorted(path.stem for path in folder.glob('*.py')
                  if f"_base_ = '../{BASE}'" in path.read_text(encoding='utf-8'))


def describe_machine() -> dict[str, str]:
    """Describes what times and the last digits of accuracies depend on."""
    device = get_device()
    threads = f', {torch.get_num_threads()} threads' if device == 'cpu' else ''
    return {'device': f'{device} ({device_name(torch.device(device))}{threads})', 'python': platform.python_version(),
            'torch': torch.__version__, 'timm': timm.__version__, 'visionssm': __version__}


def _experiment(cfg: Config) -> str:
    return json.dumps({key: cfg.to_dict().get(key) for key in SAME}, sort_keys=True, default=str)


def summarise_run(name: str, cfg: Config) -> dict[str, Any]:
    """Reads what a finished training logged.

    Args:
        name: Name of the config.
        cfg: The config, with its work dir.

    Returns:
        `name`, `model`, `params`, `macs`, `top1` (per cent after each epoch), `seconds` of training without
        evaluation, `seconds_per_step` (median), and `images`, the number of test pictures.
    """
    records, checks = read_scalars(cfg.work_dir)
    accuracies = [record['accuracy/top1'] for record in checks]
    if len(accuracies) < cfg.train_cfg.max_epochs:
        raise ConfigError(f'{cfg.work_dir} has the accuracies of {len(accuracies)} epochs, not of '
                          f'{cfg.train_cfg.max_epochs}: run the comparison again to go on with the training')
    model = create_timm_model(**cfg.model.model)
    side = cfg.model.model.get('img_size', 28)
    cost = count_flops(model, (cfg.model.model.in_chans, side, side))
    steps = [now['iter'] - before for now, before in zip(records, [0, *(record['iter'] for record in records)])]
    results = json.loads(Path(cfg.work_dir, 'accuracy.json').read_text(encoding='utf-8'))
    return {'name': name, 'model': cfg.model.model.name, 'params': cost['params'], 'macs': cost['macs'],
            'top1': accuracies, 'seconds': sum(count * record['time'] for count, record in zip(steps, records)),
            'seconds_per_step': statistics.median(record['time'] for record in records), 'images': results['count']}


def _run(name: str, args: argparse.Namespace, train_tool: Path) -> dict[str, Any]:
    """Trains one family unless that is done, and returns its results."""
    command = [name, '--work-dir', str(Path(args.work_dir, name)), '--resume']
    if args.cfg_options:
        command += ['--cfg-options', *args.cfg_options]
    cfg = train_config(train.parse(command))
    path = Path(cfg.work_dir, 'result.json')
    if path.is_file():
        result = json.loads(path.read_text(encoding='utf-8'))
        if result['experiment'] != _experiment(cfg):
            raise ConfigError(f'{cfg.work_dir} holds a run with another config; remove it, or give another --work-dir')
        return result
    machine = describe_machine()
    done = subprocess.run([sys.executable, str(train_tool), *command], check=False)
    if done.returncode:
        raise ConfigError(f'the training of {name} ended with exit code {done.returncode}; its log is in '
                          f'{cfg.work_dir}, and the same command goes on from its last checkpoint')
    result = {**summarise_run(name, cfg), 'machine': machine, 'date': datetime.date.today().isoformat(),
              'experiment': _experiment(cfg)}
    write_json(result, path)
    return result


def format_report(results: Sequence[Mapping[str, Any]], plot: str, command: str) -> str:
    """Lays out the comparison as a page.

    Args:
        results: What `summarise_run` returns, with `machine` and `date`.
        plot: Address of the plot, relative to the page.
        command: The command that makes the page.

    Returns:
        Markdown.
    """
    ordered = sorted(results, key=lambda result: -result['top1'][-1])
    machines = list(dict.fromkeys(', '.join(f'{key} {value}' for key, value in result['machine'].items())
                                  for result in ordered))
    share = statistics.mean(result['top1'][-1] for result in ordered) / 100
    images = ordered[0]['images']
    error = 100 * math.sqrt(share * (1 - share) / images)
    rows = [f'| `{result["model"]}` | {result["params"] / 1e6:.2f} M | {result["macs"] / 1e6:.1f} M | '
            f'**{result["top1"][-1]:.2f}** | {max(result["top1"]):.2f} | {_minutes(result["seconds"])} | '
            f'{1000 * result["seconds_per_step"]:.0f} ms | {result["date"]} |' for result in ordered]
    epochs = len(ordered[0]['top1'])
    return '\n'.join([
        '# Comparison of the families', '',
        f'The smallest model of each family, trained alike: {epochs} epochs on the 6,000 pictures of Fashion-MNIST '
        'that ship with the package, batch 50, the same rate, schedule, augmentation, loss and seed '
        f'(`configs/{BASE}`). Nothing is tuned to a family, and sizes differ, so this shows that each one learns and '
        'what it costs at this size, not which family is better.', '',
        '| model | parameters | multiply-adds | top-1, last epoch | best epoch | training | a step | date |',
        '|---|---:|---:|---:|---:|---:|---:|---|', *rows, '',
        f'Accuracies are in per cent of {images:,} test pictures: their standard error is about {error:.1f}, so '
        f'neighbours within {2 * error * math.sqrt(2):.0f} points may change places with another seed. Training times '
        'are without evaluation; a step is one batch of 50, forward, backward and update (median).', '',
        f'![Accuracy after each epoch, by family]({plot})', '',
        '```bash', command, '```', '', 'Measured on: ' + '; '.join(machines) + '.', ''])


def _minutes(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d} min'


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Train the smallest model of every family alike, one after the other, and write a table and a '
                    'plot. Finished trainings are not repeated, and one that was stopped goes on.')
    parser.add_argument('--only', nargs='+', metavar='CONFIG', help='some configs instead of all')
    parser.add_argument('--work-dir', default='work_dirs/comparison', help='a folder in it for each training')
    parser.add_argument('--out', default='docs/comparison.md', help='the page to write')
    parser.add_argument('--plot', default='docs/images/comparison.png', help='the plot to write')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='override keys of all configs')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    args = parser.parse_args(argv)
    known = find_configs()
    wrong = sorted(set(args.only or ()) - set(known))
    if wrong:
        parser.error(f'{wrong[0]!r} is no config of the comparison, which are {", ".join(known)}')
    return args


def _compare(args: argparse.Namespace, train_tool: Path, command: str) -> int:
    results: list[dict[str, Any]] = []
    failed = []
    names = args.only or find_configs()
    for number, name in enumerate(names, 1):
        sys.stdout.write(f'[{number}/{len(names)}] {name}\n')
        sys.stdout.flush()
        try:
            results.append(_run(name, args, train_tool))
        except USER_ERRORS as error:
            if args.debug:
                raise
            # the other families go on
            sys.stderr.write(f'error: {error}\n')
            failed.append(name)
            continue
        sys.stdout.write(f'[{number}/{len(names)}] {name}: top-1 {results[-1]["top1"][-1]:.2f}, '
                         f'{_minutes(results[-1]["seconds"])}\n')
    if results:
        save_comparison({result['model'].removesuffix('_pico'): result['top1'] for result in results}, args.plot)
        plot = os.path.relpath(args.plot, Path(args.out).parent)
        atomic_write(format_report(results, Path(plot).as_posix(), command).encode(), args.out)
        sys.stdout.write(f'table: {args.out}, plot: {args.plot}\n')
    if failed:
        sys.stderr.write(f'error: not in the table: {", ".join(failed)}\n')
    return 1 if failed else 0


def compare(train_tool: str | Path, argv: Sequence[str] | None = None) -> int:
    """Runs `tools/compare_models.py`.

    Args:
        train_tool: Path of `tools/train.py`.
        argv: The arguments; None takes the process's.

    Returns:
        Exit code: 0 if all families are in the table.
    """
    args = _parse(argv)
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(['python', 'tools/compare_models.py', *given])
    return run_command(lambda: _compare(args, Path(train_tool), command), args.debug,
                       'stopped; the same command goes on', USER_ERRORS)
