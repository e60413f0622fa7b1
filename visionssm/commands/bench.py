"""`visionssm bench`: how fast models are, side by side, and how much memory they take."""
import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from .._factory import create_model
from ..analysis.cells import describe_megabytes
from ..analysis.timing import alternate, check_threads, describe_machine, held_memory, peak_memory, run_apart, runs_for
from ..export.inputs import example_inputs
from ..utils.command import Command
from .list import write_table

__all__ = ['DTYPES', 'REFUSALS', 'Case', 'bench', 'build_run', 'compare_apart', 'compare_models', 'measure_memory']

DTYPES = ('float32', 'bfloat16', 'float16')
# what models, layers and torch.compile raise on sizes and types that they do not take, or when memory is full
REFUSALS = (AssertionError, RuntimeError, ValueError, TypeError, ChildProcessError)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured of a model.

    Attributes:
        model: Name of a model of this package or of timm.
        batch_size: Images at a time.
        size: Height and width; None for the model's own.
        train: Forward and backward in training mode, instead of forward alone in evaluation mode.
        dtype: 'float32', or the type of autocast.
        device: Where.
        compiled: By `torch.compile`.
        channels_last: Weights and pictures lie in memory with their channels last.
        update: With `train`: AdamW changes the weights, as in a step of a training.
    """

    model: str
    batch_size: int = 1
    size: int | None = None
    train: bool = False
    dtype: str = 'float32'
    device: str = 'cpu'
    compiled: bool = False
    channels_last: bool = False
    update: bool = False


def _build(case: Case) -> nn.Module:
    options: dict[str, Any] = {}
    cfg = timm.get_pretrained_cfg(case.model) if timm.is_model(case.model.partition('.')[0]) else None
    if case.size is not None and (cfg is None and case.model.startswith('dis_')
                                  or cfg is not None and cfg.fixed_input_size):
        options['img_size'] = case.size  # part of these models: tables of positions
    torch.manual_seed(0)
    return create_model(case.model, **options).to(case.device).train(case.train)


def _make_run(case: Case) -> tuple[Callable[[], None], tuple[int, ...]]:
    """Return what is to be measured, and the shape of its pictures; nothing has run yet."""
    model = _build(case)
    inputs = [tensor.to(case.device) for tensor in example_inputs(model, case.size, case.batch_size).tensors]
    if case.channels_last:
        model = model.to(memory_format=torch.channels_last)
        inputs = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6) if case.train and case.update else None
    called = torch.compile(model, dynamic=False) if case.compiled else model
    dtype = getattr(torch, case.dtype)

    def forward() -> Any:
        with torch.autocast(torch.device(case.device).type, dtype=dtype, enabled=dtype != torch.float32):
            return called(*inputs)

    def run() -> None:
        if not case.train:
            with torch.inference_mode():
                forward()
            return
        sum(out.float().square().mean() for out in tree_leaves(forward()) if torch.is_tensor(out)).backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return run, tuple(inputs[0].shape)


def build_run(case: Case) -> tuple[Callable[[], None], int]:
    """Build a model with initial weights, and what is to be timed.

    Args:
        case: What is measured.

    Returns:
        A function that runs the model once, and the side of its images in pixels.

    Raises:
        ValueError: There is no such model, or it does not take images of this size.
    """
    run, shape = _make_run(case)
    try:
        run()
    except (AssertionError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f'{case.model} does not run with inputs of {shape}: {error}') from error
    return run, shape[-1]


def measure_memory(case: Case) -> tuple[int | None, int]:
    """Measure the memory of a run; on a CPU beyond the weights.

    Args:
        case: What is measured.

    Returns:
        The bytes at the peak, None where the accelerator does not count them; and those of them that are held between
        runs, which are the weights and an optimiser's state on an accelerator, and 0 on a CPU.
    """
    device = torch.device(case.device)
    gc.collect()  # models of before hold memory until then
    run, _ = build_run(case)
    held = held_memory(device)
    return peak_memory(run, device), held


@contextmanager
def _own_compilation(cases: Sequence[Case]) -> Iterator[None]:
    """Compile every model for its own sizes, whatever was compiled in this process before.

    Models share code, and PyTorch by default compiles code 8 times, and then runs it uncompiled without an error.
    """
    if not any(case.compiled for case in cases):
        yield
        return
    torch.compiler.reset()
    limit = torch._dynamo.config.recompile_limit + 2 * len(cases)  # twice where memory is measured in this process
    with torch._dynamo.config.patch(recompile_limit=limit):
        yield


def _build_all(cases: Sequence[Case], memory: bool, keep_going: bool, progress: bool) -> list[dict[str, Any]]:
    """Measure memory, and then build everything; a row has `run`, or the `error` of a model that does not run."""
    rows: list[dict[str, Any]] = [dataclasses.asdict(case) for case in cases]
    for stage in ('memory', 'run') if memory else ('run',):
        jobs = zip(cases, tqdm(rows, stage, unit='model', leave=False, disable=None if progress else True), strict=True)
        for case, row in jobs:
            try:
                if 'error' in row:
                    continue
                if stage == 'run':
                    row['run'], row['size'] = build_run(case)
                else:
                    row['peak_memory'], row['held_memory'] = measure_memory(case)
            except REFUSALS as error:
                if not keep_going:
                    raise
                row['error'] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return rows


def compare_models(
        cases: Sequence[Case],
        rounds: int = 10,
        warmup: int = 2,
        memory: bool = False,
        progress: bool = True,
        min_seconds: float = 0.,
        keep_going: bool = False,
) -> list[dict[str, Any]]:
    """Time models in alternation in this process.

    Args:
        cases: One a model, on one device.
        rounds: How many rounds, in each of which all run.
        warmup: Runs of each before, which do not count.
        memory: Measure their memory too.
        progress: Show a bar.
        min_seconds: Run a model several times a round, so that its rounds take at least this long together.
        keep_going: Give a model that does not run a row with its `error`, instead of raising that.

    Returns:
        One row a case: its fields, `ms` (median), `least_ms`, `images_per_s`, `speed` (how many times as fast as the
        first that runs, median of the ratios within rounds) with `speed_quartiles`, `rounds_ms`, and of
        `measure_memory` the `peak_memory` and `held_memory` in bytes.
    """
    device = torch.device(cases[0].device)
    with _own_compilation(cases):
        rows = _build_all(cases, memory, keep_going, progress)
    runs = {str(number): row.pop('run') for number, row in enumerate(rows) if 'run' in row}
    if not runs:
        return rows
    repeats = runs_for(runs, device, min_seconds / rounds) if min_seconds else dict.fromkeys(runs, 1)
    total = warmup * len(runs) + rounds * sum(repeats.values())
    with tqdm(total=total, unit='run', leave=False, disable=None if progress else True) as bar:
        times = alternate(runs, device, rounds, warmup, repeats, bar.update)
    first = next(iter(times.values()))
    for number, own in times.items():
        row = rows[int(number)]
        speed, low, high = first.speed_of(own)
        row.update(ms=own.median, least_ms=own.least, images_per_s=1e3 * row['batch_size'] / own.median, speed=speed,
                   speed_quartiles=[low, high], rounds_ms=list(own.rounds), peak_memory=row.get('peak_memory'))
    return rows


def _compare(cases: Sequence[Case], threads: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # sizes do not change: the fastest of its algorithms
    return compare_models(cases, **options)


def compare_apart(cases: Sequence[Case], threads: int, **options: Any) -> list[dict[str, Any]]:
    """Time models in alternation in one new process.

    Args:
        cases: One a model, on one device.
        threads: Of the process on a CPU.
        **options: Those of `compare_models`.

    Returns:
        The rows of `compare_models`.

    Raises:
        ChildProcessError: The process was ended, as when memory runs out.
    """
    return run_apart(_compare, cases, threads, options)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('names', nargs='+', metavar='NAME', help='models of this package or of timm; speeds are '
                                                                 'relative to the first one')
    parser.add_argument('--batch-size', type=int, nargs='+', default=[1], metavar='N', help='images at a time '
                                                                                            '(default: 1)')
    parser.add_argument('--size', type=int, nargs='+', metavar='PIXELS', help="side of the images (default: each "
                                                                              "model's own)")
    parser.add_argument('--train', action='store_true', help='forward and backward, instead of forward alone')
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='of autocast')
    parser.add_argument('--device', default='cpu', help='where to compute (default: cpu)')
    parser.add_argument('--threads', type=int, metavar='N', help="threads on a CPU (default: PyTorch's)")
    parser.add_argument('--compile', action='store_true', help='run what torch.compile makes of the models')
    parser.add_argument('--rounds', type=int, default=10, metavar='N', help='timed runs of each model (default: 10)')
    parser.add_argument('--warmup', type=int, default=2, metavar='N', help='runs before (default: 2)')
    parser.add_argument('--memory', action='store_true', help='measure the peak of memory too; on a CPU beyond the '
                                                              'weights')
    parser.add_argument('--json', action='store_true', help='write JSON, with all times')


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    least = {'--batch-size': min(args.batch_size), '--size': min(args.size or [1]), '--rounds': args.rounds,
             '--threads': 1 if args.threads is None else args.threads}
    for option, value in least.items():
        if value < 1:
            parser.error(f'{option} must be 1 or more, got {value}')
    if args.warmup < 0:
        parser.error(f'--warmup must be 0 or more, got {args.warmup}')


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bench(args: argparse.Namespace) -> int:
    rows = []
    check_threads(args.threads or torch.get_num_threads())
    with _threads(args.threads):
        about = describe_machine(torch.device(args.device))
        for size in args.size or [None]:
            for batch_size in args.batch_size:
                cases = [Case(name, batch_size, size, args.train, args.dtype, args.device, args.compile)
                         for name in args.names]
                rows += compare_models(cases, args.rounds, args.warmup, args.memory)
    if args.json:
        sys.stdout.write(json.dumps({'environment': about, 'results': rows}, indent=1) + '\n')
        return 0
    sys.stdout.write(', '.join(f'{key} {value}' for key, value in about.items()) + '\n\n')
    table = [('model', 'batch', 'size', 'ms', 'images/s', 'speed', '(quartiles)', 'peak MB')]
    for row in rows:
        low, high = row['speed_quartiles']
        memory = describe_megabytes(row['peak_memory']) if row['peak_memory'] is not None else ''
        table.append((row['model'], str(row['batch_size']), str(row['size']), f'{row["ms"]:.2f}',
                      f'{row["images_per_s"]:.1f}', f'{row["speed"]:.2f}', f'({low:.2f} to {high:.2f})', memory))
    write_table(table if args.memory else [line[:-1] for line in table])
    return 0


# a device that cannot be used or runs out of memory raises a RuntimeError
bench = Command('Time models side by side: median latency, images per second, and how many times as fast as the first '
                'one each is. Weights are initial ones.', _add_options, _bench, _check_options,
                (OSError, ValueError, ImportError, RuntimeError))
