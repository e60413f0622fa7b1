"""Safe reading, checking and atomic writing of weight files.

Files are read with `weights_only=True` (or safetensors), so that a foreign file cannot run code, and are looked over
before (`archive.py`), so that none takes more memory than its size explains. Beside tensors only what published
training files hold is let through: `argparse.Namespace`, the configurations of the package yacs, which are read as
dictionaries and need no yacs, and scalars of numpy, which become plain numbers.
"""

import argparse
import io
import os
import pickle
import re
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from visionssm.utils.files import atomic_write, replacing
from visionssm.utils.suggest import list_names

from .archive import check_archive
from .errors import CheckpointError

__all__ = ['CheckpointError', 'check_fit', 'compare_shapes', 'find_differences', 'load_state_dict', 'named_average',
           'read_checkpoint', 'read_metadata', 'safe_settings', 'save_safetensors', 'save_torch', 'unwrap']

_PLAIN_KEYS = ('state_dict', 'model', 'module', 'params', 'model_state_dict')
# trainings of diffusion models keep under this name what their authors draw with
_SAMPLER_KEYS = ('ema',)
_EMA_KEYS = ('state_dict_ema', 'model_ema', 'ema_state_dict', 'params_ema')
_WRAPPER_PREFIXES = ('module.', '_orig_mod.')
# what averaged models of MMEngine and of torch count beside the weights
_AVERAGE_COUNTERS = ('steps', 'n_averaged')
_READING = threading.RLock()
# What the unpickler stumbles over in bytes that are no checkpoint, depending on where they stop making sense.
_DAMAGE = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError,
           struct.error, zipfile.BadZipFile)


class _Kind:
    """Stands for a type of numpy: its code, and nothing of what else a file says about it."""

    def __init__(self, code: str = '', *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Keep the code; byte orders other than the usual one do not occur."""


def _number(kind: Any, content: Any = b'') -> Any:
    """Return a scalar of numpy as a plain number, None where it is no number."""
    code = getattr(kind, 'code', '')
    if not isinstance(content, bytes) or not re.fullmatch(r'[fiu][1248]|b1', code):
        return None
    values = np.frombuffer(content, code)
    return values[0].item() if len(values) == 1 else None


def safe_settings() -> AbstractContextManager:
    """Let the settings in published training files through a reader of plain tensors, while the context lasts.

    What somebody has allowed under the same name before stays what it is.
    """
    ours = [argparse.Namespace, (OrderedDict, 'yacs.config.CfgNode'), (_Kind, 'numpy.dtype')]
    return allow_globals(ours + [(_number, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')])


@contextmanager
def allow_globals(entries: Iterable[Any]) -> Iterator[None]:
    """Let a reader of plain tensors take what files name, in one thread at a time: its list is that of the process.

    Args:
        entries: As `torch.serialization.safe_globals` takes them; names that are allowed already stay what they are.
    """
    with _READING:
        taken = {_name(entry) for entry in torch.serialization.get_safe_globals()}
        with torch.serialization.safe_globals([entry for entry in entries if _name(entry) not in taken]):
            yield


def _name(entry: Any) -> str:
    return entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}'


def read_checkpoint(path: str | os.PathLike, device: str | torch.device = 'cpu') -> dict[str, Any]:
    """Read a weight file safely and return all that it holds.

    Args:
        path: A `.safetensors` file, or a file written by `torch.save`.
        device: Where the tensors go.

    Returns:
        The dictionary in the file, a state dict or a training checkpoint that holds one.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is empty, cut off, of another kind, or needs more than plain tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint file {str(path)!r}.')
    if path.stat().st_size == 0:
        raise CheckpointError(f'The checkpoint {str(path)!r} is empty (0 bytes): fetch or save it again.')
    read = _read_safetensors if path.suffix == '.safetensors' else _read_pickle
    content = read(path, device)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f'The checkpoint {str(path)!r} holds a {type(content).__name__}, not a dictionary of tensors.')
    return dict(content)


def load_state_dict(
        path: str | os.PathLike,
        ema: bool | None = None,
        device: str | torch.device = 'cpu',
) -> dict[str, torch.Tensor]:
    """Read the state dict of one model from a weight file or a training checkpoint.

    Args:
        path: A `.safetensors` file, or a file written by `torch.save`.
        ema: Prefer the averaged weights where the file holds both; when None, where its name ends in `_ema`.
        device: Where the tensors go.

    Returns:
        Key to tensor, without the prefixes that DistributedDataParallel and torch.compile add.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read, or holds no tensors.
    """
    state_dict = unwrap(read_checkpoint(path, device), ema=named_average(path) if ema is None else ema)
    if not any(isinstance(value, torch.Tensor) for value in state_dict.values()):
        found = list_names(sorted(map(str, state_dict))) or 'nothing'
        raise CheckpointError(f'The checkpoint {str(path)!r} holds no tensors. It holds: {found}.')
    return state_dict


def named_average(source: str | os.PathLike) -> bool:
    """Return whether the name of a file, or its URL, says that averaged weights were what was published."""
    return Path(source).stem.endswith('_ema')


def unwrap(checkpoint: Mapping[str, Any], ema: bool = False) -> dict[str, Any]:
    """Take the state dict out of a training checkpoint and strip wrapper prefixes from its keys.

    Args:
        checkpoint: A state dict, or a dictionary that holds one under a usual name.
        ema: Prefer the averaged weights where both are there; those of a diffusion model (`ema`) always come first.

    Returns:
        The state dict; a plain state dict comes back as it is.
    """
    order = _EMA_KEYS + _PLAIN_KEYS if ema else _PLAIN_KEYS + _EMA_KEYS
    for key in _SAMPLER_KEYS + order:
        if isinstance(checkpoint.get(key), Mapping):
            return unwrap(checkpoint[key], ema=ema)
    average = any(str(key).startswith('module.') for key in checkpoint)
    return {_strip(str(key)): value for key, value in checkpoint.items()
            if not (average and key in _AVERAGE_COUNTERS)}


def check_fit(model: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str = 'The state dict') -> None:
    """Raise one error that lists every key in which a state dict differs from a model.

    Args:
        model: The model that is to take the weights.
        state_dict: Keys in the model's own names.
        source: What to call the state dict in the error.

    Raises:
        CheckpointError: A key is missing, unexpected or of another shape.
    """
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
    compare_shapes(wanted, given, f'{source} does not fit {type(model).__name__}')


def find_differences(
        wanted: Mapping[str, tuple[int, ...]],
        given: Mapping[str, tuple[int, ...]],
) -> dict[str, list[str]]:
    """Compare keys and shapes.

    Args:
        wanted: Key to shape as the model has them.
        given: Key to shape as the file has them.

    Returns:
        'missing', 'unexpected' and 'mis-shaped' to the keys, those of another shape with both shapes; what is empty is
        left out.
    """
    found = {
        'missing': [key for key in wanted if key not in given],
        'unexpected': [key for key in given if key not in wanted],
        'mis-shaped': [f'{key} is {given[key]}, expected {shape}' for key, shape in wanted.items()
                       if given.get(key, shape) != shape]}
    return {label: names for label, names in found.items() if names}


def compare_shapes(
        wanted: Mapping[str, tuple[int, ...]],
        given: Mapping[str, tuple[int, ...]],
        headline: str,
) -> None:
    """Raise one error that lists every missing, unexpected and mis-shaped key.

    Args:
        wanted: Key to shape as the model has them.
        given: Key to shape as the file has them.
        headline: First part of the message.

    Raises:
        CheckpointError: The two differ.
    """
    parts = [f'{len(names)} {label}: {list_names(names)}' for label, names in find_differences(wanted, given).items()]
    if parts:
        raise CheckpointError(f'{headline} ({len(wanted)} keys expected, {len(given)} given).\n  ' + '\n  '.join(parts))


def save_safetensors(
        state_dict: Mapping[str, torch.Tensor],
        path: str | os.PathLike,
        metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a state dict so that the target is either the old file or the complete new one, never a part.

    Args:
        state_dict: Key to tensor; tensors that share memory are written twice.
        path: Target; missing parent folders are made.
        metadata: Strings to store in the header.

    Returns:
        The path that was written.

    Raises:
        OSError: The disk is full or not writable; the target is left as it was and no temporary file remains.
    """
    tensors = {key: value.detach().to('cpu').contiguous().clone() for key, value in state_dict.items()}
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={'format': 'pt', **(metadata or {})})
        except safetensors.SafetensorError as error:
            # The library reports a full disk through its own class; callers handle disks through OSError.
            raise OSError(f'Could not write {str(path)!r}: {error}') from error
    return Path(path)


def save_torch(content: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Write what `torch.save` takes, like `save_safetensors`: the target is either the old file or the new one.

    Args:
        content: Tensors and plain values.
        path: Target; missing parent folders are made.

    Returns:
        The path that was written.

    Raises:
        OSError: As `save_safetensors`.
    """
    # in memory first, because torch's own writer may abort the process when a disk is full
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(buffer.getbuffer(), path)
    return Path(path)


def _strip(key: str) -> str:
    while key.startswith(_WRAPPER_PREFIXES):
        key = key.split('.', 1)[1]
    return key


def _read_safetensors(path: Path, device: str | torch.device) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path, device=str(device))
    except safetensors.SafetensorError as error:
        raise CheckpointError(_damaged(path, error)) from error


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Return what stands in the header of a safetensors file beside its tensors; nothing for a file of another kind.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file cannot be read.
    """
    path = Path(path)
    if path.suffix != '.safetensors':
        return {}
    try:
        with safetensors.safe_open(path, 'pt') as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise CheckpointError(_damaged(path, error)) from error


def _read_pickle(path: Path, device: str | torch.device) -> Any:
    try:
        check_archive(path)
        with safe_settings():
            return torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # Files of older formats have no list of their objects; the first one stands in the message.
        unsafe = unsafe_globals(path) or re.findall(r'[Uu]nsupported (?:global: )?GLOBAL (\S+)', str(error))
        if not unsafe:
            raise CheckpointError(_damaged(path, error)) from error
        if any(name.startswith('ultralytics.') for name in unsafe):
            raise CheckpointError(
                f'The checkpoint {str(path)!r} is a whole pickled model of ultralytics, not a state dict: '
                f"visionssm.checkpoints.read_ultralytics(path)['state_dict'] takes the weights out of it.") from error
        raise CheckpointError(
            f'The checkpoint {str(path)!r} needs Python objects that are not loaded from files: {", ".join(unsafe)}. '
            f'If you trust its origin, open it once with torch.load(..., weights_only=False) and save the state dict '
            f'alone with visionssm.checkpoints.save_safetensors.') from error
    except _DAMAGE as error:
        raise CheckpointError(_damaged(path, error)) from error


def unsafe_globals(path: Path) -> list[str]:
    """Return the objects that a file names and that are not read from files; none for one that cannot be read."""
    try:
        with safe_settings():
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (*_DAMAGE, OSError, pickle.UnpicklingError):
        return []


def _damaged(path: Path, error: Exception) -> str:
    # PyTorch puts its reason behind the advice to switch its safety off.
    reason = str(error).rpartition('WeightsUnpickler error:')[2].strip().split('\n', 1)[0][:200]
    return (f'The checkpoint {str(path)!r} ({path.stat().st_size} bytes) cannot be read: it is cut off, damaged or not '
            f'a checkpoint ({type(error).__name__}: {reason}). Fetch or save it again.')
