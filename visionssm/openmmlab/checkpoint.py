"""Checkpoints that are never half-written, loading of every kind of weight file, and the best model for timm."""
import json
import logging
import os
import re
import sys
import zipfile
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook as _CheckpointHook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import CheckpointLoader, Runner
from mmengine.utils import apply_to

from .._factory import create_model
from ..checkpoints import (
    CheckpointError,
    Entry,
    check_fit,
    find_entry,
    load_pretrained,
    load_state_dict,
    read_checkpoint,
    save_safetensors,
)
from ..checkpoints.training import mmengine_values
from ..models._builder import load_official_keys
from ..models._describe import timm_config
from ..registry import HOOKS
from ..utils.files import atomic_write
from ..utils.suggest import list_names
from .scopes import EXTRAS

SCHEME = 'visionssm://'


def is_whole(path: str | os.PathLike) -> bool:
    """Whether a file of ``torch.save`` is complete: its archive closes and every checksum fits.

    Args:
        path: The file.

    Returns:
        True if it can be read to the end.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def find_resumable(work_dir: str | os.PathLike) -> Path | None:
    """Find the newest training checkpoint that is whole; damaged ones are skipped with a warning.

    Args:
        work_dir: The folder with ``epoch_*.pth`` or ``iter_*.pth``.

    Returns:
        Its path, or None.
    """
    found = []
    for path in Path(work_dir).glob('*.pth'):
        step = re.fullmatch(r'(epoch|iter)_(\d+)', path.stem)
        if step:
            found.append((step[1], int(step[2]), path))
    # step numbers order one kind of name; with both kinds only the time of writing compares
    mixed = len({kind for kind, _, _ in found}) > 1
    for _, _, path in sorted(found, key=lambda item: item[2].stat().st_mtime_ns if mixed else item[1], reverse=True):
        if is_whole(path):
            return path
        print_log(f'{path} is damaged or cut off and is skipped', logger='current', level=logging.WARNING)
    return None


def load_weights(net: nn.Module, source: str | os.PathLike, keep_head: bool = False) -> None:
    """Load weights of any origin into a timm model, or raise an error that lists what does not fit.

    Args:
        net: A timm model, ours or timm's.
        source: A checkpoint of the runner, a safetensors file, a published file of the model's authors, or
            ``visionssm://`` with a model's name and tag or a path.
        keep_head: Leave the classifier as it is where the file's has another number of classes.
    """
    state = read_weights(net, source)
    if keep_head:
        classifier = (getattr(net, 'pretrained_cfg', None) or {}).get('classifier') or ()
        heads = (classifier,) if isinstance(classifier, str) else classifier
        own = net.state_dict()
        for key in [f'{head}.{leaf}' for head in heads for leaf in ('weight', 'bias')]:
            if key in state and key in own and state[key].shape != own[key].shape:
                print_log(f'{key}: the file has shape {tuple(state[key].shape)}, the model {tuple(own[key].shape)}; '
                          'the classifier keeps its initial weights', logger='current', level=logging.WARNING)
                state[key] = own[key]
    check_fit(net, state, f'the checkpoint {str(source)!r}')
    net.load_state_dict(state)


def read_weights(net: nn.Module, source: str | os.PathLike, whole: bool = True) -> dict[str, torch.Tensor]:
    """Read a weight file into the key names of a timm model; shapes are not checked.

    Args:
        net: The model that says how foreign keys are renamed.
        source: As in :func:`load_weights`.
        whole: Refuse files with foreign keys that are of another model; otherwise the caller takes what fits.

    Returns:
        The state dict.
    """
    return rename_weights(net, load_any_state(str(source)), whole)


def rename_weights(net: nn.Module, state: Mapping[str, torch.Tensor], whole: bool = True) -> dict[str, torch.Tensor]:
    """Put the weights of a file into the key names of a timm model; shapes are not checked.

    Args:
        net: The model that says how foreign keys are renamed.
        state: What the file holds.
        whole: As in :func:`read_weights`.

    Returns:
        The state dict.
    """
    state, own = dict(state), net.state_dict().keys()
    if not own & state.keys() and any(key.startswith('model.') for key in state):
        state = {key.removeprefix('model.'): value for key, value in state.items() if key.startswith('model.')}
    family = sys.modules[type(net).__module__]
    rename = getattr(family, 'checkpoint_filter_fn', None)
    if rename is not None and state.keys() != own and whole:
        return rename(state, net)
    if not whole and hasattr(family, 'OFFICIAL'):
        load_official_keys(state, '', net, family.OFFICIAL)
    return state


def load_any_state(source: str) -> dict[str, torch.Tensor]:
    """Read the state dict in a weight file, in the names that it has there; no code in it runs.

    Args:
        source: As in :func:`load_weights`.

    Returns:
        The state dict.
    """
    if source.startswith(SCHEME):
        return dict(load_from_visionssm(source)['state_dict'])
    with mmengine_values():
        return load_state_dict(source)


def read_training_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read all of a training checkpoint, ours or one of OpenMMLab's, without running any code that it may hold.

    Args:
        path: The file.

    Returns:
        What it holds; log buffers of MMEngine come without their functions.
    """
    with mmengine_values():
        return read_checkpoint(path)


def load_any_weights(model: nn.Module, source: str | os.PathLike, keep_head: bool = False) -> None:
    """Load weights of any origin into a model of the runner, or raise an error that lists what does not fit.

    Args:
        model: A wrapper of one plain model (its attribute ``model``), or a detector or segmentor.
        source: As :func:`load_weights` and :func:`load_dense_weights` take.
        keep_head: Leave the classifier as it is where the file's has another number of classes.
    """
    apart = tuple(f'{name}.' for name in getattr(model, 'training_only', ()))
    if all(key.startswith(('model.', *apart)) for key in model.state_dict()):
        load_weights(model.model, source, keep_head)
    else:
        load_dense_weights(model, source, keep_head)


def load_dense_weights(model: nn.Module, source: str | os.PathLike, keep_heads: bool = False) -> None:
    """Load weights into a detector or segmentor, or raise an error that lists what does not fit.

    Args:
        model: The model; a backbone that knows the names of its authors' files renames their keys.
        source: A checkpoint of the runner or of OpenMMLab's, an export of ours, or ``visionssm://PATH``.
        keep_heads: Leave the parts of heads as they are that depend on the number of classes where the file's differ.
    """
    state = load_any_state(str(source))
    own = model.state_dict()
    # a backbone may turn tensors of its authors' files around, so its shapes count when they are loaded
    different = [key for key, value in state.items()
                 if key in own and own[key].shape != value.shape and not key.startswith('backbone.')]
    kept = [key for key in different if keep_heads and re.search(r'(^|\.)\w*head\.', key)
            and own[key].shape[1:] == state[key].shape[1:]]
    if kept:
        print_log(f'{source} has another number of classes; initial weights stay in {list_names(kept)}',
                  logger='current', level=logging.WARNING)
    shapes = [f'{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}'
              for key in different if key not in kept]
    try:
        found = model.load_state_dict({key: value for key, value in state.items() if key not in different}, False)
    except RuntimeError as error:
        raise CheckpointError(f'the checkpoint {str(source)!r} does not fit {type(model).__name__}: {error}') from error
    missing = [key for key in found.missing_keys if key not in different]
    parts = [f'{len(names)} {label}: {list_names(names)}' for label, names in
             (('missing', missing), ('unexpected', found.unexpected_keys), ('mis-shaped', shapes)) if names]
    if parts:
        hint = '' if any(key in own for key in state) else \
            '\n  Weights of a backbone alone belong into model.backbone.pretrained or its init_cfg.'
        raise CheckpointError(f'the checkpoint {str(source)!r} does not fit {type(model).__name__} ({len(own)} keys '
                              f'expected, {len(state)} given).\n  ' + '\n  '.join(parts) + hint)


def is_training_checkpoint(path: str) -> bool:
    """Whether a file is a checkpoint that MMEngine's runner wrote, which holds more than tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith('data.pkl')), None)
            return pickled is not None and b'mmengine_version' in archive.read(pickled)
    except (zipfile.BadZipFile, OSError):
        return False


@CheckpointLoader.register_scheme(prefixes=SCHEME, force=True)
def load_from_visionssm(filename: str, map_location: str | None = None) -> dict:
    """Load ``visionssm://NAME[.TAG]`` (published weights) or ``visionssm://PATH`` for MMEngine's configs.

    Args:
        filename: The address; NAME is a model, or the config of a detector or segmenter that stands in the catalogue.
        map_location: Where the tensors go.

    Returns:
        ``dict(state_dict=...)`` with the keys of the model; of a detector or segmenter with those of its authors' file.
    """
    name = filename.removeprefix(SCHEME)
    if Path(name).suffix in ('.safetensors', '.pth', '.pt', '.bin'):
        return {'state_dict': load_state_dict(name, device=map_location or 'cpu')}
    entry = _entry(name)
    if entry is not None and entry.config:
        state = load_pretrained(entry)
    elif entry is not None:
        state = create_model(name, pretrained=True).state_dict()
    else:
        from .classifier import create_timm_model
        state = create_timm_model(name, pretrained=True).state_dict()
    return {'state_dict': {key: value.to(map_location or 'cpu') for key, value in state.items()}}


def _entry(name: str) -> Entry | None:
    """Look a name up in the catalogue; models of timm itself do not stand there."""
    try:
        return find_entry(name)
    except ValueError:
        return None


@CheckpointLoader.register_scheme(prefixes=r'.*\.safetensors$', force=True)
def load_from_safetensors(filename: str, map_location: str | None = None) -> dict:
    """Load a safetensors file, which MMEngine itself cannot.

    Args:
        filename: The file.
        map_location: Where the tensors go.

    Returns:
        ``dict(state_dict=...)``.
    """
    return {'state_dict': load_state_dict(filename, device=map_location or 'cpu')}


def pack_hub(state: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the state of MMEngine's message hub into tensors and plain values, which load without running any code.

    Args:
        state: What ``MessageHub.state_dict`` returns.

    Returns:
        What :func:`unpack_hub` takes.
    """
    scalars = {key: {'max_length': buffer.max_length, **dict(zip(('log_history', 'count_history'),
                                                                  map(torch.from_numpy, buffer.data), strict=True))}
               for key, buffer in state['log_scalars'].items()}
    info = apply_to(dict(state['runtime_info']), lambda x: isinstance(x, np.generic), lambda x: x.item())
    return {'log_scalars': scalars, 'runtime_info': info, 'resumed_keys': dict(state['resumed_keys'])}


def unpack_hub(state: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`pack_hub`.

    Args:
        state: What :func:`pack_hub` returned.

    Returns:
        What ``MessageHub.load_state_dict`` takes.
    """
    scalars = {key: HistoryBuffer(value['log_history'].tolist(), value['count_history'].tolist(), value['max_length'])
               for key, value in state['log_scalars'].items()}
    return {**state, 'log_scalars': scalars}


def export_best(classifier: nn.Module, state: Mapping[str, torch.Tensor], folder: str | os.PathLike,
                classes: tuple[str, ...] = (), notes: Mapping[str, Any] | None = None) -> Path:
    """Write ``model.safetensors`` and ``config.json``, from which timm rebuilds the model.

    ``timm.create_model(name, checkpoint_path='FOLDER/model.safetensors')`` and
    ``timm.create_model('local-dir:FOLDER', pretrained=True)`` both read it.

    Args:
        classifier: The :class:`ImageClassifier` that holds the model.
        state: Its state dict, averaged where training averages.
        folder: Where to write.
        classes: Names of the classes.
        notes: Plain values about the training, kept in the file's metadata.

    Returns:
        The path of the weights.
    """
    net, folder = classifier.model, Path(folder)
    preprocessor = classifier.data_preprocessor
    data_config = {key: tuple(getattr(preprocessor, key).flatten().tolist()) for key in ('mean', 'std')
                   if getattr(preprocessor, key, None) is not None}
    if classifier.evaluated_size is not None:
        # most models have no size of their own, and their scores are those at this one
        data_config['input_size'] = classifier.evaluated_size
    config = timm_config(net, classes, data_config)
    state = {key.removeprefix('model.'): value for key, value in state.items() if key.startswith('model.')}
    metadata = {'config': json.dumps(config), 'notes': json.dumps(dict(notes or {}))}
    target = save_safetensors(state, folder / 'model.safetensors', metadata)
    atomic_write(json.dumps(config, indent=2).encode(), folder / 'config.json')
    return Path(target)


class _RemoveLater:
    """A file backend whose removals wait until what replaces the files is on the disk."""

    def __init__(self, backend: LocalBackend) -> None:
        self.backend = backend
        self.pending: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.pending.append(path)

    def flush(self, keep: set[str]) -> None:
        pending, self.pending = self.pending, []
        for path in pending:
            if path not in keep and self.backend.isfile(path):
                self.backend.remove(path)


@HOOKS.register_module()
class CheckpointHook(_CheckpointHook):
    """MMEngine's checkpoint hook, safe against a kill or a full disk at any moment.

    New files appear whole or not at all, old ones go only after their successor is there, and the best model is also
    exported for timm into ``WORK_DIR/best``.

    Args:
        export: Whether to export the best model.
        **kwargs: What MMEngine's hook takes: ``interval``, ``by_epoch``, ``max_keep_ckpts``, ``save_best``, ...
    """

    def __init__(self, export: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.export = export

    def before_train(self, runner: Runner) -> None:
        """Prepare the folder, and clear what an earlier kill may have left of an unfinished file.

        Args:
            runner: The runner.
        """
        super().before_train(runner)
        self.file_backend = _RemoveLater(self.file_backend)
        if is_main_process() and Path(self.out_dir).is_dir():
            for path in Path(self.out_dir).glob('.*.tmp'):
                path.unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self.file_backend.flush(self._kept())

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        missing = [key for key in self.save_best or () if key != 'auto' and key not in metrics]
        if missing:
            raise CheckpointError(f'save_best={missing[0]!r} is no metric of the evaluator, which has '
                                  f'{", ".join(metrics)}; set default_hooks.checkpoint.save_best to one of them')
        before = self._kept()
        super()._save_best_checkpoint(runner, metrics)
        self.file_backend.flush(self._kept())
        best = getattr(self, 'best_ckpt_path', None)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not (self.export and best and best not in before and is_main_process()):
            return
        notes: dict[str, float] = {key: float(value) for key, value in metrics.items() if isinstance(value, Real)}
        notes.update(epoch=runner.epoch, iter=runner.iter)
        meta = getattr(runner.val_dataloader.dataset, 'metainfo', {})
        folder = Path(self.out_dir) / 'best'
        if runner.cfg.get('default_scope') in EXTRAS:
            from .portable import export_dense
            target = export_dense(runner.saved_state, folder, runner.cfg, meta, notes)
        elif hasattr(model, 'export'):
            classes = {'classes': list(meta['classes'])} if meta.get('classes') else {}
            target = model.export(runner.saved_state, folder, {**notes, **classes})
        elif hasattr(model, 'model'):
            target = export_best(model, runner.saved_state, folder, tuple(meta.get('classes') or ()), notes)
        else:
            return
        runner.saved_state = None
        runner.logger.info(f'The best model is exported to {target}')

    def _kept(self) -> set[str]:
        best = getattr(self, 'best_ckpt_path_dict', {})
        return {path for path in (self.last_ckpt, getattr(self, 'best_ckpt_path', None), *best.values()) if path}
