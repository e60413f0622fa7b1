"""Time and memory of runs, measured so that what else a machine does falls on all contestants alike."""

import dataclasses
import datetime
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

__all__ = ['Timing', 'alternate', 'check_threads', 'describe_machine', 'device_name', 'held_memory', 'peak_memory',
           'run_apart', 'runs_for', 'timed']

Run = Callable[[], Any]
MOST_THREADS = 8  # for each core


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one contestant.

    Attributes:
        rounds: Milliseconds in each round, the median of its runs.
        least: Milliseconds of the fastest run: on a shared machine the one that nobody disturbed.
    """

    rounds: Sequence[float]
    least: float

    @property
    def median(self) -> float:
        """Milliseconds, the median over the rounds."""
        return statistics.median(self.rounds)

    def speed_of(self, other: 'Timing') -> tuple[float, float, float]:
        """Return how many times as fast another contestant is: median, lower and upper quartile over the rounds.

        Both ran in each round one after the other, so ratios within a round vary less than times do.
        """
        ratios = [own / others for own, others in zip(self.rounds, other.rounds, strict=True)]
        if len(ratios) < 2:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method='inclusive')
        return middle, low, high


def _wait(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def timed(run: Run, device: torch.device) -> float:
    """Return the milliseconds of one run: by events of an accelerator that has them, else by the clock."""
    _wait(device)
    module: Any = None if device.type == 'cpu' else torch.get_device_module(device)
    if not (hasattr(module, 'Event') and hasattr(module, 'current_stream')):
        start = time.perf_counter()
        run()
        _wait(device)
        return 1e3 * (time.perf_counter() - start)
    begin, end = (module.Event(enable_timing=True) for _ in range(2))
    stream = module.current_stream(device)
    begin.record(stream)
    run()
    end.record(stream)
    _wait(device)
    return begin.elapsed_time(end)


def runs_for(runs: Mapping[str, Run], device: torch.device, seconds: float) -> dict[str, int]:
    """Return how often each contestant has to run to take this long, at least once, by running each once."""
    return {name: max(math.ceil(1e3 * seconds / max(timed(run, device), 1e-3)), 1) for name, run in runs.items()}


def alternate(
        runs: Mapping[str, Run],
        device: torch.device,
        rounds: int = 10,
        warmup: int = 1,
        repeats: Mapping[str, int] | int = 1,
        on_run: Run = lambda: None,
) -> dict[str, Timing]:
    """Time contestants in alternation: every round runs each of them, one after the other.

    Args:
        runs: Name of a contestant to what it does.
        device: Where it does that.
        rounds: How many rounds.
        warmup: Runs of each contestant before, which do not count.
        repeats: Runs of a contestant in a round, one number for all or by name.
        on_run: Called after each run, for a progress bar.

    Returns:
        Name to times, in the order given.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f'rounds is {rounds} and warmup {warmup}; needed are at least 1 and 0')
    for run in runs.values():
        for _ in range(warmup):
            timed(run, device)
            on_run()
    medians: dict[str, list[float]] = {name: [] for name in runs}
    least = dict.fromkeys(runs, float('inf'))
    for _ in range(rounds):
        for name, run in runs.items():
            samples = []
            for _ in range(repeats if isinstance(repeats, int) else repeats[name]):
                samples.append(timed(run, device))
                on_run()
            medians[name].append(statistics.median(samples))
            least[name] = min(least[name], *samples)
    return {name: Timing(medians[name], least[name]) for name in runs}


def _peak_of_tensors(run: Run) -> int:
    """Return the most bytes that a run adds on a CPU to what tensors held before, by the allocator's own record."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # else a build for GPUs complains where there is none
    with torch.autograd.profiler.profile(profile_memory=True) as record:
        run()
    # the public list of events gives what an operator took to the operator; only the raw one has every change
    changes = [(event.start_ns(), event.nbytes()) for event in record.kineto_results.events()
               if event.name() == '[memory]' and event.device_type() == torch.profiler.DeviceType.CPU]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Return the bytes that tensors take at the peak of a run.

    On an accelerator these are all that tensors hold, weights included. On a CPU they are those that the run adds to
    what was there before; what libraries take past PyTorch's allocator is in neither.

    Returns:
        The bytes; None where the accelerator does not count them.
    """
    if device.type != 'cpu':
        module = torch.get_device_module(device)
        if not hasattr(module, 'max_memory_allocated'):
            return None
        module.reset_peak_memory_stats(device)
        timed(run, device)
        return module.max_memory_allocated(device)
    return _peak_of_tensors(run)


def held_memory(device: torch.device) -> int:
    """Return the bytes that tensors hold now on an accelerator; 0 on a CPU, and where they are not counted."""
    module: Any = None if device.type == 'cpu' else torch.get_device_module(device)
    return module.memory_allocated(device) if hasattr(module, 'memory_allocated') else 0


def _end_with_parent() -> None:
    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own, between processes, would be left behind where this one is killed


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start processes that never see an interrupt from the keyboard; this one sees it afterwards."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in a new process, which a full memory or a crash may end without harm to this one.

    Args:
        function: Of a module that can be imported.
        *args: Its arguments, which are pickled.
        **kwargs: More of them.

    Returns:
        What it returns; what it raises is raised here.

    Raises:
        ChildProcessError: The process was ended before.
        KeyboardInterrupt: From the keyboard; the process has been ended.
    """
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _end_with_parent) as pool:
        try:
            with _interrupts_held_back():  # else it may tell of one by a traceback of whatever it was importing
                future = pool.submit(function, *args, **kwargs)
            return future.result()
        except KeyboardInterrupt:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise
        except BrokenProcessPool as error:
            raise ChildProcessError('the process ended early: it crashed, or the system ended it because memory ran '
                                    'out') from error


def check_threads(threads: int) -> None:
    """Say on the standard error that more threads than cores tell nothing about models.

    Args:
        threads: That are to measure.

    Raises:
        ValueError: They are so many that starting them alone takes minutes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    if threads <= cores:
        return
    said = f'--threads {threads} is more than the {cores} core(s) that this process may use'
    if threads > MOST_THREADS * cores:
        raise ValueError(f'{said}, and more than {MOST_THREADS} for each: give --threads {cores} or fewer')
    sys.stderr.write(f'warning: {said}: threads wait for each other, and the times mean little\n')


def device_name(device: torch.device) -> str:
    """Return what the maker calls a device; of a CPU the processor's name, where the system tells."""
    if device.type != 'cpu':
        return torch.get_device_module(device).get_device_name(device)
    described = Path('/proc/cpuinfo').read_text(encoding='utf-8') if Path('/proc/cpuinfo').is_file() else ''
    return next(iter(re.findall(r'model name\s*: (.*)', described)), platform.processor()).strip()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what numbers depend on: day, device, threads, versions and the load of the machine."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, 'getloadavg') else None
    return {'date': datetime.date.today().isoformat(), 'device': f'{device.type} {device_name(device)}'.strip(),
            'threads': torch.get_num_threads(), 'python': platform.python_version(), 'torch': torch.__version__,
            'load average': load}
