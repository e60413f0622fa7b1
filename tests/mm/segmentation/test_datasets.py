"""Label maps, sound and broken: used as meant, or refused with the file's name and the reason."""
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmseg', reason='needs the extra [seg]')

from mmengine.registry import init_default_scope  # noqa: E402
from mmseg.datasets import ADE20KDataset as Theirs  # noqa: E402
from PIL import Image  # noqa: E402

import visionssm.openmmlab.segmentation  # noqa: E402, F401
from visionssm.registry import DATASETS  # noqa: E402

LABELS = np.random.default_rng(0).integers(0, 151, (24, 40)).astype(np.uint8)
PIPELINE = [dict(type='visionssm.LoadImage'), dict(type='visionssm.LoadSegAnnotations'),
            dict(type='PackSegInputs', meta_keys=('img_path', 'ori_shape'))]
PREFIX = dict(img_path='images/training', seg_map_path='annotations/training')
COLOURS = ('background', 'red', 'blue')


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmseg')


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in PREFIX.values():
        (tmp_path / folder).mkdir(parents=True)
    for name in 'ab':
        Image.fromarray(np.full((24, 40, 3), 90, np.uint8)).save(tmp_path / PREFIX['img_path'] / f'{name}.jpg')
        write_labels(tmp_path, LABELS, name)
    return tmp_path


def write_labels(root: Path, labels: np.ndarray | Image.Image, name: str = 'a') -> Path:
    path = root / PREFIX['seg_map_path'] / f'{name}.png'
    (labels if isinstance(labels, Image.Image) else Image.fromarray(labels)).save(path)
    return path


def load(root: Path, kind: str = 'ADE20KDataset', **options):
    return DATASETS.build({'type': f'visionssm.{kind}', 'data_root': str(root), 'data_prefix': dict(PREFIX),
                           'pipeline': PIPELINE, **options})


def small(root: Path, **options):
    return load(root, 'SegDataset', metainfo=dict(classes=COLOURS), **options)


def labels_of(sample: dict) -> np.ndarray:
    return sample['data_samples'].gt_sem_seg.data[0].numpy()


def test_sound_files_give_what_mmsegmentation_gives(tree):
    labels = LABELS.copy()
    labels[:3] = 255
    write_labels(tree, labels)
    stock = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), *PIPELINE[2:]]
    for options in ({}, dict(metainfo=dict(classes=('sky', 'wall')))):
        ours = load(tree, **options)
        theirs = Theirs(data_root=str(tree), data_prefix=dict(PREFIX), pipeline=stock, **options)
        assert len(ours) == len(theirs) == 2 and ours.metainfo == theirs.metainfo
        for index in range(2):
            assert (labels_of(ours[index]) == labels_of(theirs[index])).all()
            assert (ours[index]['inputs'] == theirs[index]['inputs']).all()


def test_zero_is_a_class_unless_it_is_reduced(tree):
    labels = np.tile(np.array([0, 1, 2, 255], np.uint8), (24, 10))
    for name in 'ab':
        write_labels(tree, labels, name)
    assert np.unique(labels_of(small(tree)[0])).tolist() == [0, 1, 2, 255]
    reduced = load(tree, 'SegDataset', metainfo=dict(classes=COLOURS[1:]), reduce_zero_label=True)
    assert labels_of(reduced[0])[0, :4].tolist() == [255, 0, 1, 255]


@pytest.mark.parametrize('mode', ['palette', '16 bits', '1 bit'])
def test_every_form_of_one_number_a_pixel_is_read(tree, mode):
    labels = (LABELS % 2).astype(np.uint8)
    image = {'palette': Image.fromarray(labels), '16 bits': Image.fromarray(labels.astype(np.uint16)),
             '1 bit': Image.fromarray(labels.astype(bool))}[mode]
    if mode == 'palette':
        image = image.convert('P')
        image.putpalette([9, 9, 9, 200, 0, 0])
    write_labels(tree, image)
    assert (labels_of(small(tree)[0]) == labels).all()


def test_labels_without_a_class_are_named_with_their_file(tree):
    labels = np.zeros((24, 40), np.uint8)
    labels[2, :5] = 3
    write_labels(tree, labels)
    with pytest.raises(ValueError, match=r'a\.png has the label 3 at 5 pixels.*3 classes, labels 0\.\.2 and 255'):
        small(tree)[0]
    write_labels(tree, np.full((24, 40), 151, np.uint8))
    with pytest.raises(ValueError, match=r'a\.png has the label 151 .*150 classes, labels 1\.\.150'):
        load(tree)[0]


def test_labels_beyond_8_bits_do_not_wrap(tree):
    write_labels(tree, np.full((24, 40), 257, np.uint16))
    with pytest.raises(ValueError, match=r'a\.png has the label 257'):
        small(tree)[0]


def test_pictures_of_labels_are_refused(tree):
    write_labels(tree, np.zeros((24, 40, 3), np.uint8))
    with pytest.raises(ValueError, match=r'a\.png has the channels RGB: needed is one class number a pixel'):
        small(tree)[0]
    path = write_labels(tree, LABELS)
    Image.fromarray(LABELS).save(path, format='JPEG')
    with pytest.raises(ValueError, match=r'a\.png is a JPEG'):
        small(tree)[0]


def test_label_maps_of_another_size_are_refused(tree):
    write_labels(tree, LABELS[:20])
    with pytest.raises(ValueError, match=r'a\.jpg has 40 x 24 pixels, and 40 x 20 according to .*a\.png'):
        load(tree)[0]
    stock = [dict(type='LoadImageFromFile'), dict(type='visionssm.LoadSegAnnotations'), *PIPELINE[2:]]
    with pytest.raises(ValueError, match=r'a\.png has 40 x 20 pixels, and its image .*a\.jpg has 40 x 24'):
        load(tree, pipeline=stock)[0]


def test_damaged_label_maps_are_named(tree):
    path = write_labels(tree, LABELS)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r'a\.png cannot be decoded as a label map'):
        load(tree)[0]


def test_missing_label_maps_are_counted_and_named_or_skipped_by_wish(tree, caplog):
    (tree / PREFIX['seg_map_path'] / 'b.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'1 of the 2 label maps do not exist: .*b\.png'):
        load(tree)
    assert len(load(tree, missing='skip')) == 1 and 'b.png' in caplog.text
    (tree / PREFIX['seg_map_path'] / 'a.png').unlink()
    with pytest.raises(FileNotFoundError, match='2 of the 2 label maps'):
        load(tree, missing='skip')


def test_images_of_a_list_must_exist(tree):
    (tree / 'list.txt').write_text('a\nc\n')
    with pytest.raises(FileNotFoundError, match=r'1 of the 2 images do not exist: .*c\.jpg'):
        load(tree, ann_file='list.txt')
    with pytest.raises(FileNotFoundError, match=r'nothing\.txt does not exist'):
        load(tree, ann_file='nothing.txt')


def test_folders_without_images_say_what_is_there(tree):
    with pytest.raises(ValueError, match=r'no images in .*training: looked for \.png and found .* 2 \.jpg'):
        load(tree, img_suffix='.png')
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: check data_root=.*'img_path'"):
        load(tree, data_prefix=dict(PREFIX, img_path='nowhere'))
    (tree / 'empty').mkdir()
    with pytest.raises(ValueError, match='it holds no files'):
        load(tree, data_prefix=dict(PREFIX, img_path='empty'))


def test_images_without_labels_can_be_tested(tree):
    dataset = load(tree, data_prefix=dict(img_path=PREFIX['img_path']), test_mode=True,
                   pipeline=[PIPELINE[0], PIPELINE[2]])
    assert len(dataset) == 2 and dataset[0]['inputs'].shape == (3, 24, 40)


@pytest.mark.parametrize('size', [(1, 1), pytest.param((6000, 4000), marks=pytest.mark.slow)])
def test_the_smallest_and_a_very_large_image_pass_the_whole_pipeline(tree, size):
    width, height = size
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(tree / PREFIX['img_path'] / 'a.jpg')
    write_labels(tree, np.ones((height, width), np.uint8))
    resize = dict(type='Resize', scale=(96, 64), keep_ratio=True)
    sample = small(tree, pipeline=[*PIPELINE[:2], resize, *PIPELINE[2:]])[0]
    assert sample['inputs'].shape[1:] == ((64, 64) if size == (1, 1) else (64, 96))
    assert (labels_of(sample) == 1).all()


def test_one_class_needs_a_tuple_and_missing_a_known_word(tree):
    with pytest.raises(ValueError, match="the text 'red'"):
        load(tree, 'SegDataset', metainfo=dict(classes='red'))
    with pytest.raises(ValueError, match="missing is 'drop'"):
        load(tree, missing='drop')
