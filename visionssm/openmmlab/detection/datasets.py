"""COCO's format, checked when it is loaded: whatever would train or evaluate something else than was meant is named.

MMDetection's own data set drops what it cannot use without a word, numbers the classes by their order in the file, and
finds a missing image only when it comes to it. The one here reads the same layouts and options.
"""
import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from mmdet.datasets import CocoDataset as _CocoDataset
from mmengine.fileio import get_local_path

from ...registry import DATASETS
from ...utils.suggest import check_choice, did_you_mean

__all__ = ['AnnotationError', 'CocoDataset', 'check_coco', 'read_coco']

logger = logging.getLogger('visionssm')

Json = dict[str, Any]


class AnnotationError(ValueError):
    """An annotation file is not what it should be."""


def _first(values: Iterable[Any], count: int = 3) -> str:
    """Names the first few values and says that there are more."""
    values = list(values)
    return ', '.join(map(str, values[:count])) + (' ...' if len(values) > count else '')


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, number in Counter(values).items() if number > 1]


def read_coco(path: str | Path, name: str | Path | None = None) -> Json:
    """Reads a file in COCO's format and checks its form.

    Args:
        path: The file.
        name: What to call it in messages.

    Returns:
        Its content, with `images`, `categories` and `annotations`, the last one empty where the file has none (as the
        lists of COCO's test images).
    """
    name = name or path
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise FileNotFoundError(f'the annotation file {name} does not exist') from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(f'{name} is no JSON file, or was cut off: {error}') from error
    if not isinstance(content, dict) or not {'images', 'categories'} <= content.keys():
        have = f'the keys {_first(content, 8)}' if isinstance(content, dict) else f'a {type(content).__name__}'
        raise AnnotationError(f"{name} is not in COCO's format: it has {have}; needed are images, annotations and "
                              'categories')
    content.setdefault('annotations', [])
    needed = {'images': ('id', 'file_name', 'width', 'height'), 'categories': ('id', 'name'),
              'annotations': ('id', 'image_id', 'category_id', 'bbox')}
    for part, keys in needed.items():
        if not isinstance(content[part], list):
            raise AnnotationError(f'{name}: {part} is a {type(content[part]).__name__}, needed is a list')
        for number, entry in enumerate(content[part]):
            missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else list(keys)
            if missing:
                raise AnnotationError(f'{name}: {part}[{number}] lacks {", ".join(missing)}: {str(entry)[:80]}')
    for part, key in (('images', 'id'), ('images', 'file_name'), ('annotations', 'id'), ('categories', 'id'),
                      ('categories', 'name')):
        if repeated := _repeated(entry[key] for entry in content[part]):
            raise AnnotationError(f'{name}: {len(repeated)} values of {key} in {part} appear more than once: '
                                  f'{_first(repeated)}')
    if not content['images']:
        raise AnnotationError(f'{name} lists no images')
    return content


def _check_references(content: Json, name: str) -> None:
    images = {image['id'] for image in content['images']}
    categories = {category['id'] for category in content['categories']}
    for key, known, part in (('image_id', images, 'images'), ('category_id', categories, 'categories')):
        lost = [annotation for annotation in content['annotations'] if annotation[key] not in known]
        if lost:
            raise AnnotationError(f'{name}: {len(lost)} annotations have a {key} that is not among its {part}: '
                                  + _first(f'annotation {a["id"]} ({key} {a[key]!r})' for a in lost))


def _check_classes(content: Json, classes: Sequence[str], name: str, unknown: str) -> None:
    """Refuses used categories without a class, and reports classes without a category."""
    names = {category['id']: category['name'] for category in content['categories']}
    strangers = Counter(names[annotation['category_id']] for annotation in content['annotations']
                        if names[annotation['category_id']] not in set(classes))
    if strangers and unknown == 'error':
        stranger = next(iter(strangers))
        listed = _first(f'{key!r} ({value} annotations)' for key, value in strangers.items())
        raise AnnotationError(
            f'{name} has annotations of {len(strangers)} categories that are no classes of the model: {listed}. '
            f"{did_you_mean(stranger, classes)} Name the classes by metainfo=dict(classes=(...)), take the file's by "
            "classes='from-file', or give unknown_categories='ignore' to leave these objects unlabelled")
    if strangers:
        logger.info('%s: %d annotations of %d categories that are no classes are left out: %s', name,
                    strangers.total(), len(strangers), _first(map(repr, strangers)))
    absent = [cls for cls in classes if cls not in names.values()]
    if absent:
        logger.warning('%s has no category for %d of the %d classes: %s', name, len(absent), len(classes),
                       _first(map(repr, absent)))


def _clip(annotation: Json, image: Json, found: Counter) -> bool:
    """Cuts a box at the borders of its image; False if nothing of it remains."""
    box = annotation['bbox']
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise AnnotationError(f'annotation {annotation["id"]} has the box {box!r}: needed are four numbers x, y, w, h')
    if not all(map(math.isfinite, box)):
        found['boxes that are not finite, dropped'] += 1
        return False
    x, y, w, h = box
    if w <= 0 or h <= 0 or (annotation.get('area') or 1) <= 0:
        found['boxes without an area, dropped'] += 1
        return False
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, image['width']), min(y + h, image['height'])
    if right <= left or bottom <= top:
        found['boxes outside of their image, dropped'] += 1
        return False
    # rounding leaves many boxes a little larger than their image
    if max(left - x, top - y, x + w - right, y + h - bottom) > 1:
        found['boxes beyond the border of their image, clipped'] += 1
    if (left, top, right, bottom) != (x, y, x + w, y + h):
        annotation['bbox'] = [left, top, right - left, bottom - top]
    if min(annotation['bbox'][2:]) < 1:
        found['boxes thinner than a pixel, dropped'] += 1
        return False
    return True


def _check_mask(annotation: Json, image: Json) -> str | None:
    """Says what is wrong with a mask."""
    mask = annotation['segmentation']
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list):
                return 'its segmentation is no list of polygons (each a list of numbers)'
            if len(polygon) < 6 or len(polygon) % 2:
                return f'a polygon of {len(polygon)} numbers: needed are pairs x, y, at least three of them'
            try:
                finite = all(map(math.isfinite, polygon))
            except TypeError:
                finite = False
            if not finite:
                return 'a polygon with values that are not finite numbers'
        return None
    if not isinstance(mask, dict) or not isinstance(mask.get('counts'), list | str) or 'size' not in mask:
        return 'its segmentation is neither a list of polygons nor run lengths with counts and size'
    size = [image['height'], image['width']]
    if list(mask['size']) != size:
        return f'run lengths for an image of (height, width) {mask["size"]}, and the image has {size}'
    if isinstance(mask['counts'], list) and (sum(mask['counts']) != size[0] * size[1] or min(mask['counts']) < 0):
        return f'run lengths of {sum(mask["counts"])} pixels, and the image has {size[0] * size[1]}'
    return None


def check_coco(
        content: Json,
        classes: Sequence[str],
        name: str,
        unknown_categories: Literal['error', 'ignore'] = 'error',
        need_masks: bool = False,
) -> dict[Any, list[Json]]:
    """Checks every annotation and repairs what is beyond doubt; what was dropped or changed is logged with its number.

    Args:
        content: What `read_coco` returned; boxes are clipped in place.
        classes: Class names of the model.
        name: The file, for messages.
        unknown_categories: What to do about annotations of other categories.
        need_masks: Refuse annotations without a mask.

    Returns:
        Image id -> its annotations, of the given classes only, each with `area` and `iscrowd`.
    """
    _check_references(content, name)
    _check_classes(content, classes, name, unknown_categories)
    images = {image['id']: image for image in content['images']}
    names = {category['id']: category['name'] for category in content['categories']}
    for image in content['images']:
        for key in ('width', 'height'):
            if not isinstance(image[key], int | float) or image[key] < 1 or image[key] % 1:
                raise AnnotationError(f'{name}: {image["file_name"]} has the {key} {image[key]!r}: needed is a whole '
                                      'number above 0')
            image[key] = int(image[key])
    found: Counter = Counter()
    result: dict[Any, list[Json]] = defaultdict(list)
    wanted = set(classes)
    for annotation in content['annotations']:
        image = images[annotation['image_id']]
        if names[annotation['category_id']] not in wanted:
            continue
        try:
            kept = _clip(annotation, image, found)
        except AnnotationError as error:
            raise AnnotationError(f'{name}: {error}') from None
        problem = None
        if annotation.get('segmentation'):
            problem = _check_mask(annotation, image)
        elif need_masks and kept:
            problem = 'no segmentation, and masks are trained or tested: leave them out of the config (with_mask=False)'
        if problem and kept:
            raise AnnotationError(f'{name}: annotation {annotation["id"]} of {image["file_name"]}: {problem}')
        if kept:
            annotation['area'] = annotation.get('area') or annotation['bbox'][2] * annotation['bbox'][3]
            annotation.setdefault('iscrowd', 0)
            result[annotation['image_id']].append(annotation)
    for what, number in found.items():
        logger.warning('%s: %d %s', name, number, what)
    return result


@DATASETS.register_module()
class CocoDataset(_CocoDataset):
    """MMDetection's CocoDataset with every file checked, and labels by name.

    Label i is the class i of `metainfo['classes']` whatever the order in the file and whether or not the file has it;
    evaluate with `visionssm.CocoMetric`, which does the same. Crowds stay as regions to ignore.

    Args:
        ann_file: The annotation file.
        metainfo: `classes` (and `palette`); with `classes='from-file'` the file's categories in their order.
        missing: What to do about images that are listed and not there: 'error', or 'skip' with a warning.
        unknown_categories: What to do about annotated categories that are no classes: 'error', or 'ignore'.
        **kwargs: As MMDetection's, by name.
    """

    def __init__(
            self,
            ann_file: str = '',
            metainfo: dict[str, Any] | None = None,
            missing: Literal['error', 'skip'] = 'error',
            unknown_categories: Literal['error', 'ignore'] = 'error',
            **kwargs: Any,
    ) -> None:
        check_choice('missing', missing, ('error', 'skip'))
        check_choice('unknown_categories', unknown_categories, ('error', 'ignore'))
        metainfo = dict(metainfo or {})
        self.classes_from_file = metainfo.get('classes') == 'from-file'
        if self.classes_from_file:
            del metainfo['classes']
        elif isinstance(metainfo.get('classes'), str):
            raise ValueError(f"metainfo['classes'] is the text {metainfo['classes']!r}: give a tuple of names, "
                             "one name as ('name',), or 'from-file'")
        self.missing = missing
        self.unknown_categories: Literal['error', 'ignore'] = unknown_categories
        super().__init__(ann_file=ann_file, metainfo=metainfo, **kwargs)

    def load_data_list(self) -> list[Json]:
        """Reads and checks the annotation file and returns the images with their objects."""
        name = str(self.ann_file)
        with get_local_path(name, backend_args=self.backend_args) as local:
            try:
                content = read_coco(local, name)
            except FileNotFoundError as error:
                raise FileNotFoundError(f'{error}: check data_root={self.data_root!r} and ann_file') from error
        if self.classes_from_file:
            self._metainfo['classes'] = tuple(category['name'] for category in content['categories'])
        classes = list(self._metainfo['classes'])
        need_masks = any(getattr(step, 'with_mask', False) for step in self.pipeline.transforms)
        annotations = check_coco(content, classes, name, self.unknown_categories, need_masks)
        self._check_files(content)
        ids = {category['name']: category['id'] for category in content['categories']}
        self.cat2label = {ids[cls]: label for label, cls in enumerate(classes) if cls in ids}
        self.cat_ids = list(self.cat2label)
        # what MMDetection's filter_data asks: which images have objects of a category
        self.cat_img_map = defaultdict(list)
        for image_id, found in annotations.items():
            for annotation in found:
                self.cat_img_map[annotation['category_id']].append(image_id)
        if not self.test_mode and not any(annotations.values()):
            raise AnnotationError(f'{name} has no annotations that can be used, of {len(content["annotations"])}: '
                                  'there is nothing to train on')
        return [self.parse_data_info({'raw_img_info': {**image, 'img_id': image['id']},
                                      'raw_ann_info': annotations.get(image['id'], [])})
                for image in content['images']]

    def filter_data(self) -> list[Json]:
        """As MMDetection's, and never to nothing."""
        kept = super().filter_data()
        if not kept:
            raise AnnotationError(f'{self.ann_file}: filter_cfg={self.filter_cfg} leaves none of its '
                                  f'{len(self.data_list)} images')
        return kept

    def _check_files(self, content: Json) -> None:
        """Looks for the images, folder by folder; remote ones are not looked for."""
        prefix = self.data_prefix['img']
        if self.backend_args is not None or '://' in prefix:
            return
        present: dict[str, set[str]] = {}
        lost: dict[Any, str] = {}
        for image in content['images']:
            path = os.path.join(prefix, image['file_name'])
            folder, file = os.path.split(path)
            if folder not in present:
                present[folder] = set(os.listdir(folder or '.')) if os.path.isdir(folder or '.') else set()
            if file not in present[folder]:
                lost[image['id']] = path
        if not lost:
            return
        total = len(content['images'])
        message = f'{len(lost)} of the {total} images of {self.ann_file} do not exist: {_first(lost.values())}'
        if self.missing == 'error' or len(lost) == total:
            raise FileNotFoundError(f"{message}. Check data_prefix=dict(img={prefix!r}), complete the download, or "
                                    "give missing='skip' to go on without them")
        logger.warning('%s; they are left out', message)
        content['images'] = [image for image in content['images'] if image['id'] not in lost]
