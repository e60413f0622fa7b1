"""Choice of the backend that runs an op: by tensor device, by `use_backend`, by environment.

An op folder holds one module a backend. Every backend module of the scan (`selective_scan/reference.py`,
`chunked.py`, `cpu.py`, `triton_impl.py`) exposes the two functions below, with exactly these signatures; they are
called underneath autograd, so neither may rely on it.

    forward(u, delta, A, B, C, D, z, delta_bias, index, delta_softplus, reverse, merge)
        -> (out, last_state, checkpoints)
    backward(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, index, checkpoints, delta_softplus, reverse, merge)
        -> (du, ddelta, dA, dB, dC, dD, dz, ddelta_bias)

Canonical inputs (K routes over L positions; position l of route k is pixel `index[k, l]`):

    u            (B, K, D, L), or (B, 1, D, L) when the routes read the same map
    delta        (B, K, D, L)
    A            (K, D, N)
    B, C         (B, K, G, N, L) with the group of channel d = d // (D / G), or constant over time and batch: (K, D, N);
                 B and C choose independently
    D            (K, D) or None
    z            (B, K, D, L) or None: y <- y * silu(z)
    delta_bias   (K, D) or None
    index        (K, L) int32, contiguous, on the device of u, every row a permutation of 0..L-1; or None for the
                 natural order
    reverse      the scan runs from the last position to the first (only with index None)
    merge        the routes are summed: `out` is (B, 1, D, L) instead of (B, K, D, L)

Every map (u, delta, B, C, z, out and the gradients) is laid out by pixel, never by position: the backend addresses
pixels in route order. B >= 1, D >= 1, N >= 1, L >= 1. u, delta, B, C and z are of any floating dtype each and may have
any strides, expanded ones (stride 0) included; A, D and delta_bias are in the accumulation dtype
(`accumulation_dtype`: float64 for float64 inputs, else float32) and contiguous.

Results of `forward`: `out` in the dtype of u, rounded once, after the merge, in any layout (the op lays it out as
`empty_map` does, which costs a copy where the backend has not); `last_state` (B, K, D, N) after
the last position of each route; `checkpoints` (B, K, D, ceil(L / CHUNK), N), contiguous: the state before position
j * CHUNK in route order (zero for j = 0). Both in the accumulation dtype.
`backward` gets `dout` in the shape of `out` (any strides and floating dtype), `dlast_state` (B, K, D, N) or None. It
returns every gradient in the shape of its input, in any floating dtype and any layout (the op casts, and lays out as
`torch.empty_like` does the input, again by a copy where the backend has not), None where the input is None.
Checkpoints written by one backend are read by another: the layout above is binding.
"""
import contextlib
import contextvars
import dataclasses
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch

_logger = logging.getLogger('visionssm')

CHUNK = 64
"""Positions between two state checkpoints; memory of a scan is O(B D L (1 + N / CHUNK))."""

ENV_BACKEND = 'VISIONSSM_BACKEND'
ENV_STRICT = 'VISIONSSM_STRICT'
BACKENDS = ('auto', 'cpu', 'native', 'chunked', 'triton', 'reference')
_ORDER = {'cpu': ('native', 'chunked', 'reference'), 'cuda': ('triton', 'chunked', 'reference')}
_DEFAULT_ORDER = ('chunked', 'reference')


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to run an op: a module, and a function that says why it cannot run on a device type (None: it can)."""
    name: str
    module: str
    why_not: Callable[[str], str | None]


_registry: dict[str, dict[str, Backend]] = {}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar('visionssm_backend', default=None)
_strict: bool | None = None
_logged: set[tuple[str, str, str]] = set()


def _always(device_type: str) -> str | None:
    return None


def register_backend(op: str, name: str, module: str, why_not: Callable[[str], str | None] = _always) -> None:
    """Adds a backend to an op.

    Args:
        op: Name of the op, for example 'selective_scan'.
        name: One of `BACKENDS` except 'auto' and 'cpu'.
        module: Module to import at first use.
        why_not: Maps a device type to None, or to the reason why this backend cannot run there.
    """
    _registry.setdefault(op, {})[name] = Backend(name, module, why_not)


def triton_why_not(device_type: str) -> str | None:
    """Says why Triton cannot run on a device type, None if it can."""
    interpreted = os.environ.get('TRITON_INTERPRET') == '1'
    if importlib.util.find_spec('triton') is None:
        return 'triton is not installed'
    if device_type == 'cuda' or (device_type == 'cpu' and interpreted):
        return None
    return f'triton has no {device_type} target here (TRITON_INTERPRET=1 runs it on the CPU, slowly)'


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f'{source} got {name!r}; allowed: {", ".join(BACKENDS)}')
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager that runs every op of this package with one backend, and what is called in it by that of its
    gradient too, wherever that is computed: an inner or later `use_backend` around the backward pass comes first.

    Args:
        name: 'auto' (by device), 'cpu' (native where built, else chunked), 'native', 'chunked', 'triton' or
            'reference'.
    """
    token = _forced.set(_check_name(name, 'use_backend'))
    try:
        yield
    finally:
        _forced.reset(token)


def set_strict(strict: bool | None) -> None:
    """Makes a backend that cannot run an error instead of a fall-back.

    Args:
        strict: True or False; None returns the choice to the environment variable VISIONSSM_STRICT.
    """
    global _strict
    _strict = strict


def environment_switch(name: str, default: bool) -> bool:
    """Returns an environment variable that is 0 or 1; the default where it is not set or empty."""
    value = os.environ.get(name)
    if not value:
        return default
    if value not in ('0', '1'):
        raise ValueError(f'{name} got {value!r}; allowed: 0, 1')
    return value == '1'


def is_strict() -> bool:
    """Says whether a backend that cannot run is an error."""
    return environment_switch(ENV_STRICT, False) if _strict is None else _strict


def forced_backend() -> str | None:
    """Returns the name that the innermost `use_backend` of this thread asks for, None outside of any."""
    return _forced.get()


def requested_backend() -> str:
    """Returns the name asked for: innermost `use_backend`, else VISIONSSM_BACKEND, else 'auto'."""
    return forced_backend() or _check_name(os.environ.get(ENV_BACKEND) or 'auto', ENV_BACKEND)


def preferred_backends(device_type: str) -> tuple[str, ...]:
    """Returns the backends that 'auto' tries on a device type, the fastest first."""
    return _ORDER.get(device_type, _DEFAULT_ORDER)


def _candidates(name: str, device_type: str) -> tuple[str, ...]:
    order = preferred_backends(device_type)
    if name == 'auto':
        return order
    if name == 'cpu':
        return ('native', 'chunked', 'reference')
    return (name, *(other for other in order if other != name))


def _forbids_others(name: str, backends: dict[str, Backend]) -> bool:
    """Says whether no other may run where a backend cannot; an op that never had it falls back unless asked for it."""
    return (name in backends or requested_backend() == name) and is_strict()


def _reasons(refused: list[tuple[str, str | None]]) -> str:
    return '; '.join(f'{name}: {reason}' for name, reason in refused)


def _log_once(
        op: str,
        name: str,
        device_type: str,
        refused: list[tuple[str, str | None]],
        requested: str,
) -> None:
    if (op, name, device_type) in _logged:
        return
    _logged.add((op, name, device_type))
    passed_over = f' ({_reasons(refused)})' if refused else ''
    explicit_miss = refused and requested not in ('auto', 'cpu')
    _logger.log(logging.WARNING if explicit_miss else logging.INFO,
                '%s runs on %s with backend %s%s', op, device_type, name, passed_over)


_import = functools.cache(importlib.import_module)


@functools.cache
def _type_of(device: torch.device) -> str:
    return device.type  # each time a new string, which takes longer than looking one up


def select_backend(op: str, device: torch.device) -> ModuleType:
    """Picks and imports the backend module of an op for a device.

    Args:
        op: Name of the op.
        device: Device of the op's tensors.

    Returns:
        The backend module.
    """
    requested = requested_backend()
    backends = _registry[op]
    device_type = _type_of(device)
    refused: list[tuple[str, str | None]] = []
    for name in _candidates(requested, device_type):
        backend = backends.get(name)
        reason = 'this op has no such backend' if backend is None else backend.why_not(device_type)
        if backend is not None and reason is None:
            _log_once(op, name, device_type, refused, requested)
            return _import(backend.module)
        refused.append((name, reason))
        if _forbids_others(name, backends):
            raise RuntimeError(
                f'{op} cannot run on {device_type} with backend {name!r}: {reason}. Strict mode forbids a fall-back: '
                f'choose another with use_backend(...) or {ENV_BACKEND}, or call set_strict(False)')
    raise RuntimeError(f'{op} has no backend for {device_type}: {_reasons(refused)}')


class BackendState(NamedTuple):
    """What becomes of a backend of an op on a device type: 'chosen', 'can run', or 'cannot run', then with a reason.

    None is chosen where strict mode makes the op an error.
    """
    op: str
    device: str
    backend: str
    state: str
    reason: str = ''


def backend_states() -> list[BackendState]:
    """Returns the state of every backend of every op, on the CPU and on the accelerator that is there."""
    device_types = ['cpu']
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        device_types.append(accelerator.type)
    states = []
    for op, backends in sorted(_registry.items()):
        for device_type in device_types:
            order = _candidates(requested_backend(), device_type)
            reasons = {name: backend.why_not(device_type) for name, backend in backends.items()}
            # the first that can run, or after which strict mode lets no other run
            last = next((name for name in order
                         if reasons.get(name, '') is None or _forbids_others(name, backends)), None)
            for name, reason in reasons.items():
                state = 'cannot run' if reason is not None else 'chosen' if name == last else 'can run'
                states.append(BackendState(op, device_type, name, state, reason or ''))
    return states


def backend_report() -> str:
    """Returns a table of every op and backend: whether it can run on this machine, and why not.

    Returns:
        The table as text, one line for each (op, device type, backend).
    """
    rows = [('op', 'device', 'backend', 'state'),
            *((*found[:3], ': '.join(filter(None, found[3:]))) for found in backend_states())]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return '\n'.join('  '.join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows)


def accumulation_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Returns the dtype of states and sums: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _map_strides(u: torch.Tensor, routes: int) -> tuple[int, int, int, int]:
    """Strides of a dense output (B, K', D, L) of a scan of u: channels innermost where those of u are."""
    dim, length = u.shape[2:]
    channel, position = u.stride()[2:]
    inner = (1, dim) if 0 < channel < position else (length, 1)
    return routes * dim * length, dim * length, *inner


def follows_map(out: torch.Tensor, u: torch.Tensor) -> bool:
    """Says whether an output is laid out as `empty_map` would do it."""
    return out.stride() == _map_strides(u, out.shape[1])


def empty_map(u: torch.Tensor, routes: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Makes an output of a scan: channels innermost where those of u are, so that channel-last models stay so.

    Args:
        u: Map, (B, K, D, L).
        routes: Number K' of routes of the output.
        dtype: That of u when None.

    Returns:
        (B, K', D, L), dense.
    """
    batch, _, dim, length = u.shape
    return u.new_empty_strided((batch, routes, dim, length), _map_strides(u, routes), dtype=dtype)
