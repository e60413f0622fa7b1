"""Prediction: images from files, what a model says about them, and annotated pictures."""
import argparse
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from timm.data.readers.img_extensions import get_img_extensions
from tqdm import tqdm

from ..utils.command import Command
from ..utils.reporting import Report
from .checkpoint import load_weights
from .classifier import create_timm_model
from .cli import USER_ERRORS, load_config
from .data import READ_ERRORS, convert_mode
from .facts import DenseFacts, describe_checkpoint, describe_dense, describe_restorer
from .predict_dense import UniqueNames, run_dense
from .predict_restoration import RESTORABLE_SUFFIXES, add_restoration_options, run_restoration
from .scopes import EXTRAS
from .video import VIDEO_SUFFIXES, is_video
from .visuals import save_predictions, save_top_classes

__all__ = ['Prediction', 'Predictor', 'default_device', 'find_images', 'load_dense_config', 'predict']

logger = logging.getLogger('visionssm')

MAX_SHOWN = 60


class Prediction(NamedTuple):
    """What a model says about one image: classes and probabilities, best first, and the image itself."""
    path: Path
    labels: list[int]
    probabilities: list[float]
    image: Image.Image


def find_images(
        paths: Sequence[str | Path],
        suffixes: Collection[str] = (),
        on_error: Callable[[OSError], object] | None = None,
) -> list[Path]:
    """Lists image files.

    Args:
        paths: Files, taken whatever their name, and folders, searched through by file name extension.
        suffixes: More extensions to look for in folders, such as those of videos.
        on_error: Called with the error of a folder that cannot be searched.

    Returns:
        The files, those of a folder in order of their names.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f'{path} does not exist: give image files or folders of images')
        if path.is_dir():
            extensions = {*get_img_extensions(as_set=True), *suffixes}
            inside = sorted(Path(folder, name) for folder, _, names in os.walk(path, onerror=on_error)
                            for name in names if Path(name).suffix.lower() in extensions)
            if not inside:
                raise FileNotFoundError(f'no images in the folder {path}: looked for {", ".join(sorted(extensions))}, '
                                        'also in its sub-folders')
            found += inside
        else:
            found.append(path)
    return found


class Predictor:
    """A classifier with its preprocessing and class names.

    Args:
        name: Model name; None takes the one that the checkpoint names.
        checkpoint: Weight file of any kind that `load_weights` takes; None takes the published weights of `name`.
        classes: Class names in label order; by default the checkpoint's, or ImageNet's.
        device: Where to compute; None takes an accelerator where there is one.
    """

    def __init__(
            self,
            name: str | None = None,
            checkpoint: str | None = None,
            classes: Sequence[str] = (),
            device: str | None = None,
    ) -> None:
        facts = describe_checkpoint(checkpoint, name)
        if facts.name is None:
            raise ValueError('which model? Give --model NAME'
                             + (f': {checkpoint} does not say what it holds' if checkpoint else ''))
        self.model = create_timm_model(facts.name, pretrained=checkpoint is None, **facts.arguments)
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        self.device = torch.device(device or default_device())
        self.model.eval().to(self.device)
        self.data_config = facts.data_config(self.model.pretrained_cfg)
        self.channels = self.data_config['input_size'][0]
        self.transform = create_transform(**self.data_config)
        if classes and len(classes) != self.model.num_classes:
            raise ValueError(f'{len(classes)} names of classes were given and the model has {self.model.num_classes} '
                             'classes; give one name a line, in the order of the labels')
        self.classes = list(classes) or _class_names(self.model, facts.classes)

    def class_name(self, label: int) -> str:
        """Name of a class, its number where there is none."""
        return self.classes[label] if label < len(self.classes) else str(label)

    def read(self, file: Image.Image) -> Image.Image:
        """Return an image as the model takes it: upright, RGB or gray."""
        # cameras store how they were held instead of turning the pixels
        return convert_mode(ImageOps.exif_transpose(file), 'L' if self.channels == 1 else 'RGB')

    @torch.inference_mode()
    def classify(self, images: Sequence[Image.Image], topk: int = 5) -> list[tuple[list[int], list[float]]]:
        """Classifies images at once.

        Args:
            images: Images that :meth:`read` returned.
            topk: How many classes to name.

        Returns:
            Classes and probabilities of each image, best first.
        """
        inputs = torch.stack([self.transform(image) for image in images]).to(self.device)
        scores = self.model(inputs).float().softmax(-1).cpu()
        best = scores.topk(min(topk, scores.shape[1]))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def predict(
            self,
            paths: Sequence[Path],
            topk: int = 5,
            batch_size: int = 32,
            on_error: Callable[[Path, str], object] = lambda path, reason: None,
    ) -> Iterator[Prediction]:
        """Classifies images; those that cannot be read are logged and left out.

        Args:
            paths: Image files.
            topk: How many classes to name.
            batch_size: Images at a time.
            on_error: Called with an image that cannot be read, and why.

        Yields:
            One prediction a readable image, in order.
        """
        for start in range(0, len(paths), batch_size):
            loaded = []
            for path in paths[start:start + batch_size]:
                try:
                    with Image.open(path) as file:
                        loaded.append((path, self.read(file)))
                except READ_ERRORS as error:
                    logger.warning('skipped %s: not a readable image (%s: %s)', path, type(error).__name__, error)
                    on_error(path, f'{type(error).__name__}: {error}')
            if not loaded:
                continue
            results = self.classify([image for _, image in loaded], topk)
            for (path, image), (labels, probabilities) in zip(loaded, results, strict=True):
                yield Prediction(path, labels, probabilities, image)


def default_device() -> str:
    """Return the kind of the accelerator, or 'cpu'."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else 'cpu'


def _class_names(model: nn.Module, stored: Sequence[str]) -> list[str]:
    if stored:
        return list(stored)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    return [info.index_to_description(label) for label in range(info.num_classes())]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', nargs='+', help='image files, or folders of them; all models but classifiers also '
                                                  'take video files')
    parser.add_argument('--config', help='config of a detector or segmentor (default: the one in the checkpoint, read '
                                         'as data)')
    parser.add_argument('--model', help='name of the model (default: the one that the checkpoint names)')
    parser.add_argument('--checkpoint', help='weights: of a training here, safetensors, published ones, or '
                                             'visionssm://NAME (default: the published weights of --model)')
    parser.add_argument('--classes', help='text file with the name of one class a line')
    parser.add_argument('--topk', type=int, default=5, help='how many classes to name')
    parser.add_argument('--out', default='predictions', help='folder for the annotated or restored pictures')
    parser.add_argument('--device', help='where to compute (default: an accelerator if there is one)')
    parser.add_argument('--batch-size', type=int, default=32, help='images at a time (classification)')
    parser.add_argument('--score-thr', type=float, default=0.3, help='lowest score of a detection that counts')
    parser.add_argument('--json', action='store_true', help='write a line of JSON for each file, and nothing else, to '
                                                            'the standard output')
    add_restoration_options(parser)


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.topk < 1 or args.batch_size < 1:
        parser.error(f'--topk {args.topk} and --batch-size {args.batch_size} must be 1 or more')


def load_dense_config(config: str) -> Config:
    """Read the config of a detector or segmentor.

    Args:
        config: A file, or a name as `find_any_config` takes it.

    Returns:
        The config.
    """
    cfg = load_config(argparse.Namespace(config=config, cfg_options={}, launcher='none', local_rank=0, work_dir='.'))
    if cfg.default_scope not in EXTRAS:
        raise ValueError(f'--config {config} is of the scope {cfg.default_scope}; classifiers need only --checkpoint, '
                         'or --model')
    return cfg


def _dense(args: argparse.Namespace) -> tuple[Config, DenseFacts] | None:
    """Config and facts of a detector or segmentor; None for a classifier."""
    if args.config:
        if args.checkpoint is None:
            raise ValueError('--config needs --checkpoint FILE: the weights of the model')
        if args.model:
            raise ValueError(f'--model {args.model} names a classifier, and --config a detector or segmentor; give one')
        cfg = load_dense_config(args.config)
        return cfg, describe_dense(args.checkpoint)
    facts = describe_dense(args.checkpoint) if args.model is None else None
    return (facts.cfg, facts) if facts is not None and facts.cfg is not None else None


def run(args: argparse.Namespace, report: Report) -> int:
    """Predicts, prints and draws as the options say.

    Args:
        args: Options of `tools/predict.py`.
        report: Takes what is found.

    Returns:
        How many images could be read.
    """
    classes = Path(args.classes).read_text(encoding='utf-8').strip().splitlines() if args.classes else ()
    restorer = None if args.config else describe_restorer(args.checkpoint, args.model)
    if restorer is not None:
        unread: list[OSError] = []
        paths = find_images(args.images, RESTORABLE_SUFFIXES, unread.append)
        return run_restoration(args, restorer, paths, args.device or default_device(), report, unread)
    dense = _dense(args)
    paths = find_images(args.images, VIDEO_SUFFIXES if dense else ())
    if dense:
        cfg, facts = dense
        if classes:
            facts = facts._replace(dataset_meta={**facts.dataset_meta, 'classes': tuple(classes)})
        return run_dense(args, cfg, facts, paths, args.device or default_device(), report)
    videos = [path for path in paths if is_video(path)]
    if videos:
        raise ValueError(f'{videos[0]} is a video; classifiers take images')
    return _run_classifier(args, Predictor(args.model, args.checkpoint, classes, args.device), paths, report)


def _run_classifier(args: argparse.Namespace, predictor: Predictor, paths: Sequence[Path], report: Report) -> int:
    out, name, done = Path(args.out), UniqueNames(), 0
    samples: list[dict] = []
    bar = tqdm(predictor.predict(paths, args.topk, args.batch_size, report.fail), total=len(paths), unit='image',
               disable=None, dynamic_ncols=True)
    for prediction in bar:
        done += 1
        lines = [f'{rank}  {100 * p:6.2f} %  {predictor.class_name(label)}' for rank, (label, p) in
                 enumerate(zip(prediction.labels, prediction.probabilities, strict=True), 1)]
        names = [predictor.class_name(label) for label in prediction.labels]
        picture = out / f'{name(prediction.path)}_prediction.png'
        save_top_classes(np.asarray(prediction.image), names, prediction.probabilities, picture)
        classes = [{'label': label, 'name': label_name, 'probability': p} for label, label_name, p in
                   zip(prediction.labels, names, prediction.probabilities, strict=True)]
        report.say({'path': str(prediction.path), 'classes': classes, 'picture': str(picture)},
                   '\n  '.join([str(prediction.path), *lines]))
        if len(samples) < MAX_SHOWN:
            # only small copies stay in memory
            prediction.image.thumbnail((224, 224))
            samples.append({'image': np.asarray(prediction.image), 'label': None, 'predicted': prediction.labels[0],
                            'probability': prediction.probabilities[0]})
    if done < len(paths):
        logger.warning('%d of %d images could not be read', len(paths) - done, len(paths))
    if done > 1:
        save_predictions(samples, predictor.classes, out / 'predictions.png')
    if done:
        sys.stdout.write(f'annotated pictures: {out}\n')
    return done


def _predict(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format='%(levelname)s: %(message)s')
    with Report(args.json) as report:
        return 0 if run(args, report) else 1


# a device that cannot be used or runs out of memory raises a RuntimeError
predict = Command('Say what is on images (a class, objects, or the class of each pixel), or restore them '
                  '(super-resolution, denoising).', _add_options, _predict, _check_options,
                  errors=(*USER_ERRORS, RuntimeError))
