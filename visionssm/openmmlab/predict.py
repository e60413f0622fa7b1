"""Prediction: images from files, the classes that a model gives them, and annotated pictures."""
import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from timm.data.readers.img_extensions import get_img_extensions

from .checkpoint import load_weights
from .classifier import create_timm_model
from .cli import USER_ERRORS, run_command
from .data import READ_ERRORS, convert_mode
from .facts import describe_checkpoint
from .visuals import save_predictions, save_top_classes

__all__ = ['Prediction', 'Predictor', 'find_images', 'predict']

logger = logging.getLogger('visionssm')


class Prediction(NamedTuple):
    """What a model says about one image: classes and probabilities, best first, and the image itself."""
    path: Path
    labels: list[int]
    probabilities: list[float]
    image: Image.Image


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Lists image files.

    Args:
        paths: Files, taken whatever their name, and folders, searched through by file name extension.

    Returns:
        The files, those of a folder in order of their names.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f'{path} does not exist: give image files or folders of images')
        if path.is_dir():
            extensions = get_img_extensions(as_set=True)
            inside = sorted(file for file in path.rglob('*') if file.suffix.lower() in extensions)
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
        self.device = torch.device(device or _default_device())
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

    def _load(self, path: Path) -> tuple[Image.Image, torch.Tensor]:
        with Image.open(path) as file:
            # cameras store how they were held instead of turning the pixels
            image = convert_mode(ImageOps.exif_transpose(file), 'L' if self.channels == 1 else 'RGB')
        return image, self.transform(image)

    @torch.inference_mode()
    def predict(self, paths: Sequence[Path], topk: int = 5, batch_size: int = 32) -> Iterator[Prediction]:
        """Classifies images; those that cannot be read are logged and left out.

        Args:
            paths: Image files.
            topk: How many classes to name.
            batch_size: Images at a time.

        Yields:
            One prediction a readable image, in order.
        """
        for start in range(0, len(paths), batch_size):
            loaded = []
            for path in paths[start:start + batch_size]:
                try:
                    loaded.append((path, *self._load(path)))
                except READ_ERRORS as error:
                    logger.warning('skipped %s: not a readable image (%s: %s)', path, type(error).__name__, error)
            if not loaded:
                continue
            inputs = torch.stack([tensor for _, _, tensor in loaded]).to(self.device)
            scores = self.model(inputs).float().softmax(-1).cpu()
            best = scores.topk(min(topk, scores.shape[1]))
            for (path, image, _), probabilities, labels in zip(loaded, best.values, best.indices, strict=True):
                yield Prediction(path, labels.tolist(), probabilities.tolist(), image)


def _default_device() -> str:
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


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Name what is on images.')
    parser.add_argument('images', nargs='+', help='image files, or folders of them')
    parser.add_argument('--model', help='name of the model (default: the one that the checkpoint names)')
    parser.add_argument('--checkpoint', help='weights: of a training here, safetensors, published ones, or '
                                             'visionssm://NAME (default: the published weights of --model)')
    parser.add_argument('--classes', help='text file with the name of one class a line')
    parser.add_argument('--topk', type=int, default=5, help='how many classes to name')
    parser.add_argument('--out', default='predictions', help='folder for the annotated pictures')
    parser.add_argument('--device', help='where to compute (default: an accelerator if there is one)')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    args = parser.parse_args(argv)
    if args.topk < 1 or args.batch_size < 1:
        parser.error(f'--topk {args.topk} and --batch-size {args.batch_size} must be 1 or more')
    return args


def _picture_names(paths: Sequence[Path], folder: Path) -> Iterator[Path]:
    """One file name an image, numbered where images of several folders share a name."""
    taken: dict[str, int] = {}
    for path in paths:
        count = taken[path.stem] = taken.get(path.stem, 0) + 1
        yield folder / f'{path.stem}{"" if count == 1 else f"-{count}"}_prediction.png'


def run(args: argparse.Namespace) -> int:
    """Predicts, prints and draws as the options say.

    Args:
        args: Options of `tools/predict.py`.

    Returns:
        How many images could be read.
    """
    classes = Path(args.classes).read_text(encoding='utf-8').strip().splitlines() if args.classes else ()
    paths = find_images(args.images)
    predictor = Predictor(args.model, args.checkpoint, classes, args.device)
    predictions = []
    for prediction in predictor.predict(paths, args.topk, args.batch_size):
        predictions.append(prediction)
        lines = [f'{rank}  {100 * p:6.2f} %  {predictor.class_name(label)}' for rank, (label, p) in
                 enumerate(zip(prediction.labels, prediction.probabilities, strict=True), 1)]
        sys.stdout.write('\n  '.join([str(prediction.path), *lines]) + '\n')
        sys.stdout.flush()
    if len(predictions) < len(paths):
        logger.warning('%d of %d images could not be read', len(paths) - len(predictions), len(paths))
    out = Path(args.out)
    for prediction, path in zip(predictions, _picture_names([p.path for p in predictions], out), strict=True):
        names = [predictor.class_name(label) for label in prediction.labels]
        save_top_classes(np.asarray(prediction.image), names, prediction.probabilities, path)
    if len(predictions) > 1:
        samples = [{'image': np.asarray(p.image), 'label': None, 'predicted': p.labels[0],
                    'probability': p.probabilities[0]} for p in predictions[:60]]
        save_predictions(samples, predictor.classes, out / 'predictions.png')
    if predictions:
        sys.stdout.write(f'annotated pictures: {out}\n')
    return len(predictions)


def predict(argv: Sequence[str] | None = None) -> int:
    """Runs `tools/predict.py`.

    Args:
        argv: The arguments; None takes the process's.

    Returns:
        Exit code: 0 if at least one image could be read.
    """
    logging.basicConfig(level=logging.INFO, format='%(levelname)s: %(message)s')
    args = _parse(argv)
    # a device that cannot be used or runs out of memory raises a RuntimeError
    return run_command(lambda: 0 if run(args) else 1, args.debug, errors=(*USER_ERRORS, RuntimeError))
