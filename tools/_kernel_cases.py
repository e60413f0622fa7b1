"""Ops that `benchmark_kernels.py` times, their random inputs, and how one case is measured."""
import dataclasses
import functools
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from _kernel_peers import (
    ROUTES,
    Contestant,
    Outputs,
    Tensors,
    attention,
    attention_over_channels,
    compiled,
    cross_pipeline,
    four_scans,
    in_float32,
    mamba_pipeline,
    mamba_scan,
    mamba_ssd,
    matmuls,
    parallel_scan,
    plain_nc_ssd,
    plain_scan,
    plain_ssd,
    plain_wavefront,
    time_limit,
)
from tqdm import tqdm

from visionssm.analysis.timing import Run, alternate, held_memory, peak_memory, timed
from visionssm_kernels import nc_ssd, selective_scan, selective_scan_2d, set_strict, ssd, use_backend, wavefront_scan_2d
from visionssm_kernels._dispatch import ENV_BACKEND, backend_states
from visionssm_kernels._testing import nc_ssd_inputs, relative_rms, scan_inputs, ssd_inputs, wavefront_inputs

Row = dict[str, Any]
Shape = tuple[int, ...]
Peer = Callable[[Shape], Contestant]
PASSES = ('forward', 'forward+backward')
CHANNELS_LAST = 'channels last'
# largest relative RMS from float64 on the same inputs, forward and with gradients
BOUNDS = {'float32': (1e-4, 5e-4), 'float16': (2e-3, 5e-3), 'bfloat16': (5e-3, 1e-2)}
OURS = ('reference', 'chunked', 'native', 'triton')
MANY_STATES = 2 ** 26  # beyond, the reference, which keeps all of them in float64, needs gigabytes
SLOW = 5  # seconds of a first run that are about those of any other
COPY = 2 ** 28  # bytes of the copy that shows the bandwidth of memory


def map_inputs(batch: int, dim: int, height: int, width: int, state: int, **kwargs: Any) -> Tensors:
    """Random arguments of `selective_scan_2d` with four routes."""
    flat = scan_inputs(batch, ROUTES * dim, height * width, state, ROUTES, ROUTES, **kwargs)
    maps = {name: flat[name].unflatten(-1, (height, width)) for name in ('delta', 'B', 'C')}
    u = flat['u'].unflatten(-1, (height, width))[:, :dim].contiguous()
    return {**flat, 'u': u, **maps, 'delta': maps['delta'].unflatten(1, (ROUTES, dim))}


@dataclasses.dataclass(frozen=True)
class Op:
    """An op to time.

    Attributes:
        ours: The op.
        inputs: Makes its inputs; takes the sizes, and `dtype` and `device` by name.
        axes: Names of the sizes.
        shapes: Sizes that models use.
        peers: Contestants beside its backends.
        usual: Those that are timed on a CPU and on a GPU where options do not say which.
        options: Of the call.
        backends: Name of the op whose backends run it.
        memory: Peaks of memory are measured on a CPU too.
        layouts: Of maps, '' (as `inputs` makes them) or `CHANNELS_LAST`.
    """
    ours: Callable[..., torch.Tensor]
    inputs: Callable[..., Tensors]
    axes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    peers: dict[str, Peer]
    usual: tuple[tuple[str, ...], tuple[str, ...]]
    backends: str
    options: dict[str, bool] = dataclasses.field(default_factory=lambda: {'delta_softplus': True})
    memory: bool = False
    layouts: tuple[str, ...] = ('',)


def _plain(function: Callable[..., torch.Tensor]) -> dict[str, Peer]:
    return {'plain': lambda shape: Contestant(in_float32(function)), 'compiled': lambda shape: compiled(function)}


OPS = {
    'selective_scan': Op(
        selective_scan, scan_inputs, ('B', 'D', 'L', 'N'),
        ((1, 384, 197, 16), (1, 768, 1024, 16), (4, 384, 197, 16), (2, 96, 3136, 1)),
        {**_plain(plain_scan), 'parallel': lambda shape: Contestant(in_float32(parallel_scan)),
         'mamba_ssm': mamba_scan, 'attention': attention_over_channels},
        (('plain', 'parallel'), ('mamba_ssm', 'parallel', 'attention')), 'selective_scan'),
    'selective_scan_2d': Op(
        selective_scan_2d, map_inputs, ('B', 'D', 'H', 'W', 'N'),
        tuple((1, 96 << i, 56 >> i, 56 >> i, state) for state in (1, 16) for i in range(4)),  # stages of vmamba_tiny
        {'four-scans': four_scans, 'cross-scan': cross_pipeline, 'cross-scan+mamba_ssm': mamba_pipeline,
         'attention': attention_over_channels},
        (('four-scans', 'cross-scan'), ('four-scans', 'cross-scan', 'cross-scan+mamba_ssm')), 'selective_scan',
        memory=True, layouts=('', CHANNELS_LAST)),
    'wavefront_scan_2d': Op(
        wavefront_scan_2d, wavefront_inputs, ('B', 'D', 'H', 'W', 'N'),
        ((1, 96, 56, 56, 16), (1, 64, 56, 56, 16), (1, 128, 28, 28, 16), (4, 32, 56, 56, 16)),
        {**_plain(plain_wavefront), 'attention': attention_over_channels}, (('plain',), ('plain',)),
        'wavefront_scan_2d'),
    'nc_ssd': Op(
        nc_ssd, nc_ssd_inputs, ('B', 'L', 'M', 'P', 'G', 'N'),
        ((1, 3136, 2, 64, 1, 64), (1, 784, 4, 64, 1, 64), (4, 196, 8, 64, 1, 64), (1, 784, 4, 64, 4, 64)),
        {**_plain(plain_nc_ssd), 'matmuls': matmuls,
         'attention': lambda shape: attention(shape[0], shape[2], shape[1], shape[3], False)},
        (('plain', 'matmuls'), ('plain', 'matmuls')), 'nc_ssd', {}),
    'ssd': Op(
        ssd, ssd_inputs, ('B', 'L', 'M', 'P', 'G', 'N'),
        ((1, 197, 12, 64, 1, 64), (1, 1024, 24, 64, 1, 64), (4, 197, 12, 32, 1, 16), (1, 3136, 8, 24, 1, 1)),
        {**_plain(plain_ssd), 'mamba_ssm': mamba_ssd,
         'attention': lambda shape: attention(shape[0], shape[2], shape[1], shape[3], True)},
        (('plain',), ('mamba_ssm', 'attention')), 'ssd', {'dt_softplus': True}),
}


def own_backends(op: Op) -> set[str]:
    """Return the backends that an op has, whether they can run here or not."""
    return {state.backend for state in backend_states() if state.op == op.backends}


def usual_contestants(op: Op, device: torch.device) -> list[str]:
    """Return those that are timed on a device by default: peers, and the backends that models may run with there."""
    can = [state.backend for state in backend_states() if state.op == op.backends and state.device == device.type
           and state.state != 'cannot run' and state.backend != 'reference']
    return [*op.usual[device.type != 'cpu'], *(name for name in OURS if name in can)]


def make_contestant(op: Op, name: str, shape: Shape) -> Contestant:
    """Return a peer of an op, or one of its backends."""
    if name in op.peers:
        return op.peers[name](shape)
    return Contestant(lambda **inputs: op.ours(**inputs, **op.options), backend=name)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs ops with one backend, and with no other in its place, in threads of autograd as well."""
    before = os.environ.get(ENV_BACKEND)
    os.environ[ENV_BACKEND] = name  # what `use_backend` says holds in one thread
    set_strict(name != 'auto')
    try:
        with use_backend(name):
            yield
    finally:
        set_strict(None)
        if before is None:
            del os.environ[ENV_BACKEND]
        else:
            os.environ[ENV_BACKEND] = before


def make_inputs(
        op: Op,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        layout: str = '',
) -> tuple[Tensors, torch.Tensor]:
    """Make the inputs of one case and the gradient of its output.

    Decay rates of states are -1, ..., -N, from which models start.
    """
    torch.manual_seed(0)
    inputs = op.inputs(*shape, dtype=dtype, device=device)
    inputs.pop('z', None)
    for name, x in inputs.items():
        if name[0] == 'A' and x.ndim == 2:
            inputs[name] = -torch.arange(1, shape[-1] + 1, dtype=x.dtype, device=device).expand_as(x).contiguous()
    if layout == CHANNELS_LAST:
        inputs = {name: x.movedim(-3, -1).contiguous().movedim(-1, -3) if x.ndim >= 4 else x
                  for name, x in inputs.items()}
    return inputs, torch.randn_like(next(iter(inputs.values())))


def prepare(contestant: Contestant, stage: str, inputs: Tensors, dout: torch.Tensor) -> Callable[[], Any]:
    """Return what is timed; its result is what the op returns and the gradients by the name of the inputs."""
    own, douts = contestant.arrange(inputs, dout)
    if stage == PASSES[1]:
        own = {name: x.detach().clone().requires_grad_() for name, x in own.items()}
    leaves = list(own.values())

    def run() -> tuple[Outputs, Tensors]:
        with backend(contestant.backend):
            with nullcontext() if stage == PASSES[1] else torch.no_grad():
                outputs = contestant.function(**own)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            gradients = torch.autograd.grad(outputs, leaves, douts) if stage == PASSES[1] else ()
            return tuple(out.detach() for out in outputs), dict(zip(own, gradients))

    return run


def compute(contestant: Contestant, result: tuple[Outputs, Tensors]) -> Tensors:
    """Return the output and the gradients of a run as those of the op."""
    out, gradients = contestant.restore(*result)
    return {'': out, **gradients}


def _truth(op: Op, shape: Shape, stage: str, inputs: Tensors, dout: torch.Tensor) -> Tensors:
    states = math.prod(shape) * (ROUTES if op.ours is selective_scan_2d else 1)
    name = 'chunked' if states > MANY_STATES else 'reference'
    exact = make_contestant(op, name, shape)
    run = prepare(exact, stage, {name: x.double() for name, x in inputs.items()}, dout.double())
    return compute(exact, run())


def _largest_difference(found: Tensors, truth: Tensors) -> float:
    """Return the largest relative RMS of output and gradients; infinity where one is missing."""
    return max(relative_rms(found[name], x) if name in found and found[name].shape == x.shape else math.inf
               for name, x in truth.items())


def _first_run(
        op: Op,
        name: str,
        settings: dict[str, Any],
        inputs: Tensors,
        dout: torch.Tensor,
        truth: Tensors,
        compile_seconds: float,
) -> tuple[Run, Row]:
    """Build a contestant and run it once; raises where it cannot run or computes something else."""
    contestant = make_contestant(op, name, tuple(settings['shape']))
    run = prepare(contestant, settings['pass'], inputs, dout)
    with time_limit(compile_seconds, 'compiling') if contestant.compiles else nullcontext():
        result = run()
    row: Row = {'contestant': name}
    if contestant.compared:
        row['difference'] = _largest_difference(compute(contestant, result), truth)
        bound = BOUNDS[settings['dtype']][PASSES.index(settings['pass'])]
        if not row['difference'] <= bound:  # also true of NaN
            raise ValueError(f'relative RMS {row["difference"]:.2g} from the reference, above {bound:g}: not timed')
    return run, row


def _memory(run: Run, settings: dict[str, Any], name: str, device: torch.device) -> int | None:
    gc.collect()
    held = held_memory(device)
    peak = peak_memory(run, device)
    return None if peak is None else peak - held


def _plan_rounds(
        runs: dict[str, Run],
        slow: dict[str, float],
        device: torch.device,
        rounds: int,
        min_seconds: float,
        max_seconds: float,
) -> tuple[int, dict[str, int]]:
    """Return the number of rounds, fewer (but 3) where they would take too long, and the runs of each in a round.

    `slow` has the milliseconds of those that are too slow to be run once more for that.
    """
    ms = {name: slow.get(name) or timed(run, device) for name, run in runs.items()}
    repeats = {name: max(math.ceil(1e3 * min_seconds / rounds / max(t, 1e-3)), 1) for name, t in ms.items()}
    whole = sum(ms[name] * repeats[name] for name in runs) / 1e3
    return max(min(rounds, int(max_seconds / max(whole, 1e-9))), min(3, rounds)), repeats


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes that a large copy reads and writes in a second."""
    source = torch.ones(COPY // 4, device=device)
    target = torch.empty_like(source)
    times = alternate({'copy': functools.partial(target.copy_, source)}, device, rounds=7, warmup=2)
    return 2 * COPY / (1e-3 * times['copy'].median)


def moved_bytes(inputs: Tensors, dout: torch.Tensor, stage: str) -> int:
    """Return the bytes that the passes must move at least.

    Forward these are all inputs and the output, once; backward all inputs and the gradient of the output, and the
    gradients of the inputs.
    """
    own, out = (sum(x.numel() * x.element_size() for x in tensors) for tensors in (inputs.values(), [dout]))
    return own + out if stage == PASSES[0] else 3 * own + 2 * out


def measure(settings: dict[str, Any], options: dict[str, Any]) -> list[Row]:
    """Time all contestants on one case.

    Every round runs each contestant, quick ones several times, one after the other (`visionssm.analysis.timing`); the
    run that is compared with float64 is the warm-up. A contestant that cannot run or computes something else has a
    row with the `error`.

    Args:
        settings: `op`, `shape`, `pass`, `dtype`, `device`, `threads`, `contestants`, `memory`, `bandwidth`;
            `layout` where it is not the one in which inputs are made.
        options: `rounds`, `min_seconds`, `max_seconds`, `compile_seconds`.

    Returns:
        One row a contestant: its name, `chosen` for the backend that models run with, `ms` (median), `least_ms`,
        `rounds_ms`, `difference`, `peak_memory` (bytes that a run adds), `bandwidth` and `copy_bandwidth` (bytes a
        second).
    """
    op, device, shape = OPS[settings['op']], torch.device(settings['device']), tuple(settings['shape'])
    torch.set_num_threads(settings['threads'])
    inputs, dout = make_inputs(op, shape, getattr(torch, settings['dtype']), device, settings.get('layout', ''))
    truth = _truth(op, shape, settings['pass'], inputs, dout)
    chosen = [state.backend for state in backend_states()
              if (state.op, state.device, state.state) == (op.backends, device.type, 'chosen')]
    runs, slow, rows = {}, {}, []
    for name in settings['contestants']:
        start = time.perf_counter()
        try:
            run, row = _first_run(op, name, settings, inputs, dout, truth, options['compile_seconds'])
            seconds = time.perf_counter() - start
            if seconds > SLOW and name != 'compiled':
                slow[name] = 1e3 * seconds
            if settings['memory']:
                row['peak_memory'] = _memory(run, settings, name, device)
            runs[name] = run
        except Exception as error:  # noqa: BLE001  (compilers and other packages raise what they like)
            row = {'contestant': name, 'error': (str(error).strip().splitlines() or [type(error).__name__])[0]}
        rows.append(row | ({'chosen': True} if name in chosen else {}))
    del truth
    rounds, repeats = _plan_rounds(runs, slow, device, options['rounds'], options['min_seconds'],
                                   options['max_seconds'])
    with tqdm(total=rounds * sum(repeats.values()), unit='run', leave=False, disable=None) as bar:
        times = alternate(runs, device, rounds, 0, repeats, bar.update)
    copy = copy_bandwidth(device) if settings['bandwidth'] else None
    for row in rows:
        if row['contestant'] in times:
            timing = times[row['contestant']]
            row.update(ms=timing.median, least_ms=timing.least, rounds_ms=list(timing.rounds))
            if copy and 'difference' in row:
                row.update(copy_bandwidth=copy, bandwidth=moved_bytes(inputs, dout, settings['pass'])
                           / (1e-3 * timing.median))
    return rows
