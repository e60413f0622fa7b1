"""`visionssm doctor`: what is installed, which kernels run and why others do not, and whether they compute rightly."""
import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from visionssm_kernels import (
    causal_conv1d,
    dilated_conv2d,
    nc_ssd,
    selective_scan,
    ssd,
    use_backend,
    wavefront_scan_2d,
)
from visionssm_kernels._dispatch import (
    ENV_BACKEND,
    BackendState,
    backend_states,
    is_strict,
    preferred_backends,
    requested_backend,
)
from visionssm_kernels._native import instruction_set_in_use
from visionssm_kernels._testing import (
    nc_ssd_inputs,
    relative_rms,
    results_and_gradients,
    scan_inputs,
    ssd_inputs,
    wavefront_inputs,
)

from .._version import __version__
from ..analysis.timing import describe_machine
from ..checkpoints.download import cache_root, is_offline
from ..cli import COMMANDS
from ..utils.command import Command, check_folder
from ..utils.paths import config_root
from .list import write_table

__all__ = ['Package', 'advice', 'doctor', 'forbidden', 'packages', 'self_test']

DISTRIBUTION = 'visionssm'
CORE = ('torch', 'torchvision', 'timm', 'numpy', 'safetensors', 'pyyaml')
HIDDEN = ('dev', 'docs')  # extras of people who work on the package
VARIABLES = re.compile(r'(VISIONSSM_|HF_|OMP_NUM_THREADS$|TORCH_HOME$|TRITON_INTERPRET$|CUDA_VISIBLE_DEVICES$'
                       r'|(HTTPS?|NO|ALL)_PROXY$)', re.IGNORECASE)
FORWARD, BACKWARD = 1e-4, 5e-4
ALSO = ('selective_scan_2d runs with the backend of selective_scan, ssd_2d with that of ssd, and causal_conv1d_both '
        'with that of causal_conv1d.')


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that the core or an extra needs.

    Attributes:
        name: Of the distribution.
        needed: Versions that serve, as in '>=2.6'.
        version: The installed one; empty where there is none.
        extras: Extras that need it; empty for the core.
        state: 'ok', 'too old' or 'missing'.
        install: The command that installs it; empty where it is there.
    """

    name: str
    needed: str
    version: str
    extras: tuple[str, ...]
    state: str
    install: str


def _requirements() -> Iterator[tuple[str, Requirement]]:
    """Yield what this package needs, with the extra that needs it or ''."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        lines = list(CORE)
    for requirement in map(Requirement, lines):
        found = re.search(r'extra == "([^"]+)"', str(requirement.marker or ''))
        extra = found[1] if found else ''
        applies = requirement.marker is None or requirement.marker.evaluate({'extra': extra})
        if applies and requirement.name != DISTRIBUTION and extra not in HIDDEN:
            yield extra, requirement


def _look_up(requirement: Requirement, extras: Sequence[str]) -> Package:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        version = ''
    good = version and requirement.specifier.contains(version, prereleases=True)
    install = '' if good else f"pip install '{DISTRIBUTION}{f'[{extras[0]}]' if extras else ''}'"
    return Package(requirement.name, str(requirement.specifier), version, tuple(extras),
                   'ok' if good else 'too old' if version else 'missing', install)


def packages() -> list[Package]:
    """Return the packages that the core and the extras need, the core's first."""
    wanted: dict[str, tuple[Requirement, list[str]]] = {}
    for extra, requirement in _requirements():
        wanted.setdefault(requirement.name, (requirement, []))[1].append(extra)
    found = [_look_up(requirement, [] if '' in extras else extras) for requirement, extras in wanted.values()]
    return sorted(found, key=lambda package: (package.extras, package.name))


def _conv_inputs(dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    make = functools.partial(torch.randn, dtype=dtype, device=device)
    return {'x': make(2, 6, 17), 'weight': make(6, 4), 'bias': make(6)}


def _map_inputs(dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    make = functools.partial(torch.randn, dtype=dtype, device=device)
    return {'x': make(2, 6, 5, 9), 'weight': make(2, 6, 3, 3)}


def _op(op: Callable[..., Any], make: Callable[..., Any], *sizes: int, **options: Any) -> tuple:
    return functools.partial(op, **options), functools.partial(make, *sizes)


OPS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    'causal_conv1d': _op(causal_conv1d, _conv_inputs, activation='silu'),
    'dilated_conv2d': _op(dilated_conv2d, _map_inputs, dilations=(1, 3)),
    'nc_ssd': _op(nc_ssd, nc_ssd_inputs, 2, 35, 3, 8, 1, 4),
    'selective_scan': _op(selective_scan, scan_inputs, 2, 6, 70, 4, delta_softplus=True),
    'ssd': _op(ssd, ssd_inputs, 2, 70, 2, 8, 1, 4, dt_softplus=True),
    'wavefront_scan_2d': _op(wavefront_scan_2d, wavefront_inputs, 1, 4, 7, 9, 4, delta_softplus=True),
}


def _check_backend(state: BackendState) -> dict[str, Any]:
    """Compare a backend, forward and all gradients, with the definition in float64."""
    function, make = OPS[state.op]
    found: dict[str, Any] = {'op': state.op, 'device': state.device, 'backend': state.backend}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inputs = make(dtype=torch.float32, device=torch.device(state.device))
        with use_backend('reference'):
            exact = results_and_gradients(function, {name: x.double() for name, x in inputs.items()})
        with use_backend(state.backend):
            results = results_and_gradients(function, inputs)
    except Exception as error:  # noqa: BLE001 - whatever breaks a kernel on this machine is what a doctor reports
        return {**found, 'ok': False, 'error': None, 'why': f'{type(error).__name__}: {error}'.splitlines()[0]}
    errors = {name: relative_rms(results[name], exact[name]) for name in exact}
    wrong = {name: error for name, error in errors.items()
             if not error <= (FORWARD if name.startswith('out') else BACKWARD)}
    why = ', '.join(f'{name} is wrong by {error:.1e}' for name, error in wrong.items())
    return {**found, 'ok': not wrong, 'error': max(errors.values()), 'why': why}


def self_test(states: Sequence[BackendState] | None = None) -> list[dict[str, Any]]:
    """Run every backend that can run on this machine on small inputs.

    Args:
        states: The backends; all by default.

    Returns:
        One row a backend: `op`, `device`, `backend`, `ok`, `error` (the largest relative RMS of output and gradients,
        None where it broke down) and `why` not.
    """
    states = backend_states() if states is None else states
    return [_check_backend(state) for state in states if state.state != 'cannot run' and state.op in OPS]


def _outdated() -> list[str]:
    """Tell where the code was updated and its installation, which lists the packages, was not."""
    try:
        known = importlib.metadata.metadata(DISTRIBUTION).get_all('Provides-Extra') or []
    except importlib.metadata.PackageNotFoundError:
        return []
    lacking = {extra for entry in COMMANDS.values() for extra in entry.extra.split(',') if extra} - set(known)
    return [f'The installation is older than the code and knows nothing of the extras {", ".join(sorted(lacking))}: '
            'run pip install again (in a checkout: pip install -e .)'] if lacking else []


def forbidden(states: Sequence[BackendState]) -> list[str]:
    """Return in a sentence which operators strict mode makes an error; none where each has a backend."""
    places = dict.fromkeys((state.op, state.device) for state in states)
    served = {(state.op, state.device) for state in states if state.state == 'chosen'}
    lost = [f'{op} on {device}' for op, device in places if (op, device) not in served]
    return [f'{", ".join(lost)} cannot run with the backend that {requested_backend()!r} means, and strict mode '
            f'forbids another: unset VISIONSSM_STRICT or {ENV_BACKEND}'] if lost and is_strict() else []


def _odd_threads() -> list[str]:
    """Tell of a number of threads that OpenMP does not understand, and ignores."""
    given = os.environ.get('OMP_NUM_THREADS', '')
    odd = given and not all(part.strip().isdecimal() and int(part) for part in given.split(','))
    return [f'OMP_NUM_THREADS={given} is no number of threads, and is ignored: {torch.get_num_threads()} are used'
            ] if odd else []


def advice(states: Sequence[BackendState]) -> list[str]:
    """Return in sentences why a faster backend than the chosen one does not run."""
    asked = requested_backend()
    found = [] if asked in ('auto', 'cpu') else [f'{ENV_BACKEND} asks for {asked}']
    found += _outdated() + _odd_threads()
    missed: dict[tuple[str, str, str, str], list[str]] = {}
    for op, device in dict.fromkeys((state.op, state.device) for state in states):
        known = {state.backend: state for state in states if (state.op, state.device) == (op, device)}
        chosen = next((name for name, state in known.items() if state.state == 'chosen'), '')
        fastest = next((name for name in preferred_backends(device) if name in known), chosen)
        if chosen and fastest != chosen and known[fastest].reason:
            missed.setdefault((device, chosen, fastest, known[fastest].reason), []).append(op)
    found += [f'{", ".join(ops)} on {device} run with {chosen} instead of {fastest}: {reason}'
              for (device, chosen, fastest, reason), ops in missed.items()]
    if not torch.accelerator.is_available():
        built = f' (PyTorch is built for CUDA {torch.version.cuda}: look at the driver if there is a GPU)' \
            if torch.version.cuda else ' (this PyTorch is built for the CPU alone)'
        found.append(f'PyTorch sees no accelerator{built}')
    return found


def _devices() -> list[dict[str, Any]]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    module = torch.get_device_module(kind)
    found = []
    for index in range(torch.accelerator.device_count()):
        row: dict[str, Any] = {'device': f'{kind.type}:{index}'}
        if hasattr(module, 'get_device_properties'):
            properties = module.get_device_properties(index)
            row |= {'name': getattr(properties, 'name', ''), 'memory': getattr(properties, 'total_memory', None)}
        found.append(row)
    return found


def _folder(name: str, path: Path) -> dict[str, Any]:
    try:
        check_folder(path, name)
        problem = ''
    except OSError as error:
        problem = str(error)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return {'name': name, 'path': str(path), 'writable': not problem, 'problem': problem,
            'free': shutil.disk_usage(there).free}


def _configs() -> str:
    try:
        return str(config_root())
    except FileNotFoundError as error:
        return str(error)


def _examine(args: argparse.Namespace) -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE

    states = backend_states()
    # addresses of proxies and mirrors may hold a password
    variables = {name: re.sub(r'//[^/@\s]*@', '//***@', value) for name, value in sorted(os.environ.items())
                 if VARIABLES.match(name) and 'TOKEN' not in name}
    return {
        'system': {'visionssm': __version__, 'folder': str(Path(__file__).resolve().parent.parent),
                   'configs': _configs(), 'os': platform.platform(), **describe_machine(torch.device('cpu')),
                   'cores': os.cpu_count(), 'instructions': instruction_set_in_use()},
        'accelerators': _devices(),
        'packages': [dataclasses.asdict(package) for package in packages()],
        'kernels': [state._asdict() for state in states],
        'advice': advice(states),
        'forbidden': forbidden(states),
        'folders': [_folder('weights', cache_root()), _folder("the hub's files", Path(HF_HUB_CACHE))],
        'offline': is_offline(),
        'variables': variables,
        'self_test': None if args.no_selftest else self_test(states),
    }


def _problems(report: Mapping[str, Any]) -> list[str]:
    """Return what makes results wrong, or the package useless."""
    found = [f'{row["name"]} {row["version"] or "is missing"}, needed is {row["needed"]}: {row["install"]}'
             for row in report['packages'] if not row['extras'] and row['state'] != 'ok']
    return found + report['forbidden'] + [f'{row["op"]} with {row["backend"]} on {row["device"]}: {row["why"]}'
                    for row in report['self_test'] or () if not row['ok']]


def _heading(text: str) -> None:
    sys.stdout.write(f'\n{text}\n')


def _write(report: Mapping[str, Any], problems: Sequence[str]) -> None:
    write_table([(key, str(value)) for key, value in report['system'].items() if value not in (None, '')])
    _heading('Packages')
    write_table([('package', 'needed', 'installed', 'for', '')] + [
        (row['name'], row['needed'], row['version'] or '-', ', '.join(row['extras']) or 'core',
         '' if row['state'] == 'ok' else f'{row["state"]}: {row["install"]}') for row in report['packages']])
    _heading('Kernels')
    errors = {(row['op'], row['device'], row['backend']): row for row in report['self_test'] or ()}
    rows = [('op', 'device', 'backend', 'state', 'error' if errors else '', '')]
    for row in report['kernels']:
        tested = errors.get((row['op'], row['device'], row['backend']))
        error = '' if tested is None else 'failed' if tested['error'] is None else f'{tested["error"]:.0e}'
        rows.append((row['op'], row['device'], row['backend'], row['state'], error,
                     row['reason'] or (tested or {}).get('why', '')))
    write_table(rows)
    sys.stdout.write(f'{ALSO}\n')
    for line in report['advice']:
        sys.stdout.write(f'- {line}\n')
    _heading('Accelerators')
    for row in report['accelerators']:
        memory = f', {row["memory"] / 2**30:.0f} GiB' if row.get('memory') else ''
        sys.stdout.write(f'{row["device"]}  {row.get("name", "")}{memory}\n')
    if not report['accelerators']:
        sys.stdout.write('none\n')
    _heading('Folders')
    write_table([(row['name'], row['path'], f'{row["free"] / 2**30:.0f} GiB free', row['problem'])
                 for row in report['folders']])
    _heading('Environment')
    write_table([('offline', 'yes: no network is used' if report['offline'] else 'no'), *report['variables'].items()])
    _heading('Problems' if problems else 'No problems' if report['self_test'] is not None else
             'No problems (the kernels were not run)')
    for line in problems:
        sys.stdout.write(f'- {line}\n')


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--no-selftest', action='store_true', help='do not run the kernels')
    parser.add_argument('--json', action='store_true', help='write JSON')


def _doctor(args: argparse.Namespace) -> int:
    report = _examine(args)
    problems = _problems(report)
    if args.json:
        sys.stdout.write(json.dumps({**report, 'problems': problems}, indent=1) + '\n')
    else:
        _write(report, problems)
    return 1 if problems else 0


doctor = Command('Show what is installed and how to install what is not, which kernels run and why faster ones do not, '
                 'and run each on small inputs. The exit code is 1 where something is wrong.', _add_options, _doctor)
