"""Images with binary masks, as the data sets of skin lesions have them: folders, and transforms around a soft mask.

Between the transforms a mask is a float32 map `gt_seg_map` in 0..1, because resizing gives it soft edges, which the
losses of the official training see. Packed, `gt_sem_seg` holds labels 0 and 1 and `gt_soft_seg` the soft mask.
"""
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.structures import PixelData
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import PackSegInputs
from PIL import Image, ImageOps

from ...registry import DATASETS, TRANSFORMS
from ...segmentation.preprocessing import resize_map, stretch_intensity
from ...utils.suggest import check_choice
from ..data import READ_ERRORS, convert_mode

__all__ = ['ISICDataset', 'LoadBinaryMask', 'LoadMedicalImage', 'MedicalResize', 'MedicalRotate', 'PackMedicalInputs',
           'StretchIntensity']

EXTENSIONS = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff')
MASK_ENDING = '_segmentation'
# superpixels lie beside the images of ISIC 2017
NO_IMAGE_ENDING = '_superpixels'
ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # orientations that exchange height and width


def _list_files(folder: str) -> list[Path]:
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f'the data folder {folder} does not exist; expected ROOT/train/images, '
                                'ROOT/train/masks, ROOT/val/images and ROOT/val/masks. Set data_root in the config')
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS
                   and not file.stem.endswith(NO_IMAGE_ENDING))
    if not files:
        raise FileNotFoundError(f'the data folder {folder} has no images: looked for {", ".join(EXTENSIONS)}')
    return files


def _by_stem(files: Sequence[Path], ending: str = '') -> dict[str, Path]:
    """Files by the name that image and mask share; two files of one name are refused."""
    named: dict[str, Path] = {}
    for file in files:
        other = named.setdefault(file.stem.removesuffix(ending), file)
        if other is not file:
            raise ValueError(f'{other} and {file} have the same name; remove one of them')
    return named


def _names(files: Sequence[Path]) -> str:
    return ', '.join(str(file) for file in files[:5]) + (' ...' if len(files) > 5 else '')


def _pair_by_name(images: Sequence[Path], masks: Sequence[Path]) -> list[tuple[Path, Path]]:
    images_of, masks_of = _by_stem(images), _by_stem(masks, MASK_ENDING)
    alone = [file for name, file in images_of.items() if name not in masks_of]
    orphans = [file for name, file in masks_of.items() if name not in images_of]
    if alone or orphans:
        parts = [f'{len(files)} {what}: {_names(files)}' for files, what in (
            (alone, 'images without a mask'), (orphans, 'masks without an image')) if files]
        raise ValueError('; '.join(parts) + f'. A mask has the name of its image, with or without {MASK_ENDING!r}; '
                         "pairing='order' pairs other names in sorted order")
    return [(file, masks_of[name]) for name, file in images_of.items()]


def _pair_in_order(images: Sequence[Path], masks: Sequence[Path]) -> list[tuple[Path, Path]]:
    if len(images) != len(masks):
        raise ValueError(f"pairing='order' needs as many masks as images: {images[0].parent} has {len(images)} and "
                         f'{masks[0].parent} {len(masks)}')
    return list(zip(images, masks, strict=True))


def _orientation(image: Image.Image) -> int:
    # Pillow decodes a whole PNG in search of what its head does not announce
    if image.format == 'PNG' and 'exif' not in image.info:
        return 1
    return image.getexif().get(ORIENTATION, 1)


def _problem(image_path: Path, mask_path: Path) -> str | None:
    """What the heads of two files say against their being a pair."""
    sizes = []
    for path in (image_path, mask_path):
        try:
            with Image.open(path) as image:
                sizes.append({image.size, image.size[::-1] if _orientation(image) in TURNED else image.size})
        except READ_ERRORS as error:
            return f'{path}: not a readable image ({error})'
    if not sizes[0] & sizes[1]:
        (width, height), (mask_width, mask_height) = min(sizes[0]), min(sizes[1])
        return f'{image_path} has {width}x{height} pixels and its mask {mask_path} {mask_width}x{mask_height}'
    return None


@DATASETS.register_module()
class ISICDataset(BaseSegDataset):
    """Images and binary masks in two folders, such as the lesions of ISIC 2017 and 2018.

    The layout is `ROOT/{train,val}/{images,masks}`; each mask has the name of its image, or that with `_segmentation`
    behind it. All that the names and the heads of the files show to be wrong is reported before training starts.

    Args:
        pairing: 'name', or 'order', which pairs the sorted names as the official code does.
        check_files: Read the head of each file at the start and refuse pairs of different sizes.
        **kwargs: Arguments of MMSegmentation's `BaseSegDataset`: `data_root`, `data_prefix` with `img_path` and
            `seg_map_path` (left out where there are no masks), `pipeline`, `metainfo`, `test_mode`, ...
    """

    METAINFO = {'classes': ('background', 'lesion'), 'palette': [[0, 0, 0], [220, 60, 40]]}

    def __init__(self, pairing: str = 'name', check_files: bool = True, **kwargs: Any) -> None:
        check_choice('pairing', pairing, ('name', 'order'))
        self.pairing = pairing
        self.check_files = check_files
        super().__init__(**kwargs)

    @classmethod
    def get_label_map(cls, new_classes: Sequence[str] | None = None) -> None:
        """Return no renumbering: other names mean another foreground."""

    def load_data_list(self) -> list[dict]:
        """Pair the files.

        Returns:
            One `dict(img_path, seg_map_path, label_map, reduce_zero_label, seg_fields)` an image.
        """
        images = _list_files(self.data_prefix['img_path'])
        common: dict[str, Any] = {'label_map': None, 'reduce_zero_label': False}
        if not self.data_prefix.get('seg_map_path'):
            return [{'img_path': str(file), 'seg_fields': [], **common} for file in images]
        masks = _list_files(self.data_prefix['seg_map_path'])
        pairs = (_pair_by_name if self.pairing == 'name' else _pair_in_order)(images, masks)
        problems = [text for text in (_problem(*pair) for pair in pairs) if text] if self.check_files else []
        if problems:
            raise ValueError(f'{len(problems)} of {len(pairs)} pairs cannot be used: ' + '; '.join(problems[:5])
                             + (' ...' if len(problems) > 5 else ''))
        return [{'img_path': str(image), 'seg_map_path': str(mask), 'seg_fields': [], **common}
                for image, mask in pairs]


def _read(path: str, mode: str | None) -> Image.Image:
    """Decode a file, in its own mode if none is given, or say which one cannot be."""
    try:
        with Image.open(path) as image:
            return image.copy() if mode is None else convert_mode(image, mode)
    except READ_ERRORS as error:
        raise OSError(f'{path}: not a readable image ({type(error).__name__}: {error})') from error


@TRANSFORMS.register_module()
class LoadMedicalImage(BaseTransform):
    """Read an image of any mode as three channels in the order BGR, as MMSegmentation's own loaders give them.

    Gray images are repeated, transparency is dropped, 16 bits are scaled to 8. A pipeline that starts from an array
    (`img`) passes through.

    Args:
        exif: What becomes of a photograph that the camera stored turned: 'match' turns it where only the turned one has
            the size of the mask, leaves it where only the stored one does, and refuses it where both do; 'apply' and
            'ignore', which is the official behaviour, do not look at the mask. Without a mask, 'match' is 'apply'.
    """

    def __init__(self, exif: str = 'match') -> None:
        check_choice('exif', exif, ('match', 'apply', 'ignore'))
        self.exif = exif

    def transform(self, results: dict) -> dict:
        """Read the image.

        Args:
            results: `img_path`, and `seg_map_path` where there is a mask.

        Returns:
            The same with `img` (H, W, 3) uint8, `img_shape` and `ori_shape`.
        """
        if 'img' not in results:
            results['img'] = self._load(results['img_path'], results.get('seg_map_path'))
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        results.setdefault('seg_fields', [])
        return results

    def _load(self, path: str, mask_path: str | None) -> np.ndarray:
        image = _read(path, 'RGB')
        if self.exif != 'ignore':
            with Image.open(path) as file:
                orientation = _orientation(file)
            if 1 < orientation <= max(TURNED) and self._turns(path, mask_path, image.size, orientation):
                image.getexif()[ORIENTATION] = orientation
                image = ImageOps.exif_transpose(image)
        return np.ascontiguousarray(np.asarray(image)[..., ::-1])

    def _turns(self, path: str, mask_path: str | None, size: tuple[int, int], orientation: int) -> bool:
        if self.exif == 'apply' or mask_path is None:
            return True
        with Image.open(mask_path) as mask:
            stored, turned = mask.size == size, mask.size == (size[::-1] if orientation in TURNED else size)
        if stored and turned:
            raise ValueError(f'{path} is stored turned (EXIF orientation {orientation}) and its mask {mask_path} fits '
                             "both ways; set exif='apply' or exif='ignore' in LoadMedicalImage, or store the image "
                             'upright')
        return turned


@TRANSFORMS.register_module()
class LoadBinaryMask(BaseTransform):
    """Read a mask of 0 and 255, or of 0 and 1, as a float map in 0..1; without a mask nothing happens.

    Behind the resizing of the image, as in test pipelines, it keeps the size of the file.

    Args:
        soft: Take the values between for soft edges, out of 255, instead of refusing them.
        labels: Numbers of the classes that make the foreground, where the file is a map of several classes.
    """

    def __init__(self, soft: bool = False, labels: Sequence[int] | None = None) -> None:
        if soft and labels is not None:
            raise ValueError('soft=True is for masks with soft edges, and labels for maps of classes; give one of them')
        self.soft = soft
        self.labels = None if labels is None else list(labels)

    def transform(self, results: dict) -> dict:
        """Read the mask.

        Args:
            results: `seg_map_path`, `ori_shape`.

        Returns:
            The same with `gt_seg_map` (H, W) float32.
        """
        path = results.get('seg_map_path')
        if path is None:
            return results
        # the numbers of a map with a palette are its classes, and its colours are not
        mask = np.asarray(_read(path, 'L' if self.labels is None else None))
        if mask.shape != tuple(results['ori_shape'][:2]):
            raise ValueError(f'{results.get("img_path", "the image")} has {results["ori_shape"][:2]} pixels (height, '
                             f'width) and its mask {path} {mask.shape}')
        results['gt_seg_map'] = self._foreground(mask, path)
        results['seg_fields'].append('gt_seg_map')
        return results

    def _foreground(self, mask: np.ndarray, path: str) -> np.ndarray:
        if self.labels is not None:
            return np.isin(mask, self.labels).astype(np.float32)
        values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
        top = 1 if values.max() <= 1 else 255
        if not self.soft and set(values) - {0, top}:
            raise ValueError(f'the mask {path} has the values {", ".join(map(str, values[:6]))}'
                             f'{" ..." if len(values) > 6 else ""}; a binary mask has 0 and 255, or 0 and 1. With '
                             'soft=True LoadBinaryMask takes them for soft edges, with labels=[...] for classes')
        return mask.astype(np.float32) / top


@TRANSFORMS.register_module()
class StretchIntensity(BaseTransform):
    """Stretch the image to 0..255 between its own darkest and brightest value."""

    def transform(self, results: dict) -> dict:
        """Stretch.

        Args:
            results: `img` (H, W, C).

        Returns:
            The same with `img` in float32.
        """
        results['img'] = stretch_intensity(torch.from_numpy(results['img'])).numpy()
        return results


@TRANSFORMS.register_module()
class MedicalRotate(BaseTransform):
    """Rotate image and mask around the centre, to the nearest pixel, and fill with zeros.

    Args:
        prob: Share of the images that are rotated.
        degrees: Range of the angle. The official one is not known here.
        per_run: Draw one angle for the whole run, which the official code does by mistake, rather than one an image.
    """

    def __init__(self, prob: float = 0.5, degrees: tuple[float, float] = (0., 360.), per_run: bool = False) -> None:
        if not 0 <= prob <= 1 or degrees[0] > degrees[1]:
            raise ValueError(f'prob={prob} and degrees={degrees}: give a share in 0..1 and an ascending range')
        self.prob = prob
        self.degrees = degrees
        self.angle = self._draw() if per_run else None

    def _draw(self) -> float:
        # the generators that the runner and the loaders seed are the global ones
        return np.random.uniform(*self.degrees)  # noqa: NPY002

    def transform(self, results: dict) -> dict:
        """Rotate.

        Args:
            results: `img` (H, W, C) and the maps of `seg_fields`.

        Returns:
            The same, rotated or not.
        """
        if np.random.rand() >= self.prob:  # noqa: NPY002
            return results
        angle = self._draw() if self.angle is None else self.angle
        for key in ('img', *results.get('seg_fields', ())):
            results[key] = mmcv.imrotate(results[key], angle, border_value=0, interpolation='nearest')
        return results


@TRANSFORMS.register_module()
class MedicalResize(BaseTransform):
    """Resize to one size, whatever the shape: bilinearly without antialiasing, integer labels to the nearest.

    Args:
        size: Height and width, or both in one number.
    """

    def __init__(self, size: int | Sequence[int] = 256) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f'size={size}: give one number, or height and width, of 1 or more')

    def transform(self, results: dict) -> dict:
        """Resize.

        Args:
            results: `img` (H, W, C) and the maps of `seg_fields`.

        Returns:
            The same with the new size, `img_shape` and `scale_factor`.
        """
        height, width = results['img'].shape[:2]
        image = torch.from_numpy(np.ascontiguousarray(results['img'])).permute(2, 0, 1).float()
        results['img'] = resize_map(image, self.size).permute(1, 2, 0).contiguous().numpy()
        for key in results.get('seg_fields', ()):
            results[key] = self._resize_labels(results[key])
        results['img_shape'] = self.size
        results['scale_factor'] = (self.size[1] / width, self.size[0] / height)
        results['keep_ratio'] = math.isclose(*results['scale_factor'])
        return results

    def _resize_labels(self, labels: np.ndarray) -> np.ndarray:
        if not np.issubdtype(labels.dtype, np.floating):
            return mmcv.imresize(labels, self.size[::-1], interpolation='nearest')
        return resize_map(torch.from_numpy(np.ascontiguousarray(labels))[None], self.size)[0].numpy()


@TRANSFORMS.register_module()
class PackMedicalInputs(PackSegInputs):
    """MMSegmentation's packing, which also keeps a soft mask.

    Args:
        meta_keys: As MMSegmentation's.
    """

    def transform(self, results: dict) -> dict:
        """Pack.

        Args:
            results: `img` and, where there is a mask, `gt_seg_map`.

        Returns:
            `inputs` (C, H, W) and `data_samples`, with `gt_sem_seg` (1, H, W) int64 and, of a soft mask, `gt_soft_seg`
            (1, H, W) float32.
        """
        soft = results.get('gt_seg_map')
        if soft is None or not np.issubdtype(soft.dtype, np.floating):
            return super().transform(results)
        packed = super().transform({**results, 'gt_seg_map': soft >= 0.5})
        data = torch.from_numpy(np.ascontiguousarray(soft))[None]
        packed['data_samples'].set_data({'gt_soft_seg': PixelData(data=data)})
        return packed
