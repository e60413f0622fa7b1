"""Small data sets in the layouts of COCO and ADE20K, composed of real pixels: garments pasted onto photographs.

The garments are pictures of Fashion-MNIST, the backgrounds crops of photographs. As every garment is placed by the
program, boxes, masks and class maps are exact. Nothing here is a photograph of a garment in a scene, and the data sets
say so themselves.

A garment's mask is made of its own pixels, those brighter than `DIM` times its light parts: the pictures have a fringe
of nearly black pixels that would look like a dirty edge. Specks of fewer than `MIN_SPECK` pixels go. Dark pixels that
the garment encloses belong to it, except where more than `MAX_HOLE` of them are mostly pure black: the opening of a
bag's handle or between two straps (and now and then a black print) shows the background. Mask and picture are enlarged
together, the mask by linear interpolation and a threshold at one half, so that a pixel is the garment's or it is not.
What later garments cover belongs to them; a garment that would leave less than `min_visible` of itself or of another is
placed elsewhere or left out, so everything that is seen is also annotated.
"""
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .fashion import FASHION_CLASSES, embedded_fashion_mnist
from .folders import make_room, replace_folder
from .photos import read_photograph

__all__ = ['ADE_CLASSES', 'ComposeOptions', 'Composition', 'Photographs', 'compose', 'encode_rle', 'garment_mask',
           'draw_sheet', 'make_composed_data']

# the class map of a composed image: 0 is the photograph, k + 1 the garment class k
ADE_CLASSES = ('background', *FASHION_CLASSES)
DIM = 0.1
MIN_SPECK = 6
MAX_HOLE = 12
MAX_PHOTOGRAPH_SIDE = 1024
PLACING_ATTEMPTS = 20
# the name of a split here, in Fashion-MNIST, and in the folders of ADE20K
SPLITS = {'train': ('train', 'training'), 'val': ('test', 'validation')}
FORMATS = ('coco', 'ade')
# the colours of the classes in pictures, which the configs use too
COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75),
           (227, 119, 194), (240, 228, 66), (188, 189, 34), (23, 190, 207))
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
ORIGIN = 'composed from Fashion-MNIST garments and photographs; not photographs of garments'


@dataclass(frozen=True)
class ComposeOptions:
    """How images are composed.

    Args:
        size: Side of the square images in pixels.
        max_garments: Most garments in an image; at least one is tried.
        min_scale: Smallest factor by which a garment of 28 x 28 pixels is enlarged.
        max_scale: Largest such factor.
        min_visible: Share of a garment that must stay visible.
        tinted: Share of garments that get a colour; the others stay grey.
        quality: Quality of the JPEG files; colours are kept at full resolution.
        seed: Seed of everything. Equal options give equal files, as long as NumPy and Pillow are the same.
    """

    size: int = 160
    max_garments: int = 6
    min_scale: float = 0.9
    max_scale: float = 2.8
    min_visible: float = 0.4
    tinted: float = 0.7
    quality: int = 95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError(f'min_scale={self.min_scale} and max_scale={self.max_scale}: both must be above 0 and the '
                             'first not above the second')
        if self.size < 28 * self.max_scale:
            raise ValueError(f'size={self.size} is smaller than a garment at max_scale={self.max_scale} '
                             f'({28 * self.max_scale:.0f} pixels): give a larger size or a smaller max_scale')
        for name, value, lowest, highest in (('max_garments', self.max_garments, 1, 100), ('seed', self.seed, 0, 2**63),
                                             ('min_visible', self.min_visible, 0.01, 1), ('tinted', self.tinted, 0, 1),
                                             ('quality', self.quality, 1, 100)):
            if not lowest <= value <= highest:
                raise ValueError(f'{name}={value}: give a value from {lowest} to {highest}')


@dataclass
class Composition:
    """A composed image.

    Args:
        image: (H, W, 3) uint8.
        masks: One (H, W) bool for every garment: its visible pixels; they do not overlap.
        labels: One class index for every garment.
    """

    image: np.ndarray
    masks: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def class_map(self) -> np.ndarray:
        """Returns (H, W) uint8: 0 where the photograph is seen, class index + 1 on garments."""
        result = np.zeros(self.image.shape[:2], np.uint8)
        for mask, label in zip(self.masks, self.labels):
            result[mask] = label + 1
        return result


class Photographs:
    """Background photographs, read when needed.

    Args:
        paths: The files.
        credits: One line for every file that says what it is and under which licence; the file names when None.
    """

    def __init__(self, paths: Sequence[str | Path], credits: Sequence[str] | None = None) -> None:
        if not paths:
            raise ValueError('no background photographs: give a folder with at least two')
        self.paths = [Path(path) for path in paths]
        self.credits = list(credits or [path.name for path in self.paths])

    def __len__(self) -> int:
        return len(self.paths)

    def crop(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Returns a random square piece of a random photograph, mirrored or not: (size, size, 3) uint8."""
        photograph = _read_small(self.paths[rng.integers(len(self.paths))])
        shorter = min(photograph.size)
        side = int(rng.integers(min(size, shorter), shorter + 1))
        left, top = (int(rng.integers(extent - side + 1)) for extent in photograph.size)
        piece = photograph.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        pixels = np.asarray(piece)
        pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        return (pixels * rng.uniform(0.6, 1.0)).astype(np.uint8)

    @classmethod
    def split_folder(cls, folder: str | Path) -> dict[str, 'Photographs']:
        """Divides the photographs of a folder by name: every fifth, at least one, for 'val', the others for 'train'."""
        paths = sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES) \
            if Path(folder).is_dir() else []
        if len(paths) < 2:
            raise ValueError(f'{folder} has {len(paths)} images ({", ".join(IMAGE_SUFFIXES)}): it needs two or more, '
                             'so that training and validation have different backgrounds')
        last = 1 if len(paths) < 5 else 4
        val = [path for index, path in enumerate(paths) if index % 5 == last]
        return {'train': cls([path for path in paths if path not in set(val)]), 'val': cls(val)}


@lru_cache(maxsize=64)
def _read_small(path: Path) -> Image.Image:
    photograph = read_photograph(path)
    photograph.thumbnail((MAX_PHOTOGRAPH_SIDE, MAX_PHOTOGRAPH_SIDE), Image.Resampling.LANCZOS)
    return photograph


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """Connected regions (four neighbours) of a small mask."""
    numbers = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while True:
        padded = np.pad(numbers, 1)
        neighbours = [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        # the largest number of a region spreads over all of it
        spread = np.maximum.reduce(neighbours) * mask
        if (spread == numbers).all():
            return [numbers == number for number in np.unique(numbers) if number]
        numbers = spread


def garment_mask(picture: np.ndarray) -> np.ndarray:
    """Returns which pixels of a garment's picture belong to the garment (see the head of this file).

    Args:
        picture: (28, 28) uint8, black around the garment.

    Returns:
        (28, 28) bool.
    """
    own = picture[picture > 0]
    mask = picture > DIM * (np.percentile(own, 90) if own.size else 0)
    for region in _regions(mask):
        if region.sum() < MIN_SPECK:
            mask = mask & ~region
    for hole in _regions(~mask):
        at_border = hole[[0, -1]].any() or hole[:, [0, -1]].any()
        opening = hole.sum() > MAX_HOLE and (picture[hole] == 0).mean() > 0.5
        if not at_border and not opening:
            mask = mask | hole
    return mask


def _enlarged(picture: np.ndarray, scale: float, mirrored: bool) -> tuple[np.ndarray, np.ndarray]:
    """A garment at another scale, cut to its mask: grey (h, w) float in 0..1 and mask (h, w) bool."""
    mask = garment_mask(picture)
    side = max(1, round(28 * scale))
    weight = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR))
    shades = Image.fromarray((picture * mask).astype(np.float32) / 255)
    # dividing by the weight keeps the black around the garment out of its edge
    grey = np.asarray(shades.resize((side, side), Image.Resampling.BILINEAR)) / np.maximum(weight, 1e-6)
    mask = weight > 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return np.zeros((0, 0)), np.zeros((0, 0), bool)
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    grey, mask = np.clip(grey[window], 0, 1), mask[window]
    return (grey[:, ::-1], mask[:, ::-1]) if mirrored else (grey, mask)


def _colour(rng: np.random.Generator, tinted: float) -> np.ndarray:
    """A light colour, or white."""
    colour = 1 - rng.uniform(0, 0.7, 3)
    return colour / colour.max() if rng.random() < tinted else np.ones(3)


def compose(
        rng: np.random.Generator,
        pictures: np.ndarray,
        labels: np.ndarray,
        background: np.ndarray,
        options: ComposeOptions,
) -> Composition:
    """Pastes garments onto a background.

    Args:
        rng: Source of all randomness.
        pictures: Garments to choose from, (N, 28, 28) uint8.
        labels: Their classes (N,).
        background: (size, size, 3) uint8.
        options: How many, how large and how much of them must be seen.

    Returns:
        The image with its garments in the order in which they were placed.
    """
    result = Composition(background.copy())
    full_areas: list[int] = []
    size = options.size
    for _ in range(int(rng.integers(1, options.max_garments + 1))):
        index = int(rng.integers(len(pictures)))
        grey, mask = _enlarged(pictures[index], rng.uniform(options.min_scale, options.max_scale), rng.random() < 0.5)
        if mask.sum() < MIN_SPECK:
            continue
        colour = _colour(rng, options.tinted)
        height, width = mask.shape
        for _ in range(PLACING_ATTEMPTS):
            # up to a quarter may lie outside of the image
            top = int(rng.integers(-(height // 4), size - height + height // 4 + 1))
            left = int(rng.integers(-(width // 4), size - width + width // 4 + 1))
            rows = slice(max(top, 0), min(top + height, size))
            columns = slice(max(left, 0), min(left + width, size))
            inner = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
            placed: np.ndarray = np.zeros((size, size), bool)
            placed[rows, columns] = mask[inner]
            rest = [other & ~placed for other in result.masks]
            seen = [(part.sum(), full) for part, full in zip([*rest, placed], [*full_areas, mask.sum()])]
            if all(area >= options.min_visible * full for area, full in seen):
                pixels = np.rint(255 * grey[..., None] * colour).astype(np.uint8)
                result.image[placed] = pixels[inner][mask[inner]]
                result.masks = [*rest, placed]
                result.labels.append(int(labels[index]))
                full_areas.append(int(mask.sum()))
                break
    return result


def encode_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Writes a mask as COCO's uncompressed run lengths: by columns, beginning with the pixels outside.

    Args:
        mask: (H, W) bool.

    Returns:
        `{'counts': [...], 'size': [H, W]}`.
    """
    flat = np.concatenate([[False], mask.ravel(order='F')])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {'counts': counts.tolist(), 'size': list(mask.shape)}


def _decode_rle(segmentation: dict[str, list[int]]) -> np.ndarray:
    """The mask of run lengths as (H, W) uint8, 255 inside."""
    values = np.where(np.arange(len(segmentation['counts'])) % 2, 255, 0).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(values, segmentation['counts']).reshape(segmentation['size'], order='F'))


def _annotations(composition: Composition, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """COCO annotations of one image; boxes are tight around the visible pixels."""
    found = []
    for number, (mask, label) in enumerate(zip(composition.masks, composition.labels)):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
        found.append({'id': first_id + number, 'image_id': image_id, 'category_id': label + 1,
                      'bbox': [int(value) for value in box], 'area': int(mask.sum()), 'iscrowd': 0,
                      'segmentation': encode_rle(mask)})
    return found


def _readme(counts: dict[str, int], options: ComposeOptions, photographs: dict[str, Photographs], form: str) -> str:
    layouts = {
        'coco': 'train/*.jpg, val/*.jpg and annotations/instances_{train,val}.json in the format of COCO. Boxes are '
                'tight around\nthe visible pixels, masks are uncompressed run lengths; categories 1..10 are the '
                'classes below.',
        'ade': 'images/{training,validation}/*.jpg and annotations/{training,validation}/*.png as in ADE20K. A label '
               "file holds\nclass indices: 0 is 'background' (the photograph), 1..10 are the classes below. Train with "
               'reduce_zero_label=False and\n11 classes; with reduce_zero_label=True the background is ignored and 10 '
               'classes remain.',
    }
    lines = [
        f'Composed data in the layout of {"COCO" if form == "coco" else "ADE20K"}', '',
        f'These images are {ORIGIN}.', 'Numbers measured on them say that a program learns, and nothing about COCO or '
        'ADE20K.', '', f'Layout: {layouts[form]}', '',
        f'Classes: {", ".join(FASHION_CLASSES)}', f'Images: {counts["train"]} for training, {counts["val"]} for '
        f'validation, {options.size} x {options.size} pixels', f'Options: {options}', '',
        'Garments: Fashion-MNIST, Copyright (c) 2017 Zalando SE, MIT licence; training images hold garments of its '
        'training split,', 'validation images of its test split. Both splits have their own photographs:',
    ]
    for split, title in (('train', 'training'), ('val', 'validation')):
        lines += [f'  {title}: {credit}' for credit in photographs[split].credits]
    return '\n'.join(lines) + '\n'


def draw_sheet(folder: str | Path, split: str = 'train', count: int = 12, columns: int = 4) -> Image.Image:
    """Draws the first images of a composed data set in COCO's layout, each with its boxes, masks and classes beside it.

    Args:
        folder: The folder `composed-coco`.
        split: 'train' or 'val'.
        count: How many images.
        columns: How many of them in a row.

    Returns:
        The sheet, twice enlarged.
    """
    content = json.loads(Path(folder, 'annotations', f'instances_{split}.json').read_text(encoding='utf-8'))
    tiles = []
    for entry in content['images'][:count]:
        with Image.open(Path(folder, split, entry['file_name'])) as file:
            image = file.convert('RGB').resize((2 * entry['width'], 2 * entry['height']), Image.Resampling.NEAREST)
        drawn = image
        found = [annotation for annotation in content['annotations'] if annotation['image_id'] == entry['id']]
        for annotation in found:
            colour = COLOURS[annotation['category_id'] - 1]
            mask = Image.fromarray(_decode_rle(annotation['segmentation'])).resize(image.size)
            drawn = Image.composite(Image.blend(image, Image.new('RGB', image.size, colour), 0.5), drawn, mask)
        draw = ImageDraw.Draw(drawn)
        for annotation in found:
            colour = COLOURS[annotation['category_id'] - 1]
            x, y, w, h = (2 * value for value in annotation['bbox'])
            draw.rectangle((x, y, x + w - 1, y + h - 1), outline=colour)
            draw.text((x + 2, y), FASHION_CLASSES[annotation['category_id'] - 1], 'white', stroke_width=1,
                      stroke_fill='black')
        tiles += [image, drawn]
    width, height = tiles[0].size
    rows = -(-len(tiles) // (2 * columns))
    sheet = Image.new('RGB', (2 * columns * width, rows * height), 'white')
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % (2 * columns) * width, number // (2 * columns) * height))
    return sheet


def _write_split(
        folders: dict[str, Path],
        split: str,
        count: int,
        photographs: Photographs,
        options: ComposeOptions,
        progress: Callable[[Iterable[int]], Iterable[int]],
) -> None:
    source, ade_name = SPLITS[split]
    pictures, labels = embedded_fashion_mnist('train' if source == 'train' else 'test')
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    places = {'coco': split, 'ade': f'images/{ade_name}'}
    for form, folder in folders.items():
        (folder / places[form]).mkdir(parents=True)
        (folder / 'annotations' / ('' if form == 'coco' else ade_name)).mkdir(parents=True, exist_ok=True)
    for number in progress(range(count)):
        # a generator an image: the first images stay the same when more are asked for
        rng = np.random.default_rng([options.seed, list(SPLITS).index(split), number])
        composition = compose(rng, pictures, labels, photographs.crop(rng, options.size), options)
        name = f'{split}_{number + 1:06d}'
        for form, folder in folders.items():
            Image.fromarray(composition.image).save(folder / places[form] / f'{name}.jpg', quality=options.quality,
                                                    subsampling=0)
        if 'ade' in folders:
            Image.fromarray(composition.class_map()).save(folders['ade'] / 'annotations' / ade_name / f'{name}.png')
        images.append({'id': number + 1, 'file_name': f'{name}.jpg', 'width': options.size, 'height': options.size,
                       'license': 1})
        annotations += _annotations(composition, number + 1, len(annotations) + 1)
    if 'coco' in folders:
        content = {
            'info': {'description': ORIGIN, 'version': '1', 'options': str(options)},
            'licenses': [{'id': 1, 'name': 'garments: MIT (Fashion-MNIST); photographs: see README.txt', 'url': ''}],
            'images': images, 'annotations': annotations,
            'categories': [{'id': index + 1, 'name': name, 'supercategory': 'garment'}
                           for index, name in enumerate(FASHION_CLASSES)],
        }
        target = folders['coco'] / 'annotations' / f'instances_{split}.json'
        target.write_text(json.dumps(content) + '\n', encoding='utf-8')


def make_composed_data(
        output: str | Path,
        photographs: dict[str, Photographs],
        counts: dict[str, int],
        options: ComposeOptions,
        formats: Sequence[str] = FORMATS,
        force: bool = False,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Path]:
    """Writes the data sets `composed-coco` and `composed-ade`, with the same images, into a folder.

    A folder gets its name only when all of it is written.

    Args:
        output: Folder that the data sets' folders are made in.
        photographs: Backgrounds for 'train' and for 'val'.
        counts: Number of images for 'train' and for 'val'.
        options: How images are composed.
        formats: Which of 'coco' and 'ade' to write.
        force: Replace data sets that this function made before.
        progress: Wraps the loop over the images of a split, for a progress bar.

    Returns:
        The folder of every format.
    """
    for split in SPLITS:
        if counts[split] < 1:
            raise ValueError(f'{counts[split]} images for {split}: at least 1 is needed')
    targets = {form: Path(output) / f'composed-{form}' for form in formats}
    for target in targets.values():
        make_room(target, force)
    Path(output).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.composed-', dir=output) as temporary:
        folders = {form: Path(temporary) / form for form in targets}
        for split in SPLITS:
            _write_split(folders, split, counts[split], photographs[split], options, progress)
        for form, folder in folders.items():
            (folder / 'README.txt').write_text(_readme(counts, options, photographs, form), encoding='utf-8')
            replace_folder(folder, targets[form])
    return targets
