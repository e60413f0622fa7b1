"""Pictures of a run: curves from the logs, the confusion matrix, and images with what the model says about them."""
import io
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.dist import get_world_size, master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import HOOKS
from ..utils.files import atomic_write
from .data import convert_mode
from .image_io import open_image, orient
from .metrics import Accuracy
from .scopes import headlines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['OverlayHook', 'VisualReportHook', 'draw_sample', 'read_scalars', 'save_comparison', 'save_confusion_matrix',
           'save_curves', 'save_predictions', 'save_top_classes', 'to_picture', 'write_json']

logger = logging.getLogger('visionssm')

BLUE, ORANGE, GREEN, RED, GREY = '#2563a8', '#d9822b', '#2e7d32', '#c62828', '#666666'
# told apart by colour-blind readers too, together with the markers
SERIES = (BLUE, ORANGE, GREEN, RED, '#7b4ea3', '#3aa6b9', '#8a6d3b', '#d16ba5', GREY)
MARKERS = 'osD^vPX*<'


def write_json(value: Any, path: str | Path) -> None:
    """Writes JSON so that the file is either complete or untouched.

    Args:
        value: What to write.
        path: The file.
    """
    atomic_write((json.dumps(value, indent=1) + '\n').encode(), path)


def _figure(width: float, height: float, **kwargs: Any) -> 'Figure':
    # without pyplot there is no display, no global state and nothing to close
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, facecolor='white', **kwargs)


def _save(figure: 'Figure', path: str | Path) -> Path:
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format='png')
        atomic_write(buffer.getvalue(), path)
    return Path(path)


def read_scalars(work_dir: str | Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Collects what was logged in a work dir, over all resumed runs.

    Args:
        work_dir: Work dir of a training.

    Returns:
        Training and validation records, each in order; all carry `iter`. Where runs overlap the later one counts.
    """
    train: dict[float, dict[str, float]] = {}
    validation: dict[float, dict[str, float]] = {}
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text(encoding='utf-8').splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                logger.warning('%s has a damaged line (a run that was cut off?): %.40s', path, line)
                continue
            if 'loss' in record:
                train[record.get('iter', record.get('step', 0))] = record
            elif _scores(record):
                validation[record.get('step', 0)] = record
    ordered = [{**train[key], 'iter': key} for key in sorted(train)]
    last_iter = {record['epoch']: record['iter'] for record in ordered if 'epoch' in record}
    by_epoch = bool(last_iter) and max(validation, default=0) <= max(last_iter)
    if by_epoch and last_iter:
        # a logged epoch may end between two log lines; epochs have equal length, which the last line gives best
        per_epoch = max(iteration / epoch for epoch, iteration in last_iter.items() if epoch)
        checked = [{**validation[key], 'iter': key * per_epoch} for key in sorted(validation)]
    else:
        checked = [{**validation[key], 'iter': key} for key in sorted(validation)]
    return ordered, checked


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=11, loc='left')
    axes.grid(True, color='#e5e5e5', linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.tick_params(labelsize=9, colors=GREY)
    axes.set_xlabel('step', fontsize=9, color=GREY)


def save_curves(work_dir: str | Path, path: str | Path | None = None) -> Path | None:
    """Draws loss, learning rate and accuracy over the steps of a training.

    Args:
        work_dir: Work dir of the training.
        path: PNG to write; `curves.png` in the work dir when None.

    Returns:
        The file, or None when nothing was logged yet.
    """
    train, validation = read_scalars(work_dir)
    if not train:
        logger.warning('no training log in %s: no curves drawn', work_dir)
        return None
    figure = _figure(12, 3.5, layout='constrained')
    loss_axes, lr_axes, score_axes = figure.subplots(1, 3)
    steps = [record['iter'] for record in train]
    _style(loss_axes, 'Training loss')
    _draw_losses(loss_axes, train)
    _style(lr_axes, 'Learning rate')
    lr_axes.plot(steps, [record.get('lr', math.nan) for record in train], color=GREY, linewidth=1.8)
    lr_axes.yaxis.set_major_formatter('{x:g}')
    accuracy = all(key.rpartition('/')[2].startswith('top') for record in validation for key in _scores(record))
    decibels = any(key.rpartition('/')[2] == 'PSNR' for record in validation for key in record)
    _style(score_axes, f'Validation {"accuracy" if accuracy else "score"}, {"dB" if decibels else "%"}')
    _draw_scores(score_axes, validation)
    return _save(figure, path or Path(work_dir, 'curves.png'))


def _draw_losses(axes: Any, train: list[dict[str, float]]) -> None:
    steps = [record['iter'] for record in train]
    # a detector's or segmentor's loss has parts, whose names have the word in them
    parts = [key for key in train[0] if 'loss' in key.rpartition('.')[2] and key != 'loss']
    names = ['loss', *(parts if 1 < len(parts) < len(SERIES) else ())]
    window = max(1, len(train) // 25)
    for name, color in zip(names, SERIES, strict=False):
        losses = np.array([record.get(name, math.nan) for record in train], dtype=float)
        label = name if len(names) > 1 else None
        axes.plot(steps, losses, color=color, alpha=0.3 if window > 1 else 1, linewidth=1.2,
                  marker='o' if len(steps) < 3 else None, markersize=4, label=label if window == 1 else None)
        if window > 1:
            # the mean of the last records, shorter at the start, so that the curve spans all steps
            sums = np.cumsum(np.insert(losses, 0, 0.0))
            ends = np.arange(1, len(losses) + 1)
            starts = np.maximum(ends - window, 0)
            axes.plot(steps, (sums[ends] - sums[starts]) / (ends - starts), color=color, linewidth=1.8, label=label)
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=8)


def _scores(record: Mapping[str, float]) -> list[str]:
    """The keys of a validation record to draw: all accuracies, or the numbers that sum up another task."""
    tops = sorted((key for key in record if key.rpartition('/')[2].startswith('top')),
                  key=lambda name: int(name.rpartition('top')[2]))
    return tops or [key for key in record if headlines({key: 0.0})]


def _draw_scores(axes: Any, validation: list[dict[str, float]]) -> None:
    names = list(dict.fromkeys(key for record in validation for key in _scores(record)))
    if not names:
        axes.text(0.5, 0.5, 'no validation yet', ha='center', color=GREY, transform=axes.transAxes)
    for name, color in zip(names, (BLUE, ORANGE, GREEN), strict=False):
        leaf = name.rpartition('/')[2]
        points = [(record['iter'], next(iter(headlines({name: record[name]}).values()), record[name]))
                  for record in validation if name in record]
        label = leaf.replace('top', 'top-') if leaf.startswith('top') else next(iter(headlines({name: 0.0})))
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, marker='o', markersize=3,
                  label=f'{label}: {points[-1][1]:.2f} at the end')
    if names:
        axes.legend(frameon=False, fontsize=9, loc='lower right')


def save_comparison(accuracies: Mapping[str, Sequence[float]], path: str | Path) -> Path:
    """Draws the accuracy of several trainings over their epochs.

    Args:
        accuracies: Per cent after each epoch, by name.
        path: PNG to write.

    Returns:
        The file.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7.5, 4.5, layout='constrained')
    axes = figure.subplots()
    _style(axes, 'Validation accuracy, %')
    axes.set_xlabel('epoch', fontsize=9, color=GREY)
    for number, (name, values) in enumerate(sorted(accuracies.items(), key=lambda item: -item[1][-1])):
        axes.plot(range(1, len(values) + 1), values, color=SERIES[number % len(SERIES)], linewidth=1.8,
                  marker=MARKERS[number % len(MARKERS)], markersize=4, label=f'{name}: {values[-1]:.2f}')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9, loc='lower right')
    return _save(figure, path)


def save_confusion_matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: str | Path) -> Path:
    """Draws a confusion matrix: rows are true classes, columns predictions, colour the share of the row.

    Args:
        confusion: Counts (num_classes, num_classes).
        classes: Class names.
        path: PNG to write.

    Returns:
        The file.
    """
    counts = np.asarray(confusion)
    total = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    number = len(counts)
    named = number <= 40
    side = min(max(4.5, 0.48 * number + 2.2), 14)
    figure = _figure(side + 0.6, side, layout='constrained')
    axes = figure.subplots()
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
    accuracy = 100 * np.trace(counts) / max(counts.sum(), 1)
    axes.set_title(f'{counts.sum():,} images, {accuracy:.2f} % on the diagonal', fontsize=11, loc='left')
    axes.set_xlabel('predicted', color=GREY)
    axes.set_ylabel('true', color=GREY)
    if named:
        axes.set_xticks(range(number), classes, rotation=45, ha='right', fontsize=9, rotation_mode='anchor')
        axes.set_yticks(range(number), classes, fontsize=9)
    if number <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            axes.text(column, row, str(counts[row, column]), ha='center', va='center', fontsize=8,
                      color='white' if shares[row, column] > 0.55 else '#333333')
    bar = figure.colorbar(image, ax=axes, shrink=0.75)
    bar.set_label('share of the true class', color=GREY, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=GREY)
    return _save(figure, path)


def _shorten(name: str, length: int = 22) -> str:
    name = name.split(',')[0]
    return name if len(name) <= length else name[:length - 1].rstrip() + '…'


def save_predictions(samples: Sequence[dict[str, Any]], classes: Sequence[str], path: str | Path) -> Path:
    """Draws images in a grid with the predicted class and its probability, and the true class where it is known.

    Args:
        samples: `dict(image=uint8 array (H, W) or (H, W, 3), predicted=int, probability=float, label=int or None)`.
        classes: Class names.
        path: PNG to write.

    Returns:
        The file.
    """
    if not samples:
        raise ValueError('no images to draw')
    columns = min(len(samples), 6)
    rows = math.ceil(len(samples) / columns)
    figure = _figure(2.1 * columns, 2.55 * rows, layout='constrained')
    grid: list[Any] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place in grid:
        place.set_axis_off()
    for axes, sample in zip(grid, samples, strict=False):
        image, label, predicted = sample['image'], sample['label'], sample['predicted']
        # nearest keeps the pixels of small pictures visible instead of smearing them
        axes.imshow(image, cmap='gray', vmin=0, vmax=255, interpolation='nearest' if max(image.shape) < 100 else None)
        names = [_shorten(classes[i]) if i < len(classes) else str(i) for i in (predicted, label or 0)]
        title, color = f'{names[0]}  {100 * sample["probability"]:.0f} %', '#222222'
        if label is not None:
            color = GREEN if predicted == label else RED
            title += f'\ntrue: {names[1]}'
        axes.set_title(title, fontsize=9, color=color)
    return _save(figure, path)


def save_top_classes(image: np.ndarray, names: Sequence[str], probabilities: Sequence[float], path: str | Path) -> Path:
    """Draws one image beside bars for its most probable classes.

    Args:
        image: uint8 array (H, W) or (H, W, 3).
        names: Class names, best first.
        probabilities: Their probabilities.
        path: PNG to write.

    Returns:
        The file.
    """
    figure = _figure(8.4, 3.4, layout='constrained')
    picture, bars = figure.subplots(1, 2, width_ratios=[1, 1.35])
    picture.set_axis_off()
    picture.imshow(image, cmap='gray', vmin=0, vmax=255, interpolation='nearest' if max(image.shape) < 100 else None)
    places = range(len(names))
    bars.barh(places, [100 * p for p in probabilities], height=0.62,
              color=[BLUE] + ['#a9c3df'] * (len(names) - 1))
    for place, probability in zip(places, probabilities, strict=True):
        bars.text(100 * probability + 1.5, place, f'{100 * probability:.1f} %', va='center', fontsize=9)
    bars.set_yticks(places, [_shorten(name, 28) for name in names], fontsize=10)
    bars.invert_yaxis()
    bars.set_xlim(0, 118)
    bars.set_xticks([])
    bars.spines[['top', 'right', 'bottom']].set_visible(False)
    return _save(figure, path)


def to_picture(inputs: torch.Tensor) -> np.ndarray:
    """Turns an input that is not normalised into something to draw.

    Args:
        inputs: (C, H, W), uint8 in 0..255 or float in 0..1, with one or three channels.

    Returns:
        uint8 array (H, W) or (H, W, 3).
    """
    if inputs.dtype != torch.uint8:
        inputs = (inputs.float() * 255).round().clamp(0, 255).to(torch.uint8)
    picture = inputs.permute(1, 2, 0).cpu().numpy()
    return picture[..., 0] if picture.shape[-1] != 3 else picture


@HOOKS.register_module()
class OverlayHook(Hook):
    """Draws every tested image with what it shows and what the model found, side by side, by the run's visualizer.

    Args:
        folder: Where to write.
        score_thr: Detections with lower scores are left out.
    """

    priority = 'VERY_LOW'

    def __init__(self, folder: str, score_thr: float = 0.3) -> None:
        self.folder = Path(folder)
        self.score_thr = score_thr
        self.taken: dict[str, int] = {}

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Draws a batch.

        Args:
            runner: The runner.
            batch_idx: Number of the batch.
            data_batch: The batch.
            outputs: Data samples with ground truth and predictions.
        """
        for sample in outputs:
            path = Path(sample.img_path)
            count = self.taken[path.stem] = self.taken.get(path.stem, 0) + 1
            out = self.folder / f'{path.stem}{"" if count == 1 else f"-{count}"}.jpg'
            height, width = sample.ori_shape
            image = orient(open_image(str(path)), str(path), (width, height), 'the prediction')
            draw_sample(runner.visualizer, np.array(convert_mode(image, 'RGB')), sample, out, self.score_thr)


def draw_sample(
        visualizer: Any,
        picture: np.ndarray,
        sample: Any,
        out: Path | None,
        score_thr: float,
        truth: bool = True,
) -> np.ndarray:
    """Draws what a data sample of MMDetection or MMSegmentation holds.

    Args:
        visualizer: `DetLocalVisualizer` or `SegLocalVisualizer`.
        picture: uint8 array (H, W, 3), RGB.
        sample: Ground truth, a prediction, or both.
        out: JPEG to write, or None.
        score_thr: Detections with lower scores are left out.
        truth: Whether to draw the ground truth, if there is one, at the left of the prediction.

    Returns:
        uint8 array (H, W, 3), or (H, 2 W, 3) with ground truth.
    """
    options = {'pred_score_thr': score_thr} if 'pred_instances' in sample else {}
    if 'pred_sem_seg' in sample:
        # as an index of an array, a tensor of one pixel would be taken for a number
        sample = sample.numpy()
    with warnings.catch_warnings():
        # boxes that reach over the edge, and labels beside small pictures
        warnings.simplefilter('ignore')
        visualizer.add_datasample('picture', picture, data_sample=sample, out_file=str(out) if out else None,
                                  draw_gt=truth and ('gt_instances' in sample or 'gt_sem_seg' in sample), **options)
    return visualizer.get_image()


@HOOKS.register_module()
class VisualReportHook(Hook):
    """Writes pictures and a table of the last evaluation into the work dir when a training or test is over.

    `curves.png` (training only), `confusion_matrix.png`, `predictions.png` and `accuracy.json`. A report that cannot
    be written is logged as a warning: it must not fail a training that is finished.

    Args:
        num_images: Images in `predictions.png`, evenly over the dataset.
    """

    priority = 'VERY_LOW'

    def __init__(self, num_images: int = 24) -> None:
        self.num_images = num_images
        self._wanted: set[int] = set()
        self._samples: dict[int, dict[str, Any]] = {}

    def _start(self, size: int) -> None:
        world = get_world_size()
        positions = np.linspace(0, size - 1, min(self.num_images, size)).astype(int)
        # the main process sees every world-th image
        self._wanted = {int(position) // world * world for position in positions}
        self._samples = {}

    def before_val_epoch(self, runner: Runner) -> None:
        """Chooses the images to show."""
        self._start(len(runner.val_dataloader.dataset))

    def before_test_epoch(self, runner: Runner) -> None:
        """Chooses the images to show."""
        self._start(len(runner.test_dataloader.dataset))

    def _collect(self, data_batch: dict[str, Any], outputs: Sequence[dict[str, Any]]) -> None:
        for inputs, output in zip(data_batch['inputs'], outputs, strict=True):
            if output['index'] in self._wanted and inputs.shape[0] in (1, 3):
                probability, predicted = output['scores'].max(dim=0)
                self._samples[output['index']] = {'image': to_picture(inputs), 'label': output['label'],
                                                  'predicted': int(predicted), 'probability': float(probability)}

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keeps the predictions for the chosen images."""
        self._collect(data_batch, outputs)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keeps the predictions for the chosen images."""
        self._collect(data_batch, outputs)

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Writes the curves and the report of the last validation."""
        self._write(runner, runner.val_loop.evaluator if runner.val_loop is not None else None, curves=True)

    @master_only
    def after_test(self, runner: Runner) -> None:
        """Writes the report of the test."""
        self._write(runner, runner.test_loop.evaluator, curves=False)

    def _write(self, runner: Runner, evaluator: Any, curves: bool) -> None:
        folder = Path(runner.work_dir)
        metric = next((item for item in getattr(evaluator, 'metrics', ()) if isinstance(item, Accuracy)), None)
        try:
            written = [save_curves(folder)] if curves else []
            if metric is not None and metric.summary:
                described = (metric.dataset_meta or {}).get('descriptions')
                names = described or [row['class'] for row in metric.summary['classes']]
                write_json(metric.summary, folder / 'accuracy.json')
                written.append(save_confusion_matrix(metric.summary['confusion'], names,
                                                     folder / 'confusion_matrix.png'))
                if self._samples:
                    shown = [self._samples[index] for index in sorted(self._samples)]
                    written.append(save_predictions(shown, names, folder / 'predictions.png'))
        except (OSError, ImportError) as error:
            runner.logger.warning('the report in %s is incomplete: %s', folder, error)
            return
        runner.logger.info('report: %s', ', '.join(str(path) for path in written if path))
