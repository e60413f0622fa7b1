"""Weights by name, in our key names: official files are converted once, and the result is kept beside them.

The kept file is named after the hash of the official one and the version of this package, so it is made anew where
either changes, and also where it is damaged.
"""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

from visionssm._version import __version__
from visionssm.utils.files import atomic_write

from .catalogue import Entry
from .download import Cached, cache_root, fetch, look_up
from .load import CheckpointError, load_state_dict, save_safetensors
from .training import mmengine_values
from .transfer import hash_file
from .ultralytics import read_ultralytics

__all__ = ['load_pretrained', 'read_entry']

_logger = logging.getLogger('visionssm')

Convert = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def read_entry(entry: Entry, path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read the state dict of an entry, in the official names, from its file.

    Args:
        entry: What the file is.
        path: The file.

    Raises:
        CheckpointError: The file cannot be read.
    """
    if entry.reader == 'ultralytics':
        return read_ultralytics(path)['state_dict']
    # detectors and segmenters come from trainings of OpenMMLab
    with mmengine_values() if entry.config else nullcontext():
        state_dict = load_state_dict(path, ema=entry.ema or None)
    return {key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)}


def load_pretrained(
        entry: Entry,
        convert: Convert | None = None,
        cache_dir: str | os.PathLike | None = None,
        progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Return the weights of an entry; fetched, checked and converted before where that has not been done.

    Args:
        entry: Entry of the catalogue.
        convert: From the official state dict to ours; the official one is returned when None.
        cache_dir: Folder of the cache.
        progress: Show how much has come.

    Returns:
        Key to tensor on the CPU.

    Raises:
        CheckpointError: The file can only be had by hand, cannot be read, or is of another model.
        DownloadError: No source gives the expected file.
        OSError: The cache cannot be written.
    """
    cached = look_up(entry, cache_dir)
    if cached and entry.sha256 in (None, cached.sha256):
        kept = _kept(entry, cached, convert is not None, cache_dir)
        if _is_intact(kept):
            return load_state_dict(kept)
    cached = fetch(entry, cache_dir, progress)
    try:
        state_dict = read_entry(entry, cached.path)
        if convert is not None:
            state_dict = dict(convert(state_dict))
    except CheckpointError as error:
        raise CheckpointError(f'{cached.path}, from {cached.source}, is not what {entry.name} stands for: '
                              f'{error}') from error
    _keep(state_dict, _kept(entry, cached, convert is not None, cache_dir), entry, cached)
    return state_dict


def _kept(entry: Entry, cached: Cached, converted: bool, cache_dir: str | os.PathLike | None) -> Path:
    form = __version__ if converted else f'{__version__}-official'
    return cache_root(cache_dir) / 'converted' / f'{entry.name}-{cached.sha256[:16]}-{form}.safetensors'


def _keep(state_dict: Mapping[str, torch.Tensor], kept: Path, entry: Entry, cached: Cached) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        # a file without its hash is not trusted, so the old hash goes before the new file comes
        _note(kept).unlink(missing_ok=True)
        save_safetensors(state_dict, kept, {'name': entry.name, 'source': cached.source, 'sha256': cached.sha256,
                                            'licence': entry.licence, 'repository': entry.repository})
        atomic_write(hash_file(kept), _note(kept))
    except OSError as error:
        _logger.warning('The converted weights of %s are not kept, so the next load converts them again: %s',
                        entry.name, error)


def _is_intact(kept: Path) -> bool:
    try:
        intact = _note(kept).read_text(encoding='utf-8') == hash_file(kept)
    except OSError:
        return False
    if not intact:
        _logger.warning('%s is damaged and is made anew.', kept)
    return intact


def _note(kept: Path) -> Path:
    return kept.with_name(f'{kept.name}.sha256')
