"""A task small enough for tests: 64 random images of four classes, and hooks that break a run on purpose."""
import os
import signal

import numpy as np
import torch
from mmengine.hooks import Hook
from PIL import Image

from visionssm.openmmlab.data import ImageDataset
from visionssm.registry import DATASETS, HOOKS

SIDE, CLASSES = 8, 4


@DATASETS.register_module(force=True)
class ToyImages(ImageDataset):
    """Bright quadrants on noise; the class is the quadrant."""

    def __init__(self, size=64, **kwargs):
        rng = np.random.default_rng(0)
        self.labels = [i % CLASSES for i in range(size)]
        self.images = rng.integers(0, 100, (size, SIDE, SIDE), dtype=np.uint8)
        half = SIDE // 2
        for image, label in zip(self.images, self.labels, strict=True):
            row, column = divmod(label, 2)
            image[row * half:(row + 1) * half, column * half:(column + 1) * half] += 100
        super().__init__(classes=[f'quadrant {i}' for i in range(CLASSES)], **kwargs)

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        return Image.fromarray(self.images[index]), self.labels[index], f'toy/{index}.png'


@HOOKS.register_module(force=True)
class KillHook(Hook):
    """Ends the process at a step, as a power cut would."""

    def __init__(self, step):
        self.step = step

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module(force=True)
class PoisonHook(Hook):
    """From a step on makes one module's output (or, backwards, its gradient) infinite."""

    def __init__(self, step, module, backward=False):
        self.step, self.module, self.backward = step, module, backward

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.step:
            module = runner.bare_model.get_submodule(self.module)
            poison = (lambda g: g * torch.inf) if self.backward else None
            module.register_forward_hook(
                lambda _, __, out: out.register_hook(poison) and None if self.backward else out * torch.inf)


@HOOKS.register_module(force=True)
class LossHook(Hook):
    """Writes each step's loss, averaged over processes, to a file."""

    def __init__(self, path):
        self.path, self.losses = path, []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        loss = outputs['loss'].detach().clone()
        if runner.world_size > 1:
            torch.distributed.all_reduce(loss)
            loss /= runner.world_size
        self.losses.append(loss.item())

    def after_train(self, runner):
        if runner.rank == 0:
            np.save(self.path, np.asarray(self.losses))
