"""Folders of images and label maps, checked: what would train or evaluate something else than was meant is named.

MMSegmentation's data sets find a missing label file only when they come to it, cut labels to 8 bits, and let pass what
is no class, which its IoU then leaves out without a word. Those here read the same layouts and options.
"""
import io
import logging
import os
from collections import Counter
from typing import Any, Literal

import numpy as np
from mmengine import fileio
from mmseg.datasets import ADE20KDataset as _ADE20KDataset
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from ...registry import DATASETS, TRANSFORMS
from ...utils.suggest import check_choice
from ..data import READ_ERRORS

__all__ = ['ADE20KDataset', 'LoadSegAnnotations', 'SegDataset']

logger = logging.getLogger('visionssm')

Sample = dict[str, Any]
# one value a pixel; what has more channels is a picture of the labels
INDEX_MODES = ('L', 'P', '1', 'I', 'I;16', 'I;16B', 'I;16L')


@DATASETS.register_module()
class SegDataset(BaseSegDataset):
    """MMSegmentation's BaseSegDataset with its files checked; for any folders, with `classes` in `metainfo`.

    Args:
        missing: What to do about images without a label map: 'error', or 'skip' with a warning.
        **kwargs: As MMSegmentation's.
    """

    def __init__(self, missing: Literal['error', 'skip'] = 'error', **kwargs: Any) -> None:
        check_choice('missing', missing, ('error', 'skip'))
        classes = (kwargs.get('metainfo') or {}).get('classes')
        if isinstance(classes, str):
            raise ValueError(f"metainfo['classes'] is the text {classes!r}: give a tuple of names, one as ('name',)")
        self.missing = missing
        super().__init__(**kwargs)

    def load_data_list(self) -> list[Sample]:
        """Lists the images and their label maps, all of which exist."""
        folder, labels = self.data_prefix.get('img_path'), self.data_prefix.get('seg_map_path')
        if self.backend_args is not None or '://' in (folder or ''):
            return self._with_classes(super().load_data_list())
        for name, path in (('img_path', folder), ('seg_map_path', labels)):
            if path and not os.path.isdir(path):
                raise FileNotFoundError(f'the folder {path} does not exist: check data_root={self.data_root!r} and '
                                        f'data_prefix[{name!r}]')
        if self.ann_file and not os.path.isfile(self.ann_file):
            raise FileNotFoundError(f'the list of images {self.ann_file} does not exist')
        samples = super().load_data_list()
        if not samples:
            where = self.ann_file or folder
            raise ValueError(f'no images in {where}: looked for {self.img_suffix}{_other_suffixes(folder)}')
        for key, what in (('img_path', 'images'), ('seg_map_path', 'label maps')):
            samples = self._existing(samples, key, what)
        return self._with_classes(samples)

    def _existing(self, samples: list[Sample], key: str, what: str) -> list[Sample]:
        kept = [sample for sample in samples if not sample.get(key) or os.path.isfile(sample[key])]
        lost = [sample[key] for sample in samples if sample.get(key) and not os.path.isfile(sample[key])]
        if not lost:
            return samples
        named = ', '.join(lost[:3]) + (' ...' if len(lost) > 3 else '')
        message = f'{len(lost)} of the {len(samples)} {what} do not exist: {named}'
        if self.missing == 'error' or not kept:
            raise FileNotFoundError(f"{message}. Complete them, check seg_map_suffix={self.seg_map_suffix!r}, or give "
                                    "missing='skip' to go on without these images")
        logger.warning('%s; the images are left out', message)
        return kept

    def _with_classes(self, samples: list[Sample]) -> list[Sample]:
        # LoadSegAnnotations checks the labels in the files, which number all classes that the data set has
        classes = self.METAINFO.get('classes') if self.label_map is not None else self._metainfo.get('classes')
        for sample in samples:
            sample['label_count'] = len(classes) if classes else None
        return samples


def _other_suffixes(folder: str | None) -> str:
    """Says which kinds of files there are instead."""
    found = Counter(os.path.splitext(name)[1] for _, _, names in os.walk(folder or '') for name in names)
    kinds = ', '.join(f'{number} {suffix or "without one"}' for suffix, number in found.most_common(3))
    return f' and found files of the kinds {kinds}: set img_suffix' if kinds else ', and it holds no files'


@DATASETS.register_module()
class ADE20KDataset(SegDataset, _ADE20KDataset):
    """ADE20K with its 150 classes and its files checked: labels 1..150, 0 is unlabelled (`reduce_zero_label`).

    Args:
        img_suffix: Ending of the images.
        seg_map_suffix: Ending of the label maps.
        reduce_zero_label: Leave the label 0 out and number the others from 0.
        **kwargs: As `SegDataset`'s.
    """

    def __init__(
            self,
            img_suffix: str = '.jpg',
            seg_map_suffix: str = '.png',
            reduce_zero_label: bool = True,
            **kwargs: Any,
    ) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, reduce_zero_label=reduce_zero_label,
                         **kwargs)


@TRANSFORMS.register_module()
class LoadSegAnnotations(LoadAnnotations):
    """MMSegmentation's LoadAnnotations with every label map checked: its form, its size, and that labels are classes.

    Labels are checked where the data set is one of this module, which says how many there are. 255 (the data set's
    `ignore_index`) is never a class.
    """

    def _load_seg_map(self, results: Sample) -> None:
        path = results['seg_map_path']
        labels = _read_labels(fileio.get(path, backend_args=self.backend_args), path)
        if 'ori_shape' in results and labels.shape != tuple(results['ori_shape']):
            h, w = results['ori_shape']
            raise ValueError(f'{path} has {labels.shape[1]} x {labels.shape[0]} pixels, and its image '
                             f'{results["img_path"]} has {w} x {h}')
        ignore = results.get('ignore_index', 255)
        counts = np.bincount(labels.ravel(), minlength=256)
        known = results.get('label_count')
        first = 1 if results['reduce_zero_label'] else 0
        if known is not None:
            wrong = [int(value) for value in np.flatnonzero(counts) if value != ignore and value >= known + first]
            if wrong:
                value = wrong[0]
                # the way out where a mask was saved in black and white
                hint = '. It looks like a black and white mask: write class numbers' if wrong == [255] else ''
                raise ValueError(f'{path} has the label {value} at {counts[value]} pixels (labels without a class: '
                                 f'{", ".join(map(str, wrong[:5]))}); the data set has {known} classes, labels '
                                 f'{first}..{known + first - 1} and {ignore} for pixels to ignore{hint}')
        table: np.ndarray = np.full(len(counts), 255, np.int64)
        values = np.arange(len(counts))
        inside = (values >= first) & (values != ignore)
        table[inside] = values[inside] - first
        if results.get('label_map') is not None:
            mapping = results['label_map']
            table = np.array([mapping.get(int(value), int(value)) for value in table])
        results['gt_seg_map'] = table[labels].clip(0, 255).astype(np.uint8)
        results['seg_fields'].append('gt_seg_map')


def _read_labels(content: bytes, path: str) -> np.ndarray:
    """Decodes a label map: (H, W) of whole numbers from 0."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format == 'JPEG':
                raise ValueError(f'{path} is a JPEG, whose compression changes labels: label maps are PNGs')
            if image.mode not in INDEX_MODES:
                raise ValueError(f'{path} has the channels {"".join(image.getbands())}: needed is one class number a '
                                 'pixel (a grey or palette PNG), not a picture of the classes in colours')
            labels = np.asarray(image)
    except READ_ERRORS as error:
        if isinstance(error, ValueError) and str(error).startswith(path):
            raise
        raise ValueError(f'{path} cannot be decoded as a label map ({error})') from error
    return labels.astype(np.int64)
