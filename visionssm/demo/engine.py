"""What the page does: reading pictures, loading one model at a time, running it. Nothing here knows of a browser."""
import copy
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .._factory import create_model
from ..checkpoints import CheckpointError, DownloadError
from ..openmmlab.checkpoint import SCHEME
from ..openmmlab.facts import RestorerFacts, describe_restorer
from ..openmmlab.image_files import Picture, choose_format, read_picture, to_rgb, write_picture
from ..openmmlab.predict import Predictor, default_device, load_dense_config
from ..openmmlab.predict_dense import DensePredictor, class_map, objects, shares
from ..openmmlab.predict_restoration import Restorer, enlarge, is_out_of_memory
from .choices import Choice

__all__ = ['Boxes', 'Classes', 'DemoError', 'Engine', 'Photo', 'Restored', 'Segments', 'Stopped', 'explain']

logger = logging.getLogger('visionssm')

Progress = Callable[[int, int], None]
MAX_RESULT = 100e6
"""Most pixels of a restored picture."""
MAX_SHOWN = 1600
"""Longest side of what the page shows of a restored picture."""


class DemoError(ValueError):
    """What cannot be done with this picture and this model, and why."""


class Stopped(Exception):
    """The user asked to stop."""


class Photo(NamedTuple):
    """A picture as it was read."""
    name: str
    picture: Picture
    rgb: Image.Image
    """8 bits, upright, what is transparent on white."""

    @property
    def about(self) -> str:
        """Size and kind of the file, in words."""
        height, width, channels = self.picture.pixels.shape
        kind = ('gray', 'gray with alpha', 'RGB', 'RGB with alpha')[channels - 1]
        bits = 8 * self.picture.pixels.dtype.itemsize
        return f'{width} × {height} pixels, {kind}, {bits} bits, {self.picture.kind}'


class Run(NamedTuple):
    """What a run took."""
    seconds: float
    """For the computation alone."""
    loading: float
    """For loading the model; 0 where it was loaded already."""
    device: str


class Classes(NamedTuple):
    """The most probable classes."""
    names: list[str]
    probabilities: list[float]
    run: Run


class Boxes(NamedTuple):
    """What a detector found."""
    picture: np.ndarray
    """The photo with boxes and masks, uint8, (H, W, 3)."""
    objects: list[dict[str, Any]]
    """As `visionssm.openmmlab.predict_dense.objects` lists them, each with its `color`."""
    run: Run


class Segments(NamedTuple):
    """What a segmentor found."""
    picture: np.ndarray
    """The photo under its class map, uint8, (H, W, 3)."""
    shares: list[tuple[str, float, tuple[int, int, int]]]
    """Name, share of the picture in per cent and colour of each class, the largest first."""
    run: Run


class Restored(NamedTuple):
    """A restored picture."""
    before: Image.Image
    """The photo at the size of the result, enlarged bicubically; its middle where it is large."""
    after: Image.Image
    file: Path
    """The whole result with depth, alpha, colour profile and EXIF data of the photo."""
    note: str
    run: Run


class Engine:
    """Models and pictures behind the page; one model is in memory at a time.

    Args:
        folder: Where restored pictures are written.
        device: Where to compute; None takes an accelerator where there is one.
        max_megapixels: Larger pictures are refused by their header.
    """

    def __init__(self, folder: Path, device: str | None = None, max_megapixels: float = 50) -> None:
        self.folder = folder
        self.device = device or default_device()
        self.max_megapixels = max_megapixels
        self._loaded: tuple[str, Any] | None = None
        self._stop = threading.Event()

    def read(self, path: str | Path, name: str | None = None) -> Photo:
        """Read a picture.

        Args:
            path: The file.
            name: What to call it in messages.

        Returns:
            The picture.

        Raises:
            DemoError: It is none, is damaged or too large.
        """
        name = name or Path(path).name
        try:
            picture = read_picture(path, self.max_megapixels)
            return Photo(name, picture, Image.fromarray(to_rgb(picture.pixels)))
        except (OSError, ValueError) as error:
            raise DemoError(str(error).replace(str(path), name)) from error

    def stop(self) -> None:
        """Ask a run that shows progress to end; it raises `Stopped`."""
        self._stop.set()

    def load(self, choice: Choice) -> tuple[Any, float]:
        """Load a model in place of the one before, and return it with the seconds that took."""
        if self._loaded is not None and self._loaded[0] == choice.key:
            return self._loaded[1], 0.
        self._loaded = None  # two models may not fit in memory
        start = time.perf_counter()
        model = self._build(choice)
        self._loaded = choice.key, model
        return model, time.perf_counter() - start

    def _build(self, choice: Choice) -> Any:
        file = choice.key if choice.source == 'file' else None
        if choice.source == 'random':
            torch.manual_seed(0)
            return create_model(choice.name).eval().to(self.device)
        if choice.task == 'classification':
            return Predictor(None if file else choice.name, file, device=self.device)
        if choice.task == 'restoration':
            facts = describe_restorer(file) if file else RestorerFacts(choice.name, None)
            assert facts is not None
            return Restorer(facts, self.device)
        if choice.dense is not None:
            # building a model changes the config
            return DensePredictor(copy.deepcopy(choice.dense.cfg), choice.key, choice.dense.dataset_meta, self.device)
        assert choice.entry is not None
        return DensePredictor(load_dense_config(choice.entry.config), f'{SCHEME}{choice.entry.name}', {}, self.device)

    def _predictor(self, choice: Choice, task: str) -> tuple[Any, float]:
        if choice.task != task:
            raise DemoError(f'{choice.label} is a model of {choice.task}, not of {task}')
        if choice.source == 'random':
            raise DemoError(f'{choice.name} has random weights here, which predict nothing')
        self._stop.clear()
        return self.load(choice)

    @contextmanager
    def _timed(self, loading: float, runs: list[Run]) -> Iterator[None]:
        start = time.perf_counter()
        yield
        runs.append(Run(time.perf_counter() - start, loading, self.device))

    def classify(self, photo: Photo, choice: Choice, topk: int = 5) -> Classes:
        """Name the most probable classes of a picture."""
        predictor, loading = self._predictor(choice, 'classification')
        runs: list[Run] = []
        with self._timed(loading, runs):
            labels, probabilities = predictor.classify([predictor.read(photo.rgb)], topk)[0]
        return Classes([predictor.class_name(label) for label in labels], probabilities, runs[0])

    def detect(self, photo: Photo, choice: Choice, score_thr: float = 0.3) -> Boxes:
        """Find objects; those with a lower score than `score_thr` are left out."""
        predictor, loading = self._predictor(choice, 'detection')
        picture = np.asarray(photo.rgb)[..., ::-1]
        runs: list[Run] = []
        with self._timed(loading, runs):
            sample = predictor.predict(picture, photo.name)
        rows = objects(sample, predictor.classes, score_thr)
        for row in rows:
            row['color'] = predictor.meta['palette'][row['category_id']]
        return Boxes(predictor.draw(picture, sample, score_thr), rows, runs[0])

    def segment(self, photo: Photo, choice: Choice) -> Segments:
        """Find the class of each pixel."""
        predictor, loading = self._predictor(choice, 'segmentation')
        picture = np.asarray(photo.rgb)[..., ::-1]
        runs: list[Run] = []
        with self._timed(loading, runs):
            sample = predictor.predict(picture, photo.name)
        palette = dict(zip(predictor.classes, predictor.meta['palette'], strict=False))
        found = shares(class_map(sample), predictor.classes)
        return Segments(predictor.draw(picture, sample, 0.), [(name, share, palette[name]) for name, share in
                                                              found.items()], runs[0])

    def restore(self, photo: Photo, choice: Choice, progress: Progress | None = None) -> Restored:
        """Restore a picture, piece by piece.

        Args:
            photo: The picture.
            choice: The model.
            progress: Called with the number of pieces done and of all pieces.

        Returns:
            The result.
        """
        restorer, loading = self._predictor(choice, 'restoration')
        pixels, scale = photo.picture.pixels, restorer.scale
        height, width = pixels.shape[:2]
        if width * height * scale ** 2 > MAX_RESULT:
            raise DemoError(f'{photo.name} has {width} × {height} pixels, and enlarged {scale} times it would have '
                            f'{width * height * scale ** 2 / 1e6:.0f} megapixels; the page makes at most '
                            f'{MAX_RESULT / 1e6:.0f}. Use a smaller picture, or visionssm predict, which has no limit')
        runs: list[Run] = []
        with self._timed(loading, runs):
            result = restorer.restore(pixels, self._interruptible(progress))
        kind = choose_format(photo.picture)
        # a folder of its own, so that the name can stay
        file = Path(tempfile.mkdtemp(dir=self.folder)) / f'{Path(photo.name).stem}_restored{kind.suffix}'
        write_picture(photo.picture._replace(pixels=result), file, kind)
        before, after, part = _beside(pixels, result, scale)
        note = f'{width} × {height} → {width * scale} × {height * scale} pixels'
        return Restored(before, after, file, f'{note}; shown is the middle' if part else note, runs[0])

    def _interruptible(self, progress: Progress | None) -> Progress:
        def report(done: int, total: int) -> None:
            if self._stop.is_set():
                raise Stopped
            if progress is not None:
                progress(done, total)
        return report

    def steps(self, items: Iterable[Any], progress: Progress | None = None) -> Iterator[Any]:
        """Pass items on with progress, until `stop` is called."""
        listed = list(items)
        report = self._interruptible(progress)
        for number, item in enumerate(listed):
            report(number, len(listed))
            yield item


def _beside(before: np.ndarray, after: np.ndarray, scale: int) -> tuple[Image.Image, Image.Image, bool]:
    """Return a picture and its restoration at the size of the latter, and whether only their middle is shown."""
    limit = max(MAX_SHOWN // scale, 1)
    height, width = (min(side, limit) for side in before.shape[:2])
    top, left = (before.shape[0] - height) // 2, (before.shape[1] - width) // 2
    old = enlarge(before[top:top + height, left:left + width], scale)
    new = after[scale * top:scale * (top + height), scale * left:scale * (left + width)]
    return Image.fromarray(to_rgb(old)), Image.fromarray(to_rgb(new)), (height, width) != before.shape[:2]


def explain(error: Exception) -> str:
    """Say in words for the page what went wrong and what to do.

    Args:
        error: What a run raised.

    Returns:
        The words; empty for errors that no user can mend.
    """
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        return 'There is not enough memory for this picture and this model: use a smaller picture or a smaller model.'
    if isinstance(error, Stopped):
        return 'Stopped.'
    if isinstance(error, DownloadError | CheckpointError):
        return (f'{error}\nWeights that you have are put in place by "visionssm download NAME --from-file FILE", or '
                'given to the page by "visionssm demo --checkpoint FILE".')
    if isinstance(error, OSError | ValueError | ImportError | RuntimeError):
        return str(error) or type(error).__name__
    return ''
