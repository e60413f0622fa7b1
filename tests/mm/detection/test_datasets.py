"""COCO files, sound and broken: used as meant, or refused with the file's name and the reason."""
import json
import logging
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmdet', reason='needs the extra [det]')

from mmengine.registry import init_default_scope  # noqa: E402
from PIL import Image  # noqa: E402

import visionssm.openmmlab.detection  # noqa: E402, F401
from visionssm.openmmlab.detection.datasets import AnnotationError, CocoDataset  # noqa: E402
from visionssm.registry import DATASETS  # noqa: E402

CLASSES = ('cat', 'dog')
WIDTH, HEIGHT = 40, 30


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmdet')


def box(number: int, image: int = 1, category: int = 1, bbox: tuple = (4, 5, 10, 8), **extra: object) -> dict:
    x, y, w, h = bbox
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {'id': number, 'image_id': image, 'category_id': category, 'bbox': list(bbox), 'area': w * h, 'iscrowd': 0,
            'segmentation': [polygon], **extra}


class Tree:
    """A folder in COCO's layout with three images, the third without objects."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content = {
            'images': [{'id': n, 'file_name': f'{n}.jpg', 'width': WIDTH, 'height': HEIGHT} for n in (1, 2, 3)],
            'annotations': [box(1), box(2, image=2, category=2)],
            'categories': [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'dog'}],
        }
        (root / 'images').mkdir()
        for image in self.content['images']:
            Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, np.uint8)).save(root / 'images' / image['file_name'])

    def load(self, classes: object = CLASSES, masks: bool = False, **options: object) -> CocoDataset:
        (self.root / 'annotations.json').write_text(json.dumps(self.content))
        pipeline = [dict(type='visionssm.LoadImage'), dict(type='LoadAnnotations', with_bbox=True, with_mask=masks),
                    dict(type='PackDetInputs')]
        return DATASETS.build({
            'type': 'visionssm.CocoDataset', 'data_root': str(self.root), 'ann_file': 'annotations.json',
            'data_prefix': dict(img='images/'), 'metainfo': dict(classes=classes), 'pipeline': pipeline, **options})

    def refuses(self, match: str, error: type[Exception] = AnnotationError, **options: object) -> None:
        with pytest.raises(error, match=match) as caught:
            self.load(**options)
        assert 'annotations.json' in str(caught.value)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_sound_files_give_what_mmdetection_gives(tree):
    from mmdet.datasets import CocoDataset as Theirs

    tree.content['annotations'] += [box(3, iscrowd=1, segmentation={'counts': [0, 8, 1192], 'size': [HEIGHT, WIDTH]})]
    for options in (dict(test_mode=True), dict(filter_cfg=dict(filter_empty_gt=True, min_size=8)), {}):
        ours = tree.load(**options)
        theirs = Theirs(data_root=str(tree.root), ann_file='annotations.json', data_prefix=dict(img='images/'),
                        metainfo=dict(classes=CLASSES), **options)
        assert [ours.get_data_info(i) for i in range(len(ours))] == [
            {**theirs.get_data_info(i), 'img_path': str(Path(theirs.get_data_info(i)['img_path']))}
            for i in range(len(theirs))]


def test_labels_follow_the_names_and_not_the_files_order(tree):
    dataset = tree.load(classes=('bird', 'dog', 'cat'))
    assert [dataset.get_data_info(i)['instances'][0]['bbox_label'] for i in (0, 1)] == [2, 1]


def test_classes_the_file_lacks_are_reported(tree, caplog):
    with caplog.at_level(logging.WARNING, 'visionssm'):
        tree.load(classes=('bird', 'dog', 'cat'))
    assert "no category for 1 of the 3 classes: 'bird'" in caplog.text


def test_classes_can_come_from_the_file(tree):
    assert tree.load(classes='from-file').metainfo['classes'] == CLASSES


def test_annotated_categories_without_a_class_are_refused_or_ignored_by_wish(tree, caplog):
    tree.refuses("1 categories that are no classes of the model: 'dog' \\(1 annotations\\)", classes=('cat', 'dock'))
    with caplog.at_level(logging.INFO, 'visionssm'):
        dataset = tree.load(classes=('cat',), unknown_categories='ignore')
    assert not dataset.get_data_info(1)['instances'] and "left out: 'dog'" in caplog.text


def test_unused_categories_do_no_harm(tree):
    tree.content['categories'] += [{'id': 7, 'name': 'unused'}]
    assert len(tree.load()) == 3


def test_missing_images_are_counted_and_named_or_skipped_by_wish(tree, caplog):
    (tree.root / 'images' / '2.jpg').unlink()
    (tree.root / 'images' / '3.jpg').unlink()
    tree.refuses(r'2 of the 3 images.*2\.jpg.*3\.jpg.*missing=', FileNotFoundError)
    assert len(tree.load(missing='skip')) == 1 and '2 of the 3 images' in caplog.text
    tree.refuses('3 of the 3 images', FileNotFoundError, missing='skip', data_prefix=dict(img='nowhere/'))
    for image in tree.content['images']:
        image['file_name'] = f'.//{image["file_name"]}'  # paths of other programs need not look like those of this one
    assert len(tree.load(missing='skip')) == 1


@pytest.mark.parametrize('text, match', [
    ('{"images": [', 'no JSON file, or was cut off'), ('[1, 2]', "not in COCO's format: it has a list"),
    ('{"info": 1, "images": []}', 'it has the keys info, images')])
def test_files_of_another_kind_are_refused(tree, text, match):
    dataset = tree.load(lazy_init=True)
    (tree.root / 'annotations.json').write_text(text)
    with pytest.raises(AnnotationError, match=match):
        dataset.full_init()


def test_a_file_that_is_not_there_is_named(tree):
    with pytest.raises(FileNotFoundError, match=r'nothing\.json does not exist: check data_root=.* and ann_file'):
        tree.load(ann_file='nothing.json')


@pytest.mark.parametrize('change, match', [
    (lambda c: c['images'][1].pop('width'), r'images\[1\] lacks width'),
    (lambda c: c['annotations'][0].pop('bbox'), r'annotations\[0\] lacks bbox'),
    (lambda c: c['images'][1].update(id=1), '1 values of id in images appear more than once: 1'),
    (lambda c: c['images'][1].update(file_name='1.jpg'), 'file_name in images.*1.jpg'),
    (lambda c: c['annotations'][1].update(id=1), 'id in annotations appear more than once'),
    (lambda c: c['categories'][1].update(name='cat'), 'name in categories'),
    (lambda c: c['annotations'][1].update(image_id=9), r'1 annotations have a image_id.*annotation 2 \(image_id 9\)'),
    (lambda c: c['annotations'][1].update(category_id=9), 'have a category_id that is not among its categories'),
    (lambda c: c['annotations'][1].update(bbox=[1, 2, 3]), r'annotation 2 has the box \[1, 2, 3\]'),
    (lambda c: c['images'][0].update(width=0), r'1\.jpg has the width 0'),
    (lambda c: c.update(images=[]), 'lists no images'),
    (lambda c: c.update(annotations=[]), 'no annotations that can be used, of 0: there is nothing to train on'),
])
def test_inconsistent_files_are_refused(tree, change, match):
    change(tree.content)
    tree.refuses(match)


@pytest.mark.parametrize('segmentation, match', [
    ([[1, 2, 3, 4]], 'annotation 2 of 2.jpg: a polygon of 4 numbers'), ([[1, 2, 3, 4, 5, 6, 7]], 'a polygon of 7'),
    ([1, 2, 3, 4, 5, 6], 'no list of polygons'), ([[1, 2, 3, 4, 5, float('nan')]], 'not finite'),
    ({'counts': [1200], 'size': [WIDTH, HEIGHT]}, r'run lengths for an image of \(height, width\) \[40, 30\]'),
    ({'counts': [1199], 'size': [HEIGHT, WIDTH]}, 'run lengths of 1199 pixels'),
    ({'counts': None, 'size': [HEIGHT, WIDTH]}, 'neither a list of polygons nor'), ('none', 'neither a list'),
])
def test_broken_masks_are_refused_with_their_annotation(tree, segmentation, match):
    tree.content['annotations'][1]['segmentation'] = segmentation
    tree.refuses(match)


def test_objects_without_a_mask_are_refused_where_masks_are_used(tree):
    del tree.content['annotations'][1]['segmentation']
    assert len(tree.load()) == 3
    tree.refuses('annotation 2 of 2.jpg: no segmentation', masks=True)


def test_impossible_boxes_are_dropped_and_counted(tree, caplog):
    wrong = [(4, 5, 0, 8), (4, 5, -3, 8), (float('nan'), 5, 10, 8), (WIDTH, 5, 10, 8), (-20, 5, 10, 8), (4, 5, 0.5, 8)]
    tree.content['annotations'] += [box(3 + number, bbox=bbox) for number, bbox in enumerate(wrong)]
    tree.content['annotations'] += [box(20, bbox=(-5, -5, 100, 100)), box(21, bbox=(0, 0, WIDTH + 0.4, HEIGHT))]
    for entry in tree.content['annotations'][2:8]:
        entry.pop('segmentation')
    dataset = tree.load()
    assert [instance['bbox'] for instance in dataset.get_data_info(0)['instances']] == [
        [4, 5, 14, 13], [0, 0, WIDTH, HEIGHT], [0, 0, WIDTH, HEIGHT]]
    for text in ('2 boxes without an area', '1 boxes that are not finite', '2 boxes outside', '1 boxes thinner',
                 '1 boxes beyond the border'):
        assert text in caplog.text


def test_crowds_are_ignored_regions_and_runs_and_polygons_become_masks(tree):
    counts = [5 * HEIGHT + 4, 6, HEIGHT * WIDTH - 5 * HEIGHT - 10]
    tree.content['annotations'] += [
        box(3, bbox=(5, 4, 1, 6), segmentation={'counts': counts, 'size': [HEIGHT, WIDTH]}),
        box(4, iscrowd=1, segmentation={'counts': [0, HEIGHT * WIDTH], 'size': [HEIGHT, WIDTH]})]
    sample = tree.load(masks=True)[0]['data_samples']
    # PackDetInputs keeps the crowd apart
    assert sample.gt_instances.masks.masks.sum((1, 2)).tolist() == [80, 6]
    assert sample.ignored_instances.masks.masks.sum() == HEIGHT * WIDTH


def test_area_and_crowd_may_be_missing(tree):
    for key in ('area', 'iscrowd'):
        tree.content['annotations'][0].pop(key)
    instance, = tree.load().get_data_info(0)['instances']
    assert instance['bbox'] == [4, 5, 14, 13] and instance['ignore_flag'] == 0


def test_images_without_objects_stay_in_tests_and_go_where_the_filter_says(tree):
    assert len(tree.load(test_mode=True)) == 3
    assert len(tree.load(filter_cfg=dict(filter_empty_gt=True))) == 2
    tree.content.pop('annotations')
    assert len(tree.load(test_mode=True)) == 3
    tree.content['annotations'] = [box(1)]
    tree.refuses('leaves none of its 3 images', filter_cfg=dict(filter_empty_gt=True, min_size=99))


def test_an_image_of_another_size_than_the_file_says_is_refused(tree):
    tree.content['images'][0]['width'] = 99
    dataset = tree.load()
    with pytest.raises(ValueError, match=r'1\.jpg has 40 x 30 pixels, and 99 x 30 according to the annotation file'):
        dataset[0]


@pytest.mark.parametrize('size', [(1, 1), pytest.param((6000, 4000), marks=pytest.mark.slow)])
def test_the_smallest_and_a_very_large_image_pass_the_whole_pipeline(tree, size):
    width, height = size
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(tree.root / 'images' / '1.jpg')
    tree.content['images'][0].update(width=width, height=height)
    tree.content['annotations'] = [box(1, bbox=(0, 0, width, height))]
    pipeline = [dict(type='visionssm.LoadImage'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                dict(type='Resize', scale=(96, 64), keep_ratio=True), dict(type='RandomFlip', prob=1.0),
                dict(type='PackDetInputs')]
    sample = tree.load(pipeline=pipeline)[0]
    h, w = sample['inputs'].shape[1:]
    assert (w, h) == ((64, 64) if size == (1, 1) else (96, 64))
    assert sample['data_samples'].gt_instances.bboxes.tensor.tolist() == [[0, 0, w, h]]
    assert sample['data_samples'].gt_instances.masks.masks.all()


def test_one_class_needs_a_tuple(tree):
    with pytest.raises(ValueError, match="the text 'cat'"):
        tree.load(classes='cat')
