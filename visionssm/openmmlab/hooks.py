"""Hooks: random numbers that survive a resume, equal statistics, a guard against NaN, averages and a progress bar."""
import logging
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmengine.dist import all_reduce_params, get_rank, is_distributed, is_main_process
from mmengine.hooks import EMAHook as _EMAHook
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.runner import EpochBasedTrainLoop, Runner
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..registry import HOOKS, MODELS
from . import dist

__all__ = ['EMAHook', 'NaNGuardHook', 'NonFiniteError', 'ProgressBarHook', 'StepSeedHook', 'SyncBuffersHook',
           'seed_step']


class NonFiniteError(FloatingPointError):
    """The loss or a gradient is infinite or not a number."""


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed Python, NumPy and PyTorch as a function of the run's seed, the step and the process.

    Args:
        seed: Seed of the run.
        step: Number of the training step.
        rank: Number of the process.
    """
    words = np.random.SeedSequence([seed, step, rank]).generate_state(2)
    random.seed(int(words[0]))
    # timm's Mixup and CutMix draw from NumPy's global generator
    np.random.seed(int(words[0]))  # noqa: NPY002
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


@HOOKS.register_module()
class StepSeedHook(Hook):
    """Make every random number a function of (seed, step, process).

    Drop path, dropout, Mixup and CutMix then need no saved generator states: a run that resumes at any step draws
    what the uninterrupted run draws. The order of the data follows from (seed, epoch) in the sampler.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Hand the seed of the run, which a resume may have restored, to the data.

        Args:
            runner: The runner.
        """
        loader = runner.train_dataloader
        for part in (getattr(loader.batch_sampler, 'sampler', None), loader.dataset):
            if hasattr(part, 'seed'):
                part.seed = runner.seed

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the step.

        Args:
            runner: The runner.
            batch_idx: Number of the batch in the epoch.
            data_batch: The batch.
        """
        seed_step(runner.seed, runner.iter, get_rank())


@HOOKS.register_module()
class SyncBuffersHook(Hook):
    """Average the running statistics of normalisation layers over all processes after each step.

    Each process sees other images, so theirs drift apart: processes would evaluate, and teach, different models, and
    a checkpoint would hold those of the first one, so that a resumed run differed from an uninterrupted one.
    """

    # before the average of the weights takes them
    priority = 'HIGH'

    def before_train(self, runner: Runner) -> None:
        """List the statistics.

        Args:
            runner: The runner.
        """
        stored = runner.bare_model.state_dict().keys() if is_distributed() else ()
        self.buffers = [buffer for name, buffer in runner.bare_model.named_buffers()
                        if name in stored and buffer.is_floating_point()]

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Average them.

        Args:
            runner: The runner.
            batch_idx: Number of the batch in the epoch.
            data_batch: The batch.
            outputs: The losses.
        """
        if self.buffers:
            all_reduce_params(self.buffers, op='mean')


@HOOKS.register_module()
class NaNGuardHook(Hook):
    """Stop at the first loss or gradient that is not finite, before it reaches the weights, and name its origin.

    The batch runs through the model a second time, with the same random numbers, to find the first module whose
    output is not finite. Steps that the float16 gradient scaler skips are no error.

    Args:
        check_gradients: Whether to check gradients too.
    """

    priority = 'VERY_LOW'

    def __init__(self, check_gradients: bool = True) -> None:
        self.check_gradients = check_gradients
        self.batch: Any = None

    def before_train(self, runner: Runner) -> None:
        """Watch the loss as it leaves the model, and the gradients before each update.

        Args:
            runner: The runner.
        """
        self.handles = [runner.bare_model.register_forward_hook(lambda _, __, output: self._check_loss(runner, output))]
        if self.check_gradients:
            wrapper = runner.optim_wrapper
            for each in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
                self.handles.append(each.optimizer.register_step_pre_hook(lambda *_: self._check_gradients(runner)))

    def after_train(self, runner: Runner) -> None:
        """Stop watching.

        Args:
            runner: The runner.
        """
        for handle in self.handles:
            handle.remove()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the batch for the second run.

        Args:
            runner: The runner.
            batch_idx: Number of the batch in the epoch.
            data_batch: The batch.
        """
        self.batch = data_batch

    def _check_loss(self, runner: Runner, output: Any) -> None:
        # other modes return logits or predictions
        losses = output if isinstance(output, dict) else {}
        for name, loss in losses.items():
            # detectors give one loss a level
            parts = [part for part in (loss if isinstance(loss, list | tuple) else [loss])
                     if isinstance(part, torch.Tensor)]
            if not all(bool(torch.isfinite(part).all()) for part in parts):
                origin = self._find_module(runner)
                value = sum(part.float().mean().item() for part in parts)
                raise NonFiniteError(f'{name} is {value} at step {runner.iter + 1} (epoch '
                                     f'{runner.epoch + 1}); {origin}. The weights still are those of the step before; '
                                     f'lower the learning rate or clip gradients.{_notes(runner)}')

    def _check_gradients(self, runner: Runner) -> None:
        named = [(name, p.grad) for name, p in runner.bare_model.named_parameters() if p.grad is not None]
        if not named:
            return
        norm = torch.nn.utils.get_total_norm([grad for _, grad in named])
        norm = norm.full_tensor() if hasattr(norm, 'full_tensor') else norm
        if bool(torch.isfinite(norm)):
            return
        origin = _bad_parameter(runner.bare_model)
        if not origin:
            bad = [name for name, grad in named if not bool(torch.isfinite(_local(grad)).all())]
            # the backward pass runs from the output to the input, so the last parameter in order was hit first
            origin = (f'first in the backward pass: {bad[-1]} ({len(bad)} of {len(named)} parameters)' if bad else
                      'each gradient is finite and their norm overflows')
        raise NonFiniteError(f'the gradient is {norm.item()} at step {runner.iter + 1} (epoch {runner.epoch + 1}); '
                             f'{origin}. The weights still are those of the step before; lower the learning rate or '
                             f'clip gradients.{_notes(runner)}')

    def _find_module(self, runner: Runner) -> str:
        model = runner.bare_model
        bad = _bad_parameter(model)
        if bad:
            return bad
        if dist.is_sharded(model):
            return 'all parameters are finite (a sharded model is not run again)'
        seed_step(runner.seed, runner.iter, get_rank())
        with watch_outputs(model) as found, torch.no_grad(), runner.optim_wrapper.optim_context(model):
            data = model.data_preprocessor(self.batch, True)
            if not bool(torch.isfinite(data['inputs']).all()):
                paths = data.get('paths') or [sample.get('img_path') for sample in data.get('data_samples') or ()]
                return f'the images are not finite: {list(paths)[:4]}'
            # not through __call__, whose hook asked for this search
            model.forward(**data, mode='loss')
        return f'first bad module: {found[0]}' if found else 'each module gives finite outputs on a second run'


def _notes(runner: Runner) -> str:
    """What a model has to say about a batch whose loss is not finite, and the last good checkpoint."""
    if not hasattr(runner.bare_model, 'note_failure'):
        return ''
    last = runner.message_hub.runtime_info.get('last_ckpt')
    saved = 'no checkpoint has been written' if last is None else f'the last checkpoint is {last}'
    return f' Here {runner.bare_model.note_failure()}; {saved}.'


def _bad_parameter(model: nn.Module) -> str:
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(_local(p)).all())]
    return f'the parameter {bad[0]} is not finite ({len(bad)} such parameters)' if bad else ''


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


@contextmanager
def watch_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Note the modules whose output is not finite, in the order in which they finish.

    Args:
        model: The model.

    Yields:
        A list of descriptions that fills during forward passes.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            tensors = [t for t in (output if isinstance(output, list | tuple) else [output])
                       if isinstance(t, torch.Tensor) and t.is_floating_point()]
            if any(not bool(torch.isfinite(t).all()) for t in tensors):
                found.append(f'{name} ({type(module).__name__})')
        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(watch(name)).remove)
        yield found


@HOOKS.register_module()
class EMAHook(_EMAHook):
    """MMEngine's average of the weights, also for sharded models, and the teacher of a model that has ``mesa``.

    Args:
        decay: Share of the old average that each step keeps, as papers write it (0.99996); sets ``momentum``.
        **kwargs: What MMEngine's hook takes.
    """

    def __init__(self, decay: float | None = None, **kwargs: Any) -> None:
        if decay is not None:
            if 'momentum' in kwargs or not 0 <= decay < 1:
                raise ValueError(f'give either decay in [0, 1) or momentum = 1 - decay, got decay={decay} and {kwargs}')
            kwargs['momentum'] = 1 - decay
        super().__init__(**kwargs)

    def before_run(self, runner: Runner) -> None:
        """Make the average's copy of the model.

        Args:
            runner: The runner.
        """
        if not dist.is_sharded(runner.model):
            super().before_run(runner)
            return
        # a sharded module cannot be copied, so a second one is built, averaged over, and cut the same way
        self.src_model = runner.model
        device = next(runner.model.parameters()).device
        twin = MODELS.build(runner.cfg.model).to(device)
        self.ema_model = ROOT_MODELS.build(self.ema_cfg, default_args={'model': twin})
        module = self.ema_model.module
        dist.shard(module, dict(runner.cfg.model_wrapper_cfg), device.type)
        # what was noted before are the tensors of the whole model
        self.ema_model.avg_parameters = (module.state_dict() if self.ema_model.update_buffers else
                                         dict(module.named_parameters()))
        self._swap_in(self.src_model.state_dict())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Make the average the teacher of a model that asks for one, from the epoch on where it does.

        Args:
            runner: The runner.
            batch_idx: Number of the batch in the epoch.
            data_batch: The batch.
        """
        mesa = getattr(self.src_model, 'mesa', None)
        if mesa is None:
            return
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        done, total = (runner.epoch, runner.max_epochs) if by_epoch else (runner.iter, runner.max_iters)
        self.src_model.set_teacher(self.ema_model.module if done >= int(mesa.start * total) else None)

    def after_train(self, runner: Runner) -> None:
        """Leave the model without a teacher.

        Args:
            runner: The runner.
        """
        if getattr(self.src_model, 'mesa', None) is not None:
            self.src_model.set_teacher(None)

    def _swap_in(self, state: dict) -> None:
        self.ema_model.module.load_state_dict(state)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put the averaged weights into the checkpoint's place for weights, and the training weights beside them.

        Args:
            runner: The runner.
            checkpoint: The checkpoint.
        """
        checkpoint['ema_state_dict'] = dist.gather(dict(self.ema_model.state_dict()))
        self._swap_ema_state_dict(checkpoint)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Restore the average.

        Args:
            runner: The runner.
            checkpoint: The checkpoint, whose ``state_dict`` becomes that of the training weights.
        """
        resumes = runner._resume and 'ema_state_dict' in checkpoint
        if resumes:
            self._swap_ema_state_dict(checkpoint)
            state = checkpoint['ema_state_dict']
        else:
            state = {f'module.{key}': value for key, value in checkpoint['state_dict'].items()}
            state['steps'] = torch.zeros_like(self.ema_model.steps)
        if dist.is_sharded(self.src_model):
            state = dist.scatter_like(state, self.ema_model)
        self.ema_model.load_state_dict(state)


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """A progress bar with rate and time left on a terminal; elsewhere the log lines have to do."""

    priority = 'LOW'

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.stack = ExitStack()

    def before_train(self, runner: Runner) -> None:
        """Open the bar.

        Args:
            runner: The runner.
        """
        if is_main_process() and sys.stderr.isatty():
            self.bar = tqdm(total=runner.max_iters, initial=runner.iter, unit='step', dynamic_ncols=True)
            self.stack.enter_context(logging_redirect_tqdm([runner.logger, logging.getLogger()]))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Move the bar.

        Args:
            runner: The runner.
            batch_idx: Number of the batch in the epoch.
            data_batch: The batch.
            outputs: The losses.
        """
        if self.bar is not None:
            self.bar.update()
            if self.bar.n % 10 == 0:
                self.bar.set_description(f'epoch {runner.epoch + 1}/{runner.max_epochs} '
                                         f'loss {outputs["loss"].item():.3f}', refresh=False)

    def after_train(self, runner: Runner) -> None:
        """Close the bar.

        Args:
            runner: The runner.
        """
        if self.bar is not None:
            self.bar.close()
            self.stack.close()
