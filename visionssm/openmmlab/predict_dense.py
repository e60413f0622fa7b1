"""Prediction by detectors and segmentors: pictures and videos in, annotated ones and JSON out."""
import argparse
import io
import itertools
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings
from PIL import Image
from tqdm import tqdm

from ..utils.files import atomic_write
from ..utils.reporting import Report
from .check import ConfigError
from .checkpoint import load_any_weights
from .data import READ_ERRORS
from .evaluate_dense import VISUALIZERS, without_pretraining
from .facts import DenseFacts
from .image_io import LoadImage
from .scopes import registries
from .video import VideoFrames, VideoSink, is_video
from .visuals import draw_sample, write_json

__all__ = ['DensePredictor', 'class_map', 'objects', 'run_dense', 'shares']

logger = logging.getLogger('visionssm')


class DensePredictor:
    """A detector or segmentor with its preprocessing and class names.

    Args:
        cfg: Config of the model and its test data.
        checkpoint: Weights of any kind that `load_any_weights` takes.
        dataset_meta: ``classes`` and ``palette``; by default those of the config's test data.
        device: Where to compute.
    """

    def __init__(self, cfg: Config, checkpoint: str, dataset_meta: Mapping[str, Any], device: str) -> None:
        self.scope = cfg.default_scope
        home = registries(self.scope)
        import_modules_from_strings(**cfg.get('custom_imports', {'imports': []}))
        without_pretraining(cfg.model)
        if cfg.get('data_preprocessor'):
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        data = _innermost(cfg)
        with DefaultScope.overwrite_default_scope(self.scope):
            self.model = revert_sync_batchnorm(home['MODELS'].build(cfg.model))
            self.pipeline, self.as_float = _pipeline(data)
        load_any_weights(self.model, checkpoint)
        self.model.to(device).eval()
        self.meta = _meta(data, dataset_meta, home['DATASETS'])
        # one visualizer a predictor: named instances would be shared with others of this process
        self.visualizer = home['VISUALIZERS'].get(VISUALIZERS[self.scope])()
        self.visualizer.dataset_meta = self.meta

    @property
    def classes(self) -> Sequence[str]:
        """Names in label order."""
        return self.meta['classes']

    @torch.inference_mode()
    def predict(self, picture: np.ndarray, name: str) -> Any:
        """Predicts for one picture.

        Args:
            picture: uint8 array (H, W, 3), BGR.
            name: Its path.

        Returns:
            A data sample of MMDetection or MMSegmentation, on the CPU.
        """
        shape = picture.shape[:2]
        pixels = picture.astype(np.float32) if self.as_float else picture.copy()
        data = self.pipeline({'img': pixels, 'img_shape': shape, 'ori_shape': shape, 'img_id': 0, 'img_path': name})
        batch = {'inputs': [data['inputs']], 'data_samples': [data['data_samples']]}
        with DefaultScope.overwrite_default_scope(self.scope):
            return self.model.test_step(batch)[0].cpu()

    def draw(self, picture: np.ndarray, sample: Any, score_thr: float) -> np.ndarray:
        """Draws a prediction.

        Args:
            picture: uint8 array (H, W, 3), BGR.
            sample: What :meth:`predict` returned.
            score_thr: Detections with lower scores are left out.

        Returns:
            uint8 array (H, W, 3), RGB.
        """
        return draw_sample(self.visualizer, np.ascontiguousarray(picture[..., ::-1]), sample, None, score_thr, False)


def _innermost(cfg: Config) -> Config:
    data = (cfg.get('test_dataloader') or {}).get('dataset')
    while data is not None and 'dataset' in data and 'pipeline' not in data:
        data = data['dataset']
    if data is None or 'pipeline' not in data:
        raise ConfigError('the config lacks test_dataloader.dataset.pipeline, which says how pictures are prepared')
    return data


def _pipeline(data: Config) -> tuple[Compose, bool]:
    """The steps after the loading of pictures and annotations, and whether they want floats."""
    steps = [step for step in data.pipeline if 'Load' not in str(step['type'])]
    as_float = any(step.get('to_float32') for step in data.pipeline if 'Load' in str(step['type']))
    return Compose(steps), as_float


def _meta(data: Config, known: Mapping[str, Any], datasets: Any) -> dict[str, Any]:
    """Classes and colours: what the checkpoint says, else the config, else the data set's class."""
    kind = data.get('type')
    found = getattr(datasets.get(kind) if isinstance(kind, str) else kind, 'METAINFO', {})
    meta = {**found, **(data.get('metainfo') or {}), **known}
    if not meta.get('classes'):
        raise ConfigError(f'neither the checkpoint nor the data set {kind} names the classes; set '
                          "test_dataloader.dataset.metainfo=dict(classes=('first class', ...))")
    classes = tuple(meta['classes'])
    palette = meta.get('palette')
    if not isinstance(palette, list | tuple) or len(palette) < len(classes):
        palette = np.random.default_rng(42).integers(40, 256, (len(classes), 3)).tolist()
    return {'classes': classes, 'palette': [tuple(color) for color in palette]}


def objects(sample: Any, classes: Sequence[str], score_thr: float) -> list[dict[str, Any]]:
    """Lists what a detector found.

    Args:
        sample: Data sample with `pred_instances`.
        classes: Class names.
        score_thr: Lowest score.

    Returns:
        `dict(category_id, category, score, bbox=[x, y, width, height])`, best first, with `segmentation` as COCO's
        run lengths where there are masks.
    """
    found = sample.pred_instances
    found = found[found.scores >= score_thr]
    rows = []
    for place in found.scores.argsort(descending=True).tolist():
        x, y, right, bottom = found.bboxes[place].tolist()
        label = int(found.labels[place])
        row = {'category_id': label, 'category': classes[label], 'score': round(float(found.scores[place]), 5),
               'bbox': [round(value, 2) for value in (x, y, right - x, bottom - y)]}
        if 'masks' in found:
            from pycocotools.mask import encode
            runs = encode(np.asfortranarray(np.asarray(found.masks[place]).astype(np.uint8)))
            row['segmentation'] = {'size': list(runs['size']), 'counts': runs['counts'].decode()}
        rows.append(row)
    return rows


def shares(labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Share of a class map that each class has, in per cent, the largest first; absent ones are left out."""
    counts = np.bincount(labels.ravel(), minlength=len(classes))[:len(classes)]
    order = np.argsort(-counts, kind='stable')
    return {classes[place]: round(100 * float(counts[place]) / labels.size, 2) for place in order if counts[place]}


def class_map(sample: Any) -> np.ndarray:
    """Return the class of each pixel of a prediction, (H, W), uint8 or uint16."""
    labels = sample.pred_sem_seg.data.squeeze(0).numpy()
    return labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16)


def _describe(sample: Any, predictor: DensePredictor, score_thr: float) -> tuple[dict[str, Any], str]:
    """What a prediction says, for the JSON file and for the terminal."""
    if 'pred_instances' in sample:
        rows = objects(sample, predictor.classes, score_thr)
        names = ', '.join(f'{row["category"]} {row["score"]:.2f}' for row in rows[:8])
        return {'objects': rows}, f'{len(rows)} objects{": " if rows else ""}{names}{" ..." if len(rows) > 8 else ""}'
    found = shares(class_map(sample), predictor.classes)
    return {'shares': found}, ', '.join(f'{name} {value:.1f} %' for name, value in list(found.items())[:8])


class UniqueNames:
    """One name a file, numbered where files of several folders share a name, or differ only in capitals."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def __call__(self, path: Path) -> str:
        """The name for a file, without extension."""
        names = itertools.chain([path.stem], (f'{path.stem}-{number}' for number in itertools.count(2)))
        # some systems know no capitals; and a file may be called as another one is numbered
        name = next(name for name in names if name.casefold() not in self.taken)
        self.taken.add(name.casefold())
        return name


def save_image(pixels: np.ndarray, path: Path) -> None:
    """Writes a picture so that the file is either complete or untouched."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format='PNG' if path.suffix == '.png' else 'JPEG', quality=92)
    atomic_write(buffer.getbuffer(), path)


def _predict_images(
        predictor: DensePredictor,
        paths: Sequence[Path],
        args: argparse.Namespace,
        report: Report,
) -> list[dict]:
    records: list[dict] = []
    name, out, load = UniqueNames(), Path(args.out), LoadImage()
    for path in tqdm(paths, unit='image', disable=None, dynamic_ncols=True):
        try:
            picture = load({'img_path': str(path)})['img']
        except READ_ERRORS as error:
            logger.warning('skipped %s: not a readable image (%s: %s)', path, type(error).__name__, error)
            report.fail(path, f'{type(error).__name__}: {error}')
            continue
        sample = predictor.predict(picture, str(path))
        found, text = _describe(sample, predictor, args.score_thr)
        stem = name(path)
        if 'pred_sem_seg' in sample:
            found['map'] = f'{stem}.png'
            save_image(class_map(sample), out / found['map'])
        overlay = out / f'{stem}_prediction.jpg'
        save_image(predictor.draw(picture, sample, args.score_thr), overlay)
        records.append({'id': len(records) + 1, 'file_name': str(path), 'width': picture.shape[1],
                        'height': picture.shape[0], 'picture': overlay.name, **found})
        files = {key: str(out / records[-1][key]) for key in ('map', 'picture') if key in records[-1]}
        report.say({'path': str(path), 'width': picture.shape[1], 'height': picture.shape[0], **found, **files},
                   f'{path}: {text}')
    if len(records) < len(paths):
        logger.warning('%d of %d images could not be read', len(paths) - len(records), len(paths))
    return records


def _write_records(records: list[dict], classes: Sequence[str], path: Path) -> None:
    """Writes predictions for images: the layout of COCO's annotation files, with scores."""
    annotations = [{'id': 0, 'image_id': record['id'], **row} for record in records
                   for row in record.pop('objects', ())]
    for number, row in enumerate(annotations, 1):
        row['id'] = number
    write_json({'images': records, 'annotations': annotations,
                'categories': [{'id': label, 'name': name} for label, name in enumerate(classes)]}, path)


def _frames(predictor: DensePredictor, video: VideoFrames, sink: VideoSink, args: argparse.Namespace) -> Iterator[str]:
    """One JSON line a frame, as the frames are written."""
    for number, frame in enumerate(tqdm(video, total=video.length, unit='frame', disable=None, dynamic_ncols=True,
                                        desc=video.path.name)):
        sample = predictor.predict(frame, f'{video.path}#{number}')
        found, _ = _describe(sample, predictor, args.score_thr)
        sink.write(predictor.draw(frame, sample, args.score_thr)[..., ::-1])
        yield json.dumps({'frame': number, 'time': round(number / video.rate, 4), **found}) + '\n'


def _predict_video(
        predictor: DensePredictor,
        video: VideoFrames,
        stem: str,
        args: argparse.Namespace,
        report: Report,
) -> int:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    target, part = out / f'{stem}.jsonl', out / f'.{stem}.jsonl.tmp'
    number = 0
    try:
        with VideoSink(out / f'{stem}_prediction.mp4', video.rate, video.size) as sink, \
                open(part, 'w', encoding='utf-8') as lines:
            for line in _frames(predictor, video, sink, args):
                lines.write(line)
                number += 1
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    report.say({'path': str(video.path), 'frames': number, 'picture': str(sink.path), 'lines': str(target)},
               f'{video.path}: {number} frames, {sink.path}, {target}')
    return number


def run_dense(
        args: argparse.Namespace,
        cfg: Config,
        facts: DenseFacts,
        paths: Sequence[Path],
        device: str,
        report: Report,
) -> int:
    """Predicts as the options of `tools/predict.py` say.

    Args:
        args: The options.
        cfg: Config of the model.
        facts: What the checkpoint says.
        paths: Images and videos.
        device: Where to compute.
        report: Takes what is found.

    Returns:
        How many images and videos could be read.
    """
    # a video that cannot be read is refused before any work is done
    videos = [VideoFrames(path) for path in paths if is_video(path)]
    images = [path for path in paths if not is_video(path)]
    predictor = DensePredictor(cfg, args.checkpoint, facts.dataset_meta, device)
    records = _predict_images(predictor, images, args, report)
    done = len(records)
    if records:
        _write_records(records, predictor.classes, Path(args.out) / 'predictions.json')
    name = UniqueNames()
    done += sum(_predict_video(predictor, video, name(video.path), args, report) > 0 for video in videos)
    if done:
        sys.stdout.write(f'predictions: {args.out}\n')
    return done
