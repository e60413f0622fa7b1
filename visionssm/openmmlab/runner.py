"""MMEngine's runner with exact resumption, atomic checkpoints, and process groups that need no GPU."""
import atexit
import inspect
import logging
import platform
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import mmengine
import timm
import torch
import torch.nn as nn
from mmengine.device import get_device
from mmengine.dist import broadcast, is_distributed, is_main_process
from mmengine.logging import MMLogger
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import _ParamScheduler
from mmengine.registry import DefaultScope
from mmengine.runner import Runner as _Runner
from mmengine.runner.base_loop import BaseLoop
from mmengine.utils import apply_to
from torch.utils.data import DataLoader

from ..checkpoints import CheckpointError, check_fit
from ..checkpoints.load import save_torch
from ..registry import FUNCTIONS, RUNNERS
from . import dist
from .checkpoint import (
    find_resumable,
    is_whole,
    load_any_weights,
    pack_hub,
    read_training_checkpoint,
    unpack_hub,
)
from .classes import check_channels, check_classes
from .data import ImageDataset, SeededSampler
from .hooks import EMAHook
from .loops import KeyedDataset, ResumableEpochLoop, exact_loop
from .scopes import find_class

__all__ = ['ResumableEpochLoop', 'VisionRunner']

SHARD_TYPES = ('FullyShard', 'visionssm.FullyShard')
# MMEngine's remarks about its own interfaces, which no user can act on
NOISE = ('"FileClient" will be', '"HardDiskBackend" is', 'Distributed training is not used, all Sync',
         'Exp name:', '`resume_param_scheduler` is True but')
OWN_HOOKS = {'step_seed': 'StepSeedHook', 'sync_buffers': 'SyncBuffersHook', 'nan_guard': 'NaNGuardHook',
             'progress': 'ProgressBarHook'}


def _fill_in(record: logging.LogRecord) -> bool:
    record.msg, record.args = record.getMessage(), None
    return True


def _keyed(dataloader: dict) -> bool:
    """Whether a loader's sampler hands out sample keys, and its dataset does not know them."""
    sampler, dataset = dataloader.get('sampler'), dataloader.get('dataset')
    if not isinstance(sampler, dict) or not isinstance(dataset, dict):
        return False
    if sampler.get('type') not in ('SeededSampler', 'visionssm.SeededSampler', SeededSampler):
        return False
    scope = DefaultScope.get_current_instance()
    kind = find_class(dataset.get('type'), scope.scope_name if scope else 'visionssm', 'DATASETS')
    return not (inspect.isclass(kind) and issubclass(kind, ImageDataset | KeyedDataset))


@RUNNERS.register_module()
class VisionRunner(_Runner):
    """MMEngine's runner with the guarantees of this package.

    - Resuming reaches the same weights, bit for bit, as training without a stop (``StepSeedHook`` makes all random
      numbers a function of seed, process and step).
    - A resume takes the newest checkpoint that is whole, and refuses one of another model.
    - Distributed training needs no GPU; ``model_wrapper_cfg=dict(type='FullyShard')`` shards the model.
    - ``load_from`` takes safetensors, published files and ``visionssm://``.

    Args:
        As MMEngine's ``Runner``.
    """

    saved_state: dict[str, torch.Tensor] | None = None
    _trains = False

    def train(self) -> nn.Module:
        """Train as the config says.

        Returns:
            The model.
        """
        self._trains = True
        try:
            return super().train()
        finally:
            self._stop_workers()

    def _stop_workers(self) -> None:
        """End the loaders' processes now: left to the garbage collector, each one takes five seconds."""
        for loop in (self._train_loop, self._val_loop):
            loader = getattr(loop, 'dataloader', None)
            # only loaders with persistent processes keep their iterator
            if getattr(loader, '_iterator', None) is not None:
                loader._iterator._shutdown_workers()
                loader._iterator = None

    def setup_env(self, env_cfg: dict) -> None:
        """Join the process group, on a CPU without MMEngine's GPU calls.

        Args:
            env_cfg: As MMEngine's.
        """
        if self.distributed and not is_distributed() and get_device() == 'cpu':
            dist.init_cpu_group(self.launcher, **env_cfg.get('dist_cfg', {}))
        super().setup_env(env_cfg)
        if self.distributed:
            atexit.register(dist.leave_group)

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build the run's logger, and let the package's own logger write to the same places.

        Args:
            *args: As MMEngine's.
            **kwargs: As MMEngine's.

        Returns:
            The logger.
        """
        logger = super().build_logger(*args, **kwargs)
        logger.addFilter(lambda record: not any(text in record.getMessage() for text in NOISE))
        package = logging.getLogger('visionssm')
        package.handlers[:] = logger.handlers
        # MMEngine sets levels of handlers and leaves that of the logger open
        package.setLevel(min(handler.level for handler in logger.handlers))
        # MMEngine shows a warning once and compares texts before their values are filled in
        package.addFilter(_fill_in)
        return logger

    def _log_env(self, env_cfg: dict) -> None:
        # MMEngine prints a page of compiler flags and the config, which lies in the work directory anyway
        info = {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
                'device': get_device(), 'threads': torch.get_num_threads(), 'processes': self.world_size,
                'seed': self.seed, 'work_dir': self.work_dir}
        self.logger.info('Run: ' + ', '.join(f'{key} {value}' for key, value in info.items()))

    def get_hooks_info(self) -> str:
        """The hooks in the order in which they run, on one line."""
        return ', '.join(type(hook).__name__ for hook in self._hooks)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Add our hooks to MMEngine's; a config switches one off by ``default_hooks=dict(nan_guard=None)``.

        Args:
            hooks: The config's ``default_hooks``.
        """
        given = dict(hooks or {})
        ours = {name: {'type': f'visionssm.{kind}'} for name, kind in OWN_HOOKS.items() if name not in given}
        given = {name: hook for name, hook in given.items() if hook is not None or name not in OWN_HOOKS}
        given['checkpoint'] = {'interval': 1, **(given.get('checkpoint') or {})}
        if given['checkpoint'].get('type', 'CheckpointHook') == 'CheckpointHook':
            # the bare name means MMEngine's own in configs of other scopes
            given['checkpoint']['type'] = 'visionssm.CheckpointHook'
        super().register_default_hooks({**ours, **given})

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, seed: int | None = None,
                         diff_rank_seed: bool = False) -> DataLoader:
        """Build a loader, whose collate function may be one of this package under its bare name.

        Args:
            dataloader: As MMEngine's.
            seed: Seed of the sampler.
            diff_rank_seed: As MMEngine's.

        Returns:
            The loader.
        """
        collate = dataloader.get('collate_fn') if isinstance(dataloader, dict) else None
        if isinstance(collate, dict) and isinstance(collate.get('type'), str):
            # MMEngine looks a function up in its own registry only, whatever the scope
            function = FUNCTIONS.get(collate['type'])
            dataloader = {**dataloader, 'collate_fn': {**collate, 'type': function or collate['type']}}
        if isinstance(dataloader, dict) and _keyed(dataloader):
            dataloader = {**dataloader, 'dataset': {'type': 'visionssm.KeyedDataset', 'dataset': dataloader['dataset']}}
        return _Runner.build_dataloader(dataloader, seed, diff_rank_seed)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop; ours stand in for MMEngine's, so that a resume continues with the next unseen batch.

        Args:
            loop: As MMEngine's.

        Returns:
            The loop.
        """
        return super().build_train_loop(exact_loop(loop) if isinstance(loop, dict) else loop)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training.

        Args:
            model_wrapper_cfg: As MMEngine's; ``dict(type='FullyShard')`` takes the options of :func:`dist.shard`.
            model: The model.

        Returns:
            The wrapped model.
        """
        cfg = dict(model_wrapper_cfg) if model_wrapper_cfg else {}
        if getattr(model, 'averages_gradients', False):
            if cfg:
                raise ValueError(f'{type(model).__name__} averages gradients itself; set model_wrapper_cfg=None, which '
                                 f'is {cfg}')
            return model.to(get_device())
        if cfg.get('type') in SHARD_TYPES:
            if not self.distributed:
                self.logger.warning('FullyShard needs several processes (--launcher pytorch); the model stays whole')
                return super().wrap_model(None, model)
            model = model.to(get_device())
            for tensor in model.state_dict().values():
                broadcast(tensor)
            return dist.shard(model, cfg, get_device())
        if self.distributed and get_device() == 'cpu':
            # the wrapper refuses device numbers for a model on the CPU
            cfg = {'device_ids': None, 'broadcast_buffers': False,
                   'find_unused_parameters': self.cfg.get('find_unused_parameters', False), **cfg}
        return super().wrap_model(cfg or None, model)

    @property
    def bare_model(self) -> nn.Module:
        """The model without what wraps it: many processes, or test-time augmentation."""
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        return model

    def _init_model_weights(self) -> None:
        # sharded models were made equal on all processes before they were cut
        if not dist.is_sharded(self.model):
            super()._init_model_weights()

    def _check_teacher(self) -> None:
        """Refuse to learn from averaged weights that nothing averages."""
        mesa = getattr(self.bare_model, 'mesa', None)
        if mesa is not None and not any(isinstance(hook, EMAHook) for hook in self._hooks):
            raise ValueError(f'model.mesa ({mesa.weight:g} times the loss to the averaged model) needs an EMAHook, and '
                             "the config has none; add custom_hooks=[dict(type='EMAHook', decay=0.9999, "
                             'update_buffers=True)] or set model.mesa=None')

    def load_or_resume(self) -> None:
        """Load or resume once, as the config says."""
        if self._has_loaded:
            return
        check_channels(self.bare_model)
        loops = (self._train_loop, self._val_loop) if self._trains else (self._test_loop, None)
        check_classes(self.bare_model, *(getattr(loop, 'dataloader', None) for loop in loops))
        if self._trains:
            self._check_teacher()
        if self._resume and self._load_from is None:
            newest = find_resumable(self.work_dir)
            if newest is None:
                self.logger.info(f'{self.work_dir} holds no checkpoint to resume; training starts from the beginning')
                self._resume = False
                return
            self._load_from = str(newest)
        if self._resume and Path(self._load_from).is_dir():
            raise CheckpointError(f'--resume takes a checkpoint file, and {self._load_from} is a folder; '
                                  'use --work-dir FOLDER --resume to take the newest in it')
        super().load_or_resume()

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume training; an epoch may have another number of steps than before, but not in its middle.

        Args:
            filename: A training checkpoint.
            *args: As MMEngine's.
            **kwargs: As MMEngine's.
        """
        super().resume(filename, *args, **kwargs)
        loop, before = self.train_loop, self._resumed_meta.get('epoch_steps')
        if not isinstance(loop, ResumableEpochLoop) or before in (None, len(loop.dataloader)):
            return
        now = len(loop.dataloader)
        if loop.iter != loop.epoch * before:
            raise CheckpointError(f'{filename} is from the middle of an epoch of {before} steps, and an epoch now has '
                                  f'{now}; resume with the same data and total batch size, or from the end of an epoch')
        self.logger.warning(f'an epoch had {before} steps and now has {now}; schedules that count steps shift')
        loop._iter = loop.epoch * now

    def load_checkpoint(self, filename: str, map_location: Any = 'cpu', strict: bool = False, **kwargs: Any) -> dict:
        """Load the weights of a checkpoint of any origin; a training checkpoint when resuming.

        Args:
            filename: As :func:`checkpoint.load_weights` takes.
            map_location: Where the tensors of a training checkpoint go.
            strict: Whether another number of classes is an error also when training starts from the weights;
                in evaluation it always is.
            **kwargs: Ignored; MMEngine's own rules for keys are not needed.

        Returns:
            The checkpoint, as hooks see it.
        """
        model = self.bare_model
        if self._resume:
            weights_only = str(filename).endswith('.safetensors')
            if Path(filename).is_file() and not weights_only and not is_whole(filename):
                raise CheckpointError(f'{filename} is damaged or cut off; --resume without a path takes the newest '
                                      f'whole checkpoint of the work directory')
            checkpoint = {} if weights_only else read_training_checkpoint(filename)
            missing = 'optimizer' not in checkpoint or 'message_hub' not in checkpoint
            if missing or 'epoch_steps' not in checkpoint['meta']:
                kind = 'holds weights only' if missing else "was written by MMEngine's own runner"
                raise CheckpointError(f'{filename} {kind} and cannot be resumed; start from it with '
                                      f'--cfg-options load_from={filename}')
            checkpoint['message_hub'] = unpack_hub(checkpoint['message_hub'])
        else:
            load_any_weights(model, filename, self._trains and not strict)
            checkpoint = {'state_dict': {key: value.clone() for key, value in model.state_dict().items()}}
        self._resumed_meta = checkpoint.get('meta', {})
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        check_fit(model, checkpoint['state_dict'], f'the checkpoint {filename!r}')
        state = checkpoint['state_dict']
        model.load_state_dict(dist.scatter_like(state, model) if dist.is_sharded(model) else state)
        if dist.is_sharded(model) and 'optimizer' in checkpoint:
            self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
            checkpoint['optimizer'] = dist.scatter_optimizer(checkpoint['optimizer'], self.optim_wrapper.optimizer)
        self._has_loaded = True
        self.logger.info(f'Loaded {filename}')
        return checkpoint

    @cached_property
    def _cfg_text(self) -> str:
        # formatting a detector's config takes half a second, more than saving a small model
        return self.cfg.pretty_text

    def save_checkpoint(
            self,
            out_dir: str,
            filename: str,
            file_client_args: dict | None = None,
            save_optimizer: bool = True,
            save_param_scheduler: bool = True,
            meta: dict | None = None,
            by_epoch: bool = True,
            backend_args: dict | None = None,
    ) -> None:
        """Save a checkpoint of whole tensors, however the model is distributed; all processes must call it.

        Args:
            out_dir: Folder, or a prefix that MMEngine's file backends know.
            filename: Name in the folder.
            file_client_args: Not used any more by MMEngine.
            save_optimizer: Whether to save the optimizer's state.
            save_param_scheduler: Whether to save the schedulers' state.
            meta: Values to keep; ``epoch`` and ``iter`` say where to resume.
            by_epoch: Whether the epoch, rather than the step, is complete.
            backend_args: Arguments of the file backend.
        """
        done = {'epoch': self.epoch + by_epoch, 'iter': self.iter + (not by_epoch)}
        meta = {**done, **(meta or {}), 'cfg': self._cfg_text, 'seed': self.seed,
                'experiment_name': self.experiment_name, 'time': time.strftime('%Y%m%d_%H%M%S'),
                'mmengine_version': mmengine.__version__, 'epoch_steps': len(self.train_dataloader)}
        if hasattr(self.train_dataloader.dataset, 'metainfo'):
            meta['dataset_meta'] = self.train_dataloader.dataset.metainfo
        checkpoint = {'meta': meta, 'state_dict': dist.gather(dict(self.bare_model.state_dict())),
                      'message_hub': pack_hub(self.message_hub.state_dict())}
        if save_optimizer:
            checkpoint['optimizer'] = dist.gather(self.optim_wrapper.state_dict())
        if save_param_scheduler and self.param_schedulers is not None:
            # a dictionary of lists where there are several optimizers
            checkpoint['param_schedulers'] = apply_to(self.param_schedulers, lambda x: isinstance(x, _ParamScheduler),
                                                      lambda x: x.state_dict())
        self.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        self.saved_state = checkpoint['state_dict']
        if not is_main_process():
            return
        if '://' in str(out_dir):
            path = mmengine.fileio.join_path(out_dir, filename, backend_args=backend_args)
            mmengine.runner.save_checkpoint(checkpoint, path, backend_args=backend_args)
        else:
            save_torch(checkpoint, Path(out_dir) / filename)
