"""Training loops that resume with the next unseen batch, and data whose random numbers survive a resume."""
from collections.abc import Iterator
from typing import Any

from mmengine.dist import get_rank
from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop
from torch.utils.data import BatchSampler, Dataset

from ..checkpoints import CheckpointError
from ..registry import DATASETS, LOOPS
from .data import SampleKey, sample_rng
from .hooks import StepSeedHook, seed_step

__all__ = ['KeyedDataset', 'ResumableEpochLoop', 'ResumableIterLoop', 'exact_loop']


def _seeded(loop: BaseLoop, batches: Iterator[Any]) -> Iterator[Any]:
    """Batches whose random numbers, drawn in this process, are a function of the step."""
    runner = loop.runner
    seeds = any(isinstance(hook, StepSeedHook) for hook in runner._hooks)
    while True:
        if seeds:
            seed_step(runner.seed, loop.iter, get_rank())
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch


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
        for idx, data_batch in enumerate(_seeded(self, iter(self.dataloader)), start=done):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _skip(self, batches: int) -> None:
        batch_sampler = self.dataloader.batch_sampler
        sampler = batch_sampler.sampler
        if type(batch_sampler) is not BatchSampler or not hasattr(sampler, 'skip'):
            kind = type(batch_sampler if type(batch_sampler) is not BatchSampler else sampler).__name__
            raise CheckpointError(f'the checkpoint is from the middle of an epoch, and the sampler {kind} cannot skip '
                                  'what was seen; use the sampler SeededSampler, or resume from the end of an epoch')
        sampler.skip(batches * batch_sampler.batch_size)


@LOOPS.register_module()
class ResumableIterLoop(IterBasedTrainLoop):
    """MMEngine's loop by steps, whose data after a resume are those of the uninterrupted run.

    A sampler that can skip does so; with others, MMEngine's loop reads what was seen and throws it away.
    """

    def run(self) -> Any:
        """Run the steps that are left.

        Returns:
            The model.
        """
        self.dataloader_iterator = _SeededSource(self, self.dataloader_iterator)
        return super().run()


class _SeededSource:
    """The source of a loop's batches, seeded for each step, with MMEngine's way to skip."""

    def __init__(self, loop: ResumableIterLoop, source: Any) -> None:
        self.loop, self.source = loop, source
        self.batches: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self.batches is None:
            self.batches = _seeded(self.loop, self.source)
        return next(self.batches)

    def skip_iter(self, steps: int) -> None:
        self.source.skip_iter(steps)


# MMEngine's loops by the names that configs give them, and ours in their place
EXACT = {'EpochBasedTrainLoop': 'visionssm.ResumableEpochLoop', 'IterBasedTrainLoop': 'visionssm.ResumableIterLoop'}


def exact_loop(loop: dict) -> dict:
    """Puts our loop in the place of MMEngine's own, which resume with other data than the run would have seen.

    Args:
        loop: A config's `train_cfg`.

    Returns:
        The config with the type of ours.
    """
    loop = dict(loop)
    by_epoch = loop.pop('by_epoch', 'max_epochs' in loop)
    default = 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop'
    kind = loop.get('type', default)
    return {**loop, 'type': EXACT.get(kind, kind) if isinstance(kind, str) else kind}


@DATASETS.register_module()
class KeyedDataset(Dataset):
    """A dataset of another package under the sampler `SeededSampler`: its transforms draw seeded random numbers.

    The random numbers of a sample are a function of (seed, epoch, index), so they do not depend on the number of
    worker processes, and a resumed run sees what the uninterrupted one would have seen.

    Args:
        dataset: Config of the dataset; attributes and methods that this class lacks are the dataset's.
        seed: Seed of the run; `StepSeedHook` sets it.
    """

    def __init__(self, dataset: dict, seed: int = 0) -> None:
        self.dataset = ROOT_DATASETS.build(dataset)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # before __init__ has run, as in a worker process that unpickles, there is no dataset to ask
        if name == 'dataset':
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, key: int | SampleKey) -> Any:
        if not isinstance(key, SampleKey):
            return self.dataset[key]
        with sample_rng(self.seed, key):
            return self.dataset[key.index]
