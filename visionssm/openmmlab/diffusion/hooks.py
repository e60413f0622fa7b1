"""Pictures that a diffusion model draws while it trains."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from ..hooks import EMAHook
from .sample import draw, make_pipeline, save_png, to_grid

__all__ = ['SampleGridHook']


@HOOKS.register_module()
class SampleGridHook(Hook):
    """Draw a grid of samples, a row a class, into the work dir and the run's visualizer, from the averaged weights.

    The noise is the same every time, so that the grids of one run show what the training changed.

    Args:
        interval: Steps between two grids; the last step of the training has one too.
        classes: Classes to draw; None takes the first ten. A model without classes draws as many rows.
        columns: Pictures of each class.
        sampler: 'ddpm', 'ddim' or 'dpmsolver++'.
        steps: Steps of the sampler.
        guidance_scale: Strength of the guidance; 1 is none.
        seed: Of the noise.
    """

    priority = 'LOW'

    def __init__(
            self,
            interval: int = 1000,
            classes: Sequence[int] | None = None,
            columns: int = 8,
            sampler: str = 'ddim',
            steps: int = 20,
            guidance_scale: float = 1.5,
            seed: int = 0,
    ) -> None:
        if interval < 1 or columns < 1:
            raise ValueError(f'interval is {interval} and columns {columns}; both must be at least 1')
        self.interval, self.classes, self.columns = interval, classes, columns
        self.sampler, self.steps, self.guidance_scale, self.seed = sampler, steps, guidance_scale, seed

    def before_train(self, runner: Runner) -> None:
        """Refuse what cannot be drawn before the training starts.

        Args:
            runner: The runner.
        """
        make_pipeline(runner.bare_model, self.sampler, self.steps)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Draw, when it is time.

        Args:
            runner: The runner.
            batch_idx: Number of the batch.
            data_batch: The batch.
            outputs: The losses.
        """
        done = runner.iter + 1
        if done % self.interval == 0 or done == runner.max_iters:
            self._draw(runner, done)

    @master_only
    def _draw(self, runner: Runner, done: int) -> None:
        averages = [hook.ema_model.module for hook in runner._hooks if isinstance(hook, EMAHook)]
        model = averages[0] if averages else runner.bare_model
        net, training = model.model, model.training
        model.eval()
        try:
            rows = list(range(min(10, net.num_classes or 4))) if self.classes is None else list(self.classes)
            classes = rows if net.num_classes else [None] * len(rows)
            scale = self.guidance_scale if net.num_classes else 1.0
            pipe = make_pipeline(model, self.sampler, self.steps)
            jobs = [(label, row * self.columns + column if label is None else column)
                    for row, label in enumerate(classes) for column in range(self.columns)]
            pictures = draw(pipe, jobs, self.seed, scale)
        finally:
            model.train(training)
        grid = to_grid(pictures, self.columns)
        save_png(grid, Path(runner.work_dir, 'samples', f'iter_{done}.png'))
        array = torch.frombuffer(bytearray(grid.convert('RGB').tobytes()), dtype=torch.uint8)
        runner.visualizer.add_image('samples', array.view(grid.height, grid.width, 3).numpy(), done)
