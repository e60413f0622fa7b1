"""Mamba-YOLO's recipe: parameter groups by name, warm-up of every group, and mosaic that ends before the training."""
import logging
from typing import Any

import torch.nn as nn
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from ...registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from ...utils.suggest import did_you_mean
from ..optim import optimizer_class

__all__ = ['CloseMosaicHook', 'YOLOOptimConstructor', 'YOLOWarmupHook']

_logger = logging.getLogger('visionssm')

PARAMWISE_KEYS = ('batch_size', 'nominal_batch_size')
GROUPS = ('bias', 'weight', 'norm')


def parameter_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Split the trainable parameters as the official trainer does, by names.

    Args:
        model: Any model.

    Returns:
        ``bias``: every name that contains "bias", so the time step's too; ``norm``: weights of modules whose class
        name contains "Norm"; ``weight``: everything else, also the state matrices, which the authors let decay.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in GROUPS}
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(prefix, recurse=False):
            if param.requires_grad:
                kind = 'bias' if 'bias' in name else 'norm' if 'Norm' in type(module).__name__ else 'weight'
                groups[kind].append((name, param))
    return groups


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class YOLOOptimConstructor:
    """Build the optimizer with the three groups of :func:`parameter_groups`, of which only ``weight`` decays.

    The weight decay is meant for ``nominal_batch_size`` images an update and grows with their true number,
    ``batch_size`` times processes times ``accumulative_counts``. MMEngine's wrapper divides the loss by
    ``accumulative_counts`` where the official trainer sums; a model with the attribute ``accumulation``, as
    :class:`MambaYOLODetector`, is told the number and multiplies.

    Args:
        optim_wrapper_cfg: ``optimizer`` (its ``type`` of PyTorch or timm) and arguments of the wrapper.
        paramwise_cfg: ``batch_size``, the images of one process (None leaves the weight decay as it is), and
            ``nominal_batch_size`` (64).
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if 'optimizer' not in optim_wrapper_cfg:
            raise ValueError(f'optim_wrapper needs an optimizer, as in dict(optimizer=dict(type="SGD", lr=0.01)): '
                             f'got {dict(optim_wrapper_cfg)}')
        self.wrapper_cfg = dict(optim_wrapper_cfg)
        self.optimizer_cfg = dict(self.wrapper_cfg.pop('optimizer'))
        paramwise = dict(paramwise_cfg or {})
        for key in paramwise:
            if key not in PARAMWISE_KEYS:
                raise ValueError(f'paramwise_cfg has no key {key!r}. {did_you_mean(key, PARAMWISE_KEYS)} '
                                 f'It takes {", ".join(PARAMWISE_KEYS)}.')
        self.batch_size = paramwise.get('batch_size')
        self.nominal = paramwise.get('nominal_batch_size', 64)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the wrapped optimizer.

        Args:
            model: The model, wrapped for distributed training or not.

        Returns:
            The optimizer wrapper; its parameter groups carry the names of the groups.
        """
        model = model.module if is_model_wrapper(model) else model
        cfg = dict(self.optimizer_cfg)
        build = optimizer_class(cfg.pop('type'))
        counts = self.wrapper_cfg.get('accumulative_counts', 1)
        decay = cfg.pop('weight_decay', 0.0)
        if self.batch_size is not None:
            decay *= self.batch_size * get_world_size() * counts / self.nominal
        if hasattr(model, 'accumulation'):
            model.accumulation = counts
        groups = parameter_groups(model)
        _logger.info('%s tensors; weight decay %.3g for weights',
                     ', '.join(f'{len(params)} {name}' for name, params in groups.items()), decay)
        optimizer = build([{'params': [param for _, param in params], 'name': name,
                            'weight_decay': decay if name == 'weight' else 0.0}
                           for name, params in groups.items() if params], **cfg)
        return OPTIM_WRAPPERS.build({'type': 'OptimWrapper', **self.wrapper_cfg}, default_args={'optimizer': optimizer})


@HOOKS.register_module()
class YOLOWarmupHook(Hook):
    """Warm up linearly: rates from 0 (those of biases from above) to the schedule's, and the momentum.

    The warm values hold during a step only; after it the schedule's stand in the optimizer again, so that schedulers
    and checkpoints never see others, and a resumed run goes on exactly. They are a function of the step alone. Not
    ported: the number of accumulated batches does not grow during the warm-up.

    Args:
        epochs: Length of the warm-up; a fraction is allowed.
        min_steps: Shortest warm-up in steps.
        bias_lr: First learning rate of the group named ``bias``.
        momentum: First momentum.
    """

    # first before a step, so that the log shows the warm values, and first after it, before the schedulers
    priority = 'HIGHEST'

    def __init__(self, epochs: float = 3.0, min_steps: int = 100, bias_lr: float = 0.1, momentum: float = 0.8) -> None:
        self.epochs = epochs
        self.min_steps = min_steps
        self.bias_lr = bias_lr
        self.momentum = momentum
        self.scheduled: list[dict[str, float]] = []

    def values(self, group: dict[str, Any], progress: float) -> dict[str, float]:
        """Values of a parameter group during the warm-up.

        Args:
            group: The group, with the schedule's values.
            progress: Share of the warm-up that is over, 0 to 1.

        Returns:
            ``lr``, and ``momentum`` where the optimizer has one.
        """
        start = {'lr': self.bias_lr if group.get('name') == 'bias' else 0.0, 'momentum': self.momentum}
        return {key: first + (group[key] - first) * progress for key, first in start.items() if key in group}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the warm values.

        Args:
            runner: The runner.
            batch_idx: Number of the batch in the epoch.
            data_batch: The batch.
        """
        steps = max(round(self.epochs * len(runner.train_dataloader)), self.min_steps)
        if self.epochs <= 0 or runner.iter >= steps:
            return
        for group in runner.optim_wrapper.param_groups:
            warm = self.values(group, runner.iter / steps)
            self.scheduled.append({key: group[key] for key in warm})
            group.update(warm)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Put the schedule's values back.

        Args:
            runner: The runner.
            batch_idx: Number of the batch in the epoch.
            data_batch: The batch.
            outputs: The losses.
        """
        for group, values in zip(runner.optim_wrapper.param_groups, self.scheduled, strict=bool(self.scheduled)):
            group.update(values)
        self.scheduled = []


@HOOKS.register_module()
class CloseMosaicHook(Hook):
    """Train the last epochs without mosaic and mixup, on a data set that has ``close_mosaic`` (``MixDataset``).

    Whether they are closed follows from the epoch, also after a resume and in workers that live on.

    Args:
        epochs: Number of last epochs.
    """

    def __init__(self, epochs: int = 10) -> None:
        self.epochs = epochs

    def before_train_epoch(self, runner: Runner) -> None:
        """Open or close.

        Args:
            runner: The runner.
        """
        dataset = runner.train_dataloader.dataset
        while not hasattr(dataset, 'close_mosaic'):
            if not hasattr(dataset, 'dataset'):
                raise ValueError(f'CloseMosaicHook needs a training data set with close_mosaic(), such as '
                                 f'visionssm.MixDataset; {type(dataset).__name__} has none')
            dataset = dataset.dataset
        closed = runner.epoch >= runner.max_epochs - self.epochs
        if closed and runner.epoch == max(runner.max_epochs - self.epochs, 0):
            runner.logger.info('No mosaic and mixup from here on')
        dataset.close_mosaic(closed)
