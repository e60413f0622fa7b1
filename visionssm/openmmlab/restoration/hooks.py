"""Patches that grow during a training."""
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS

__all__ = ['ProgressivePatchHook']


@HOOKS.register_module()
class ProgressivePatchHook(Hook):
    """Cut the patches of a batch to the size of the current stage; the data set gives those of the last, largest one.

    Where a stage has a smaller batch, the first samples of it are taken. The place is drawn from PyTorch's generator,
    which is a function of the step, so a resumed run cuts as the uninterrupted one.

    Args:
        sizes: Side of the good patches in each stage.
        iters: Steps of each stage; the last one goes on for longer trainings.
        batch_sizes: Samples of a process in each stage; None keeps the loader's.
        scale: Size of a good patch over that of its bad one.
    """

    def __init__(
            self,
            sizes: Sequence[int],
            iters: Sequence[int],
            batch_sizes: Sequence[int] | None = None,
            scale: int = 1,
    ) -> None:
        if len(sizes) != len(iters) or not sizes or (batch_sizes is not None and len(batch_sizes) != len(sizes)):
            raise ValueError(f'sizes {list(sizes)}, iters {list(iters)} and batch_sizes {batch_sizes}: give one of '
                             'each a stage')
        if any(size % scale for size in sizes):
            raise ValueError(f'sizes {list(sizes)}: all must be multiples of the scale {scale}')
        self.sizes, self.batch_sizes, self.scale = sizes, batch_sizes, scale
        self.ends = list(accumulate(iters))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Cut the batch.

        Args:
            runner: The runner.
            batch_idx: Number of the batch.
            data_batch: The batch, changed in place.
        """
        stage = next((place for place, end in enumerate(self.ends) if runner.iter < end), len(self.ends) - 1)
        size, scale, good = self.sizes[stage], self.scale, data_batch['targets']
        if min(good.shape[-2:]) < size:
            raise ValueError(f'stage {stage} has patches of {size} pixels and the data set gives '
                             f'{good.shape[-1]} x {good.shape[-2]}; set patch={max(self.sizes)} in the data set')
        top, left = (scale * int(torch.randint(0, (side - size) // scale + 1, ())) for side in good.shape[-2:])
        data_batch['targets'] = good[..., top:top + size, left:left + size]
        top, left, size = top // scale, left // scale, size // scale
        data_batch['inputs'] = data_batch['inputs'][..., top:top + size, left:left + size]
        if self.batch_sizes is not None:
            for key, value in data_batch.items():
                data_batch[key] = value[:self.batch_sizes[stage]]
