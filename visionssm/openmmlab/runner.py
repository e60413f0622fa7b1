"""MMEngine's runner with exact resumption, atomic checkpoints, and process groups that need no GPU."""
import atexit
import logging
import platform
import time
from pathlib import Path
from typing import Any

import mmengine
import timm
import torch
import torch.nn as nn
from mmengine.device import get_device
from mmengine.dist import broadcast, is_distributed, is_main_process
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner import Runner as _Runner
from mmengine.runner.base_loop import BaseLoop
from torch.utils.data import DataLoader

from ..checkpoints import CheckpointError, check_fit, read_checkpoint
from ..registry import FUNCTIONS, LOOPS, RUNNERS
from . import dist
from .checkpoint import atomic_save, find_resumable, is_whole, load_weights, pack_hub, unpack_hub
from .hooks import EMAHook

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


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """MMEngine's epoch loop, which after a resume in mid-epoch continues with the next unseen batch."""

    def run_epoch(self) -> None:
        """Run what is left of the epoch."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done = self._iter - self._epoch * len(self.dataloader)
        if done:
            self._skip(done)
        for idx, data_batch in enumerate(self.dataloader, start=done):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _skip(self, batches: int) -> None:
        sampler = self.dataloader.batch_sampler.sampler
        if not hasattr(sampler, 'skip'):
            raise CheckpointError(f'the checkpoint is from the middle of an epoch, and the sampler '
                                  f'{type(sampler).__name__} cannot skip what was seen; use the sampler SeededSampler')
        sampler.skip(batches * self.dataloader.batch_sampler.batch_size)


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
        package.setLevel(logger.level)
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
        given.setdefault('checkpoint', {'type': 'visionssm.CheckpointHook', 'interval': 1})
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
        return _Runner.build_dataloader(dataloader, seed, diff_rank_seed)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop; an epoch-based one can resume in the middle of an epoch.

        Args:
            loop: As MMEngine's.

        Returns:
            The loop.
        """
        if isinstance(loop, dict) and loop.get('by_epoch') and 'type' not in loop:
            loop = {key: value for key, value in loop.items() if key != 'by_epoch'}
            loop['type'] = 'visionssm.ResumableEpochLoop'
        return super().build_train_loop(loop)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training.

        Args:
            model_wrapper_cfg: As MMEngine's; ``dict(type='FullyShard')`` takes the options of :func:`dist.shard`.
            model: The model.

        Returns:
            The wrapped model.
        """
        cfg = dict(model_wrapper_cfg) if model_wrapper_cfg else {}
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
        """The model without its distributed wrapper."""
        return self.model.module if is_model_wrapper(self.model) else self.model

    def _init_model_weights(self) -> None:
        # sharded models were made equal on all processes before they were cut
        if not dist.is_sharded(self.model):
            super()._init_model_weights()

    def _check_classes(self) -> None:
        """Refuse data with more classes than the model, and splits whose labels mean different classes."""
        train, val = (tuple((getattr(loop.dataloader.dataset, 'metainfo', None) or {}).get('classes') or ())
                      if loop is not None else () for loop in (self._train_loop, self._val_loop))
        number = getattr(self.bare_model, 'num_classes', None)
        if isinstance(number, int) and len(train) > number:
            raise ValueError(f'the training data has {len(train)} classes ({", ".join(train[:5])}'
                             f'{" ..." if len(train) > 5 else ""}) and the model {number}; set '
                             f'model.model.num_classes={len(train)}')
        if train and val and train[:len(val)] != val:
            place = next(i for i, name in enumerate(val) if train[i:i + 1] != (name,))
            raise ValueError(f'label {place} is {val[place]!r} in the validation data and '
                             f'{train[place] if place < len(train) else "missing"!r} in the training data, which have '
                             f'{len(val)} and {len(train)} classes; give both datasets the same folders, or one class '
                             "order by class_map=['first class', 'second class', ...]")

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
        if self._trains:
            self._check_classes()
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
            checkpoint = {} if weights_only else read_checkpoint(filename)
            if 'optimizer' not in checkpoint or 'message_hub' not in checkpoint:
                raise CheckpointError(f'{filename} holds weights only and cannot be resumed; start from it with '
                                      f'--cfg-options load_from={filename}')
            checkpoint['message_hub'] = unpack_hub(checkpoint['message_hub'])
        elif hasattr(model, 'model'):
            load_weights(model.model, filename, keep_head=self._trains and not strict)
            checkpoint = {'state_dict': {key: value.clone() for key, value in model.state_dict().items()}}
        else:
            return super().load_checkpoint(filename, map_location, strict, **kwargs)
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
        meta = {**done, **(meta or {}), 'cfg': self.cfg.pretty_text, 'seed': self.seed,
                'experiment_name': self.experiment_name, 'time': time.strftime('%Y%m%d_%H%M%S'),
                'mmengine_version': mmengine.__version__, 'epoch_steps': len(self.train_dataloader)}
        if hasattr(self.train_dataloader.dataset, 'metainfo'):
            meta['dataset_meta'] = self.train_dataloader.dataset.metainfo
        checkpoint = {'meta': meta, 'state_dict': dist.gather(dict(self.bare_model.state_dict())),
                      'message_hub': pack_hub(self.message_hub.state_dict())}
        if save_optimizer:
            checkpoint['optimizer'] = dist.gather(self.optim_wrapper.state_dict())
        if save_param_scheduler and self.param_schedulers is not None:
            checkpoint['param_schedulers'] = [scheduler.state_dict() for scheduler in self.param_schedulers]
        self.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        self.saved_state = checkpoint['state_dict']
        if not is_main_process():
            return
        if '://' in str(out_dir):
            path = mmengine.fileio.join_path(out_dir, filename, backend_args=backend_args)
            mmengine.runner.save_checkpoint(checkpoint, path, backend_args=backend_args)
        else:
            atomic_save(checkpoint, Path(out_dir) / filename)
