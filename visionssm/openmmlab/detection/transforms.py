"""Images and boxes as Mamba-YOLO sees them: letterbox, centred affine, HSV gains, mosaic, rectangular batches.

MMDetection's ``Mosaic``, ``MixUp`` and ``RandomFlip`` do the official thing and are used as they are. Its
``RandomAffine`` scales around the corner and its ``YOLOXHSVRandomAug`` adds to the channels, so these are our own.
Boxes are kept, masks are refused.
"""
import math
from collections.abc import Sequence
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.datasets import MultiImageMixDataset
from mmdet.registry import DATASETS as DET_DATASETS
from mmengine.dataset import BaseDataset
from mmengine.dist import get_world_size
from torch.utils.data import Dataset

from ...detection.preprocessing import letterbox_geometry
from ...registry import DATASETS, TRANSFORMS

__all__ = ['Letterbox', 'MixDataset', 'RandomHSV', 'RandomScaleShift', 'RectangularDataset', 'ResizeLongSide',
           'to_original']

# transforms that need further images
MIXING = ('Mosaic', 'MixUp', 'CachedMosaic', 'CachedMixUp')


def _refuse_masks(results: dict, name: str) -> None:
    if 'gt_masks' in results:
        raise ValueError(f'{name} moves boxes and no masks: load the annotations of {results.get("img_path")} with '
                         'dict(type="LoadAnnotations", with_bbox=True, with_mask=False)')


def _resize(results: dict, width: int, height: int) -> None:
    """Resize image and boxes, and note how the original image became this one."""
    h, w = results['img'].shape[:2]
    if (w, h) != (width, height):
        results['img'] = mmcv.imresize(results['img'], (width, height), interpolation='bilinear')
    scale, before = (width / w, height / h), results.get('scale_factor', (1.0, 1.0))
    results['img_shape'] = (height, width)
    results['scale_factor'] = (before[0] * scale[0], before[1] * scale[1])
    if 'gt_bboxes' in results:
        results['gt_bboxes'].rescale_(scale)


@TRANSFORMS.register_module()
class ResizeLongSide(BaseTransform):
    """Resize an image so that its long side has a given length, and none is lost altogether.

    Args:
        size: The long side in pixels.
    """

    def __init__(self, size: int = 640) -> None:
        self.size = size

    def transform(self, results: dict) -> dict:
        """Resize ``img`` and ``gt_bboxes``.

        Args:
            results: The sample.

        Returns:
            The sample.
        """
        _refuse_masks(results, 'ResizeLongSide')
        h, w = results['img'].shape[:2]
        ratio = self.size / max(h, w)
        _resize(results, *(min(math.ceil(side * ratio), self.size) for side in (w, h)))
        return results


@TRANSFORMS.register_module()
class Letterbox(BaseTransform):
    """Fit an image into a rectangle: resize with one ratio, and pad on both sides.

    A sample of :class:`RectangularDataset` brings its own rectangle. ``pad_param`` records the pads (top, bottom,
    left, right), which together with ``scale_factor`` lead back to the original image.

    Args:
        size: (height, width) of the rectangle, or the side of a square.
        scale_up: Whether small images grow.
        minimal: Whether to pad to the next multiple of ``stride`` only, rather than to the whole rectangle.
        stretch: Whether to fill the rectangle without regard to the proportions.
        stride: Largest stride of the model.
        pad_value: Grey level of the pads.
    """

    def __init__(
            self,
            size: int | tuple[int, int] = 640,
            scale_up: bool = True,
            minimal: bool = False,
            stretch: bool = False,
            stride: int = 32,
            pad_value: int = 114,
    ) -> None:
        if not isinstance(size, int) and len(size) != 2:
            raise ValueError(f'size must be (height, width) or the side of a square, got {size}')
        self.size = size
        self.scale_up = scale_up
        self.minimal = minimal
        self.stretch = stretch
        self.stride = stride
        self.pad_value = pad_value

    def transform(self, results: dict) -> dict:
        """Resize and pad ``img``, and move ``gt_bboxes`` with it.

        Args:
            results: The sample; ``batch_shape`` (height, width) in it takes the place of ``size``.

        Returns:
            The sample, with ``pad_param``.
        """
        _refuse_masks(results, 'Letterbox')
        shape = results.get('batch_shape')
        height, width = results['img'].shape[:2]
        geometry = letterbox_geometry(height, width, self.size if shape is None else shape, self.stride,
                                      self.minimal and shape is None, self.stretch, self.scale_up)
        _resize(results, *reversed(geometry.resized))
        left, top, right, bottom = geometry.pads
        pads = (top, bottom, left, right)
        results['img'] = cv2.copyMakeBorder(results['img'], *pads, cv2.BORDER_CONSTANT, value=(self.pad_value,) * 3)
        results['img_shape'] = results['img'].shape[:2]
        results['pad_param'] = pads
        if 'gt_bboxes' in results:
            results['gt_bboxes'].translate_((left, top))
        return results


def to_original(boxes: torch.Tensor, meta: dict) -> torch.Tensor:
    """Move boxes of a resized and padded image back to the original one, and clip them to it.

    Args:
        boxes: (n, 4), pixels.
        meta: ``ori_shape`` (height, width), and where they apply ``pad_param`` (top, bottom, left, right) and
            ``scale_factor`` (along x, along y).

    Returns:
        Boxes (n, 4) in pixels of the original image.
    """
    top, _, left, _ = meta.get('pad_param', (0, 0, 0, 0))
    scale = boxes.new_tensor(meta.get('scale_factor', (1.0, 1.0))).repeat(2)
    boxes = (boxes - boxes.new_tensor([left, top, left, top])) / scale
    height, width = meta['ori_shape'][:2]
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


@TRANSFORMS.register_module()
class RandomScaleShift(BaseTransform):
    """Scale an image around its centre, shift it, and crop or pad it to a given size.

    A mosaic of twice the size comes out as its middle, a smaller image as a letterboxed one.

    Args:
        size: Side of the result.
        scale: The image grows by a factor of 1 - scale to 1 + scale.
        shift: Largest shift along each axis, as a share of ``size``.
        pad_value: Grey level outside of the image.
        min_size: Boxes whose width or height is not above this many pixels go.
        min_area: Boxes of which not more than this share is left in the picture go.
        max_aspect: Boxes that are this many times longer than wide go.
    """

    def __init__(
            self,
            size: int = 640,
            scale: float = 0.5,
            shift: float = 0.1,
            pad_value: int = 114,
            min_size: float = 2.0,
            min_area: float = 0.1,
            max_aspect: float = 100.0,
    ) -> None:
        if not 0 <= scale < 1:
            raise ValueError(f'scale must be in [0, 1), so that the image keeps a size, got {scale}')
        self.size = size
        self.scale = scale
        self.shift = shift
        self.pad_value = pad_value
        self.min_size = min_size
        self.min_area = min_area
        self.max_aspect = max_aspect

    def transform(self, results: dict) -> dict:
        """Scale, shift and crop ``img`` and ``gt_bboxes``.

        Args:
            results: The sample.

        Returns:
            The sample.
        """
        _refuse_masks(results, 'RandomScaleShift')
        h, w = results['img'].shape[:2]
        # the one generator that datasets seed, as in MMDetection's transforms
        factor = np.random.uniform(1 - self.scale, 1 + self.scale)  # noqa: NPY002
        centre = self.size * np.random.uniform(0.5 - self.shift, 0.5 + self.shift, 2)  # noqa: NPY002
        offset = centre - factor * np.array([w, h]) / 2
        # boxes count from the corner of the first pixel, OpenCV from its centre
        pixel_offset = offset + (factor - 1) / 2
        results['img'] = cv2.warpAffine(
            results['img'], np.array([[factor, 0, pixel_offset[0]], [0, factor, pixel_offset[1]]]),
            dsize=(self.size, self.size), borderValue=(self.pad_value,) * 3)
        results['img_shape'] = (self.size, self.size)
        if 'gt_bboxes' in results:
            self._move_boxes(results, float(factor), offset.tolist())
        return results

    def _move_boxes(self, results: dict, factor: float, offset: Sequence[float]) -> None:
        boxes = results['gt_bboxes']
        boxes.rescale_((factor, factor))
        boxes.translate_(offset)
        whole = boxes.areas
        boxes.clip_((self.size, self.size))
        width, height = boxes.widths, boxes.heights
        aspect = torch.maximum(width / height.clamp(min=1e-9), height / width.clamp(min=1e-9))
        keep = ((width > self.min_size) & (height > self.min_size) & (aspect < self.max_aspect)
                & (width * height > self.min_area * whole))
        results['gt_bboxes'] = boxes[keep]
        for key in ('gt_bboxes_labels', 'gt_ignore_flags'):
            if key in results:
                results[key] = results[key][keep.numpy()]


@TRANSFORMS.register_module()
class RandomHSV(BaseTransform):
    """Multiply hue, saturation and value of an 8-bit BGR image by random gains around 1.

    Args:
        hue: Largest change of the hue's gain.
        saturation: Largest change of the saturation's gain.
        value: Largest change of the value's gain.
    """

    def __init__(self, hue: float = 0.015, saturation: float = 0.7, value: float = 0.4) -> None:
        self.limits = np.array([hue, saturation, value])

    def transform(self, results: dict) -> dict:
        """Change the colours of ``img``.

        Args:
            results: The sample.

        Returns:
            The sample.
        """
        gains = 1 + np.random.uniform(-1, 1, 3) * self.limits  # noqa: NPY002
        levels = np.arange(256)[:, None] * gains
        levels[:, 0] %= 180
        tables = levels.clip(0, 255).astype(np.uint8)
        hsv = cv2.cvtColor(results['img'], cv2.COLOR_BGR2HSV)
        results['img'] = cv2.cvtColor(cv2.LUT(hsv, tables[None]), cv2.COLOR_HSV2BGR)
        return results


@DATASETS.register_module()
class MixDataset(MultiImageMixDataset):
    """MMDetection's data set for mosaic and mixup, which can stop mixing at any time, also in running workers.

    The partners of an image come from the whole data set. (The authors draw them from the last 1,000 images, or 8
    batches, that a worker has read; what these are would depend on the workers and on every resume.)

    Args:
        **kwargs: As MMDetection's: ``dataset`` and ``pipeline``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # in shared memory, so that workers which live for several epochs see the change
        self._closed = torch.zeros((), dtype=torch.bool).share_memory_()

    def close_mosaic(self, closed: bool = True) -> None:
        """Leave out, or take in again, the transforms that mix several images.

        Args:
            closed: Whether they are left out.
        """
        self._closed.fill_(closed)

    def __getitem__(self, index: int) -> dict:
        closed = bool(self._closed)
        self.update_skip_type_keys([name for name in self.pipeline_types if closed and name.split('.')[-1] in MIXING])
        return super().__getitem__(index)


@DATASETS.register_module()
class RectangularDataset(Dataset):
    """Images in the order of their proportions, each with the rectangle that its whole batch is padded to.

    The rectangle is ``ceil(shape * size / stride + pad) * stride`` where ``shape`` has a long side of 1 and holds the
    images of the batch. It reaches :class:`Letterbox` as ``batch_shape``. The sampler must not shuffle. Several
    processes deal the images one by one, and their batches of one step have the same rectangle.

    Args:
        dataset: Config of a data set that knows ``height`` and ``width`` of its images.
        batch_size: Images a batch, as the loader has it; with another number batches are padded further.
        size: Long side of the resized images.
        stride: Largest stride of the model.
        pad: Share of a stride that is added.
    """

    def __init__(
            self,
            dataset: dict | BaseDataset,
            batch_size: int,
            size: int = 640,
            stride: int = 32,
            pad: float = 0.5,
    ) -> None:
        self.dataset = DET_DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.batch_size = batch_size
        self.size = size
        self.stride = stride
        self.pad = pad
        self.full_init()

    def full_init(self) -> None:
        """Read the sizes of the images, and give each batch its rectangle."""
        self.dataset.full_init()
        infos = (self.dataset.get_data_info(index) for index in range(len(self.dataset)))
        aspects = np.array([info['height'] / info['width'] for info in infos])
        self.order = np.argsort(aspects, kind='stable')
        self.shapes = []
        group = self.batch_size * get_world_size()
        for start in range(0, len(aspects), group):
            flattest, tallest = aspects[self.order[start:start + group]][[0, -1]]
            shape = (tallest, 1.0) if tallest < 1 else (1.0, 1 / flattest) if flattest > 1 else (1.0, 1.0)
            rectangle = tuple(math.ceil(side * self.size / self.stride + self.pad) * self.stride for side in shape)
            self.shapes += [rectangle] * min(group, len(aspects) - start)

    @property
    def metainfo(self) -> dict:
        """What the wrapped data set says about itself: its classes."""
        return self.dataset.metainfo

    def get_data_info(self, index: int) -> dict:
        """Annotations of one image.

        Args:
            index: Its place in the order of the proportions.

        Returns:
            The annotations, with ``batch_shape`` (height, width).
        """
        return {**self.dataset.get_data_info(int(self.order[index])), 'batch_shape': self.shapes[index]}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset.pipeline(self.get_data_info(index))
