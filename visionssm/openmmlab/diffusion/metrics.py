"""The loss on images that training has not seen, whole and by time step, and how good drawn pictures are."""
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info, get_world_size, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.runner import Runner, TestLoop
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...registry import LOOPS, METRICS
from .extractors import INCEPTION, Extractor, build_extractor
from .fidelity import PictureSet, compare, measure_files, to_image
from .sample import Job, draw, make_pipeline

__all__ = ['DiffusionLoss', 'FidelityLoop', 'FidelityMetric']


@METRICS.register_module()
class DiffusionLoss(BaseMetric):
    """Mean losses over the images, `val_loss`, `mse` and `vlb`, and `mse` in equal sections of the time steps.

    Images count once by index. Time step and noise of an image are fixed, so that evaluations of one data set compare.

    Args:
        bins: Number of sections.
        steps: Steps of the process.
        collect_device: 'cpu' or 'gpu', see mmengine.
        prefix: Prefix of the names.
    """

    def __init__(
            self,
            bins: int = 4,
            steps: int = 1000,
            collect_device: str = 'cpu',
            prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if not 1 <= bins <= steps:
            raise ValueError(f'bins is {bins}; give 1 to the number of steps, {steps}')
        self.bins, self.steps = bins, steps

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Record the losses of one batch.

        Args:
            data_batch: Not used.
            data_samples: What the model predicts, a dictionary an image.
        """
        self.results.extend(dict(sample) for sample in data_samples)

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Average over all processes.

        Args:
            results: What `process` recorded.

        Returns:
            The means; a section without images is left out.
        """
        rows = list({row['index']: row for row in results}.values())
        found = {'val_loss' if name == 'loss' else name: float(np.mean([row[name] for row in rows]))
                 for name in ('loss', 'mse', 'vlb') if rows and name in rows[0]}
        edges = [round(self.steps * place / self.bins) for place in range(self.bins + 1)]
        for start, end in zip(edges, edges[1:], strict=False):
            inside = [row['mse'] for row in rows if start <= row['step'] < end]
            if inside:
                found[f'mse_t{start}-{end - 1}'] = float(np.mean(inside))
        return found


def _merge(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join what batches or processes saw, in the order of the pictures, each of them once."""
    found = {key: torch.cat([part[key] for part in parts if part]) for key in next(filter(None, parts), {})}
    if not found:
        return {}
    _, places = np.unique(found['index'].numpy(), return_index=True)
    return {key: value[torch.from_numpy(places)] for key, value in found.items()}


@METRICS.register_module()
class FidelityMetric(BaseMetric):
    """Pictures that the model draws against real ones: FID, sFID, inception score, precision and recall.

    Drawn are what `FidelityLoop` draws; real are those of the test data, or of `reference`. Both count once by index.
    With a classifier that knows the classes of the model, `recognised` says in how many pictures, in per cent, it sees
    the class that was asked for. Each number carries the name of the extractor, as in `FID[vim_pico]`, unless that is
    Inception with its published weights. About 20 kB a picture are in memory.

    Args:
        extractor: 'inception', or the name of a classifier of timm or of this package.
        checkpoint: Weights of the classifier; None takes its published ones.
        weights: File of Inception's weights; None takes the one that torch-fidelity downloads.
        reference: Folder of real pictures, or an `.npz` as `fidelity.read_statistics` takes it, instead of the test
            data.
        k: Neighbour of precision and recall.
        splits: Parts of the inception score.
        collect_device: 'cpu' or 'gpu', see mmengine.
        prefix: Prefix of the names.
    """

    def __init__(
            self,
            extractor: str = INCEPTION,
            checkpoint: str | None = None,
            weights: str | None = None,
            reference: str | None = None,
            k: int = 3,
            splits: int = 10,
            collect_device: str = 'cpu',
            prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if k < 1 or splits < 1:
            raise ValueError(f'k is {k} and splits {splits}; both must be at least 1')
        self.sources = {'extractor': extractor, 'checkpoint': checkpoint, 'weights': weights}
        self.reference, self.k, self.splits = reference, k, splits
        self.extractor: Extractor | None = None
        self._reference: PictureSet | None = None
        self._seen: dict[str, list[dict[str, torch.Tensor]]] = {'real': [], 'drawn': []}

    def prepare(self, number: int) -> None:
        """Build the extractor and read the reference, so that what is missing is said before anything is drawn.

        Args:
            number: How many pictures will be drawn.
        """
        if number <= max(self.k, self.splits):
            raise ValueError(f'{number} pictures are too few for precision and recall with k={self.k} and an inception '
                             f'score of {self.splits} parts; draw more: test_cfg.num_samples')
        self._seen = {'real': [], 'drawn': []}
        if self.extractor is None:
            self.extractor = build_extractor(**self.sources)
        if self.reference is not None and self._reference is None and is_main_process():
            self._reference = measure_files(self.reference, self.extractor, title='real')

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Look at the real pictures of one batch.

        Args:
            data_batch: The batch.
            data_samples: Not used.
        """
        if self.extractor is None:
            raise ValueError("FidelityMetric needs the loop that draws: test_cfg=dict(type='FidelityLoop', "
                             'num_samples=50000)')
        if self.reference is None:
            self._look('real', [to_image(picture.cpu()) for picture in data_batch['inputs']], data_batch['indices'])

    def process_drawn(self, pictures: Sequence[Image.Image], indices: Sequence[int],
                      labels: Sequence[int] | None = None) -> None:
        """Look at drawn pictures.

        Args:
            pictures: The pictures.
            indices: Their numbers, over all processes.
            labels: The classes that were asked for.
        """
        self._look('drawn', pictures, indices, {} if labels is None else {'label': torch.tensor(labels)})

    def _look(self, side: str, pictures: Sequence[Image.Image], indices: Sequence[int],
              extra: dict[str, torch.Tensor] | None = None) -> None:
        self._seen[side].append({'index': torch.tensor(indices), **(extra or {}), **self.extractor(pictures)})

    def evaluate(self, size: int) -> dict[str, float]:
        """Compare the pictures of all processes.

        Args:
            size: Not used: the processes may have seen different numbers of pictures.

        Returns:
            Name to value.
        """
        self.results = [{side: _merge(parts) for side, parts in self._seen.items()}]
        self._seen = {'real': [], 'drawn': []}
        return super().evaluate(get_world_size())

    def compute_metrics(self, results: list[dict[str, dict[str, torch.Tensor]]]) -> dict[str, float]:
        """Compare.

        Args:
            results: What each process saw.

        Returns:
            What `fidelity.compare` says.
        """
        sides = {}
        for side in ('real', 'drawn'):
            rows = _merge([result[side] for result in results])
            labels = rows.pop('label', None)
            rows.pop('index', None)
            sides[side] = PictureSet(rows, labels=labels)
        real = sides['real'] if self._reference is None else self._reference
        for name, item in (('drawn', sides['drawn']), ('real', real)):
            if not item.rows and not item.moments:
                raise ValueError(f'there are no {name} pictures to compare')
        print_log(f'{sides["drawn"].count} drawn and {real.count or "the"} real pictures, seen by '
                  f'{self.extractor.name} (SHA-256 of its weights {self.extractor.fingerprint[:8]}...)', 'current')
        return compare(sides['drawn'], real, self.extractor, self.k, self.splits)


class _NoData(Dataset):
    metainfo: dict[str, Any] = {}

    def __len__(self) -> int:
        return 0


@LOOPS.register_module()
class FidelityLoop(TestLoop):
    """A test that draws pictures and lets each `FidelityMetric` of the evaluator compare them with real ones.

    Picture i has the class i modulo the number of classes, and depends on i and the seed alone, not on the batch or the
    number of processes. Other metrics, such as `DiffusionLoss`, are evaluated on the test data as ever.

    Args:
        runner: The runner.
        dataloader: Of the test data.
        evaluator: The metrics.
        num_samples: Pictures to draw.
        sampler: 'ddpm', 'ddim' or 'dpmsolver++'.
        steps: Steps of the sampler.
        guidance_scale: Strength of the guidance by the class, 1 for none; None is 1.5, and 1 for models without
            classes.
        eta: Noise of DDIM.
        clip: Keep the clean image within [-1, 1] at every step.
        seed: Of the noise.
        batch_size: Pictures that a process draws at a time.
        fp16: As MMEngine's.
    """

    def __init__(
            self,
            runner: Runner,
            dataloader: Any,
            evaluator: Any,
            num_samples: int = 50_000,
            sampler: str = 'ddpm',
            steps: int = 250,
            guidance_scale: float | None = None,
            eta: float = 0.0,
            clip: bool = False,
            seed: int = 0,
            batch_size: int = 64,
            fp16: bool = False,
    ) -> None:
        if isinstance(evaluator, dict | list):
            evaluator = runner.build_evaluator(evaluator)
        if all(getattr(metric, 'reference', None) is not None for metric in evaluator.metrics):
            # nothing looks at the test data, so nobody needs to have them
            dataloader = DataLoader(_NoData())
        super().__init__(runner, dataloader, evaluator, fp16)
        if num_samples < 2 or batch_size < 1:
            raise ValueError(f'num_samples is {num_samples} and batch_size {batch_size}; give 2 or more, and 1 or more')
        self.metrics = [item for item in self.evaluator.metrics if isinstance(item, FidelityMetric)]
        if not self.metrics:
            raise ValueError("FidelityLoop draws for a FidelityMetric, and test_evaluator has none; add dict(type="
                             "'FidelityMetric'), or set test_cfg=dict()")
        self.num_samples, self.sampler, self.steps, self.guidance_scale = num_samples, sampler, steps, guidance_scale
        self.eta, self.clip, self.seed, self.batch_size = eta, clip, seed, batch_size

    def run(self) -> dict[str, float]:
        """Test.

        Returns:
            Name to value.
        """
        self.runner.call_hook('before_test')
        self.runner.call_hook('before_test_epoch')
        self.runner.model.eval()
        net = self.runner.bare_model.model
        scale = self.guidance_scale if self.guidance_scale is not None else 1.5 if net.num_classes else 1.0
        if scale != 1 and not net.num_classes:
            raise ValueError(f'test_cfg.guidance_scale is {scale}, and a model that was trained without classes cannot '
                             'be guided; leave it out')
        pipe = make_pipeline(self.runner.bare_model, self.sampler, self.steps, self.clip)
        for metric in self.metrics:
            metric.prepare(self.num_samples)
        # the real pictures first: what is wrong with them shows before hours of drawing
        if self._needs_model() or any(metric.reference is None for metric in self.metrics):
            for idx, data_batch in enumerate(self.dataloader):
                self.run_iter(idx, data_batch)
        self._draw(pipe, net.num_classes, scale)
        metrics = self.evaluator.evaluate(len(self.dataloader.dataset))
        self.runner.call_hook('after_test_epoch', metrics=metrics)
        self.runner.call_hook('after_test')
        return metrics

    def _needs_model(self) -> bool:
        return len(self.metrics) < len(self.evaluator.metrics)

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Look at one batch of the test data; the model sees it if a metric asks for its losses.

        Args:
            idx: Number of the batch.
            data_batch: The batch.
        """
        if self._needs_model():
            super().run_iter(idx, data_batch)
        else:
            self.runner.call_hook('before_test_iter', batch_idx=idx, data_batch=data_batch)
            self.evaluator.process(data_samples=[], data_batch=data_batch)
            self.runner.call_hook('after_test_iter', batch_idx=idx, data_batch=data_batch, outputs=[])

    @torch.no_grad()
    def _draw(self, pipe: Any, classes: int, scale: float) -> None:
        rank, world = get_dist_info()
        rounds = math.ceil(self.num_samples / world)
        # every process draws as many, so that sharded models stay in step; what is drawn twice counts once
        indices = [min(step * world + rank, self.num_samples - 1) for step in range(rounds)]
        start, told = time.monotonic(), 0.0
        with tqdm(total=rounds, desc='drawn', unit='picture', disable=rank > 0 or not sys.stderr.isatty()) as bar:
            for first in range(0, rounds, self.batch_size):
                batch = indices[first:first + self.batch_size]
                jobs: list[Job] = [(index % classes, index // classes) if classes else (None, index) for index in batch]
                pictures = draw(pipe, jobs, self.seed, scale, self.eta)
                labels = [index % classes for index in batch] if classes else None
                for metric in self.metrics:
                    metric.process_drawn(pictures, batch, labels)
                bar.update(len(batch))
                done, spent = first + len(batch), time.monotonic() - start
                # where there is no bar, a line a minute
                if bar.disable and spent - told > 60:
                    told = spent
                    self.runner.logger.info('drawn %d of %d pictures, %.0f min left', done * world, rounds * world,
                                            spent / done * (rounds - done) / 60)
