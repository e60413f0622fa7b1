"""Reading images: sample keys, the sampler, the dataset base class and the collate function.

The sampler hands out `SampleKey(index, epoch, draw)`. A dataset seeds every random transform by
(seed, epoch, index, draw), so a sample looks the same whatever the number of workers or processes and after a resume.

What the pieces exchange:
    one sample: `dict(inputs=Tensor (C, H, W), label=int, path=str, index=int)`; `inputs` is uint8 in 0..255, or
        float32 in 0..1 where a transform needs it (random erasing), and never normalised: that is the model's part;
    one batch:  `dict(inputs=Tensor (B, C, H, W), labels=Tensor (B,) int64, paths=list[str], indices=list[int])`.
"""
import logging
import math
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import get_dist_info, sync_random_seed
from PIL import Image
from torch.utils.data import Dataset, Sampler

from ..registry import DATA_SAMPLERS, FUNCTIONS, TRANSFORMS

__all__ = ['ImageDataset', 'SampleKey', 'SeededSampler', 'UnreadableImagesError', 'batches', 'build_transform',
           'collate_images', 'convert_mode', 'sample_rng']

logger = logging.getLogger('visionssm')

# what Pillow raises on damaged files: its own errors are OSErrors, the PNG and TIFF plugins also raise these
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Deals items out in lists, one list ahead of the caller.

    Args:
        items: The items.
        size: Of a list; the last one may be shorter.

    Yields:
        The lists.
    """
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


class SampleKey(NamedTuple):
    """Names one look at one image: the position in the dataset, the epoch, and which repeat within the epoch."""
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    epoch: int = 0
    draw: int = 0


class UnreadableImagesError(RuntimeError):
    """More images cannot be read than the configuration allows."""


@contextmanager
def sample_rng(seed: int, key: SampleKey) -> Iterator[int]:
    """Seeds the generators of Python, NumPy and PyTorch (CPU) for one sample and restores them afterwards.

    Args:
        seed: Seed of the run.
        key: The sample.

    Yields:
        The 32-bit seed in use, for libraries that keep a generator of their own.
    """
    word = int(np.random.SeedSequence([seed, key.epoch, key.index, key.draw]).generate_state(1)[0])
    # with num_workers=0 the model draws from the same global generators, so they must come back unchanged
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    bit_generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    random.seed(word)
    torch.default_generator.manual_seed(word)
    # exchanging NumPy's generator takes 14 us, saving and restoring the state of the old one 140 us
    np.random.set_bit_generator(np.random.PCG64(word))  # type: ignore[attr-defined]
    try:
        yield word
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        np.random.set_bit_generator(bit_generator)  # type: ignore[attr-defined]


def convert_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converts an image to a mode of 8 bits a channel; greys of 16 bits are scaled, where Pillow clips them to white.

    Args:
        image: Any image.
        mode: PIL mode, `'RGB'` or `'L'`.

    Returns:
        The image in that mode.
    """
    if image.mode.startswith('I'):
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


@DATA_SAMPLERS.register_module()
class SeededSampler(Sampler):
    """Deals a seeded permutation to the processes one by one, optionally with repeated augmentation.

    Global position p of an epoch goes to process p % world, so one step of W processes with batch b sees the same
    samples as one process with batch W * b. With `repeats` the order is that of `timm.data.RepeatAugSampler`: each
    image appears `repeats` times in a row (so on different processes), and an epoch keeps its usual length.

    Args:
        dataset: Anything with a length.
        seed: Seed of the permutation, the same on all processes; drawn and shared when None.
        shuffle: Permute; otherwise ascending.
        repeats: How often an image is drawn in a row.
        round_up: Repeat samples at the end so that all processes get equally many.
        infinite: Go on with the next epoch instead of stopping, for iteration-based loops.
    """

    def __init__(
            self,
            dataset: Sized,
            seed: int | None = None,
            shuffle: bool = True,
            repeats: int = 1,
            round_up: bool = True,
            infinite: bool = False,
    ) -> None:
        if repeats < 1:
            raise ValueError(f'repeats={repeats}: an image is drawn at least once, give 1 or more')
        self.rank, self.world_size = get_dist_info()
        self.size = len(dataset)
        self.seed = sync_random_seed() if seed is None else seed
        self.shuffle = shuffle
        self.repeats = repeats
        self.round_up = round_up
        self.infinite = infinite
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Samples of this process in one epoch."""
        if self.repeats > 1:
            # whole blocks of 256 images, as the published recipes with repeated augmentation do
            kept = self.size // 256 * 256 if self.size >= 256 else self.size
            return math.ceil(kept / self.world_size) if self.size < 256 else kept // self.world_size
        if self.round_up:
            return math.ceil(self.size / self.world_size)
        return math.ceil((self.size - self.rank) / self.world_size)

    def _epoch_keys(self, epoch: int) -> list[SampleKey]:
        if self.shuffle:
            generator = torch.Generator()
            generator.manual_seed(self.seed + epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = list(range(self.size))
        total = self.size * self.repeats
        positions = islice(count(self.rank, self.world_size), len(self))
        # positions past the end wrap around: the padding that makes the processes even
        return [SampleKey(order[p % total // self.repeats], epoch, p % self.repeats) for p in positions]

    def __iter__(self) -> Iterator[SampleKey]:
        start, self.start = self.start, 0
        if not self.infinite:
            return iter(self._epoch_keys(self.epoch)[start:])
        epochs, offset = divmod(start, len(self))
        keys = chain.from_iterable(self._epoch_keys(epoch) for epoch in count(self.epoch + epochs))
        return islice(keys, offset, None)

    def set_epoch(self, epoch: int) -> None:
        """Selects the permutation and the augmentation of an epoch."""
        if not self.infinite:
            self.epoch = epoch

    def skip(self, num_samples: int) -> None:
        """Makes the next iteration start after this process's first `num_samples` samples, without reading any."""
        if num_samples < 0:
            raise ValueError(f'num_samples={num_samples}: a sampler only skips forward, give 0 or more')
        self.start = num_samples


@FUNCTIONS.register_module()
def collate_images(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks samples into a batch (see the head of this file); images must have one shape."""
    shapes = {tuple(sample['inputs'].shape) for sample in samples}
    if len(shapes) > 1:
        raise ValueError(f'images of one batch have different shapes {sorted(shapes)}: '
                         'add a resize or crop to the transform, or use batch_size=1')
    return {
        'inputs': torch.stack([sample['inputs'] for sample in samples]),
        'labels': torch.tensor([sample['label'] for sample in samples], dtype=torch.int64),
        'paths': [sample['path'] for sample in samples],
        'indices': [sample['index'] for sample in samples],
    }


def build_transform(transform: dict | Sequence[dict] | Callable | None) -> Callable[[Image.Image], torch.Tensor]:
    """Builds one callable from a registered transform's config, a list of them, or a callable."""
    if isinstance(transform, dict):
        return TRANSFORMS.build(transform)
    if transform is None:
        return TRANSFORMS.build({'type': 'ShiftFlip'})
    if callable(transform):
        return transform
    steps = [build_transform(step) for step in transform]

    def run(image: Image.Image) -> torch.Tensor:
        for step in steps:
            image = step(image)
        return image

    return run


class ImageDataset(Dataset):
    """Base of the classification datasets: seeded transforms, and a stand-in for every image that cannot be read.

    A sub-class gives `__len__` and `read(index)`. An image that cannot be read is reported once with its path, and the
    next readable one (by position, so always the same) takes its place; evaluation leaves it out, because the stand-in
    carries its own `index` and metrics count an index once.

    Args:
        transform: Config of a registered transform, a list of such, or a callable from a PIL image to a (C, H, W)
            tensor, uint8 in 0..255 or float32 in 0..1.
        classes: Class names in label order.
        seed: Seed of the random transforms.
        max_unreadable: Share of unreadable images from which on reading stops with an error (at least 10 images are
            always tolerated, but never all).
    """

    def __init__(
            self,
            transform: dict | Sequence[dict] | Callable | None = None,
            classes: Sequence[str] = (),
            seed: int = 0,
            max_unreadable: float = 0.01,
    ) -> None:
        self.transform = build_transform(transform)
        self.metainfo = {'classes': tuple(classes)}
        self.seed = seed
        self.max_unreadable = max_unreadable
        # shared memory: loader workers see each other's findings, so that the count is the dataset's
        self._unreadable = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[Image.Image, int, str]:
        """Reads and decodes one image.

        Args:
            index: Position in the dataset.

        Returns:
            The image, its label, and a path (or another name) to report it by.
        """
        raise NotImplementedError

    def path(self, index: int) -> str:
        """The name under which an image is reported, available even when it cannot be decoded."""
        return f'{type(self).__name__}[{index}]'

    @property
    def num_unreadable(self) -> int:
        """How many images have turned out unreadable so far, over all workers of this process."""
        return int(self._unreadable.sum())

    def _note_unreadable(self, index: int, error: Exception) -> None:
        self._unreadable[index] = 1
        found, size = self.num_unreadable, len(self)
        limit = min(max(10, int(self.max_unreadable * size)), size - 1)
        logger.warning('unreadable image %d (at most %d allowed): %s (%s: %s); the next readable one takes its place',
                       found, limit, self.path(index), type(error).__name__, error)
        if found > limit:
            raise UnreadableImagesError(
                f'{found} of {size} images cannot be read, the last one {self.path(index)} ({error}); at most {limit} '
                f'are allowed. Repair or remove the files, or raise max_unreadable={self.max_unreadable}') from error

    def _read_or_next(self, index: int) -> tuple[Image.Image, int, str, int]:
        size = len(self)
        for candidate in ((index + step) % size for step in range(size)):
            if self._unreadable[candidate]:
                continue
            try:
                return *self.read(candidate), candidate
            except READ_ERRORS as error:
                self._note_unreadable(candidate, error)
        raise UnreadableImagesError(f'none of the {size} images can be read')

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        key = key if isinstance(key, SampleKey) else SampleKey(int(key))
        if not -len(self) <= key.index < len(self):
            raise IndexError(f'index {key.index} outside of a dataset of {len(self)} images')
        image, label, path, index = self._read_or_next(key.index % len(self))
        with sample_rng(self.seed, key):
            inputs = self.transform(image)
        return {'inputs': inputs, 'label': label, 'path': path, 'index': index}
