"""Images from folders and archives through timm: class order, damaged files, missing folders."""
import logging
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import DataLoader

from visionssm.openmmlab.data import SeededSampler, UnreadableImagesError, collate_images
from visionssm.openmmlab.datasets import TimmDataset, class_names

LIGHT = {'type': 'ShiftFlip'}


def test_a_folder_of_class_folders(make_tree):
    root, files = make_tree()
    dataset = TimmDataset(str(root), transform=LIGHT)
    assert dataset.metainfo['classes'] == ('cat', 'dog', 'owl')
    assert [dataset[i]['label'] for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset[5]['path'] == str(files[5]) and dataset[5]['inputs'].shape == (3, 30, 40)


@pytest.mark.parametrize('asked,there', [('train', 'train'), ('val', 'val'), ('val', 'validation')])
def test_a_split_is_found_below_the_root(make_tree, asked, there):
    root, _ = make_tree(name=f'data/{there}')
    assert len(TimmDataset(str(root.parent), split=asked, transform=LIGHT)) == 12


def test_a_tar_of_class_folders(make_tree, tmp_path):
    root, _ = make_tree()
    with tarfile.open(tmp_path / 'images.tar', 'w') as archive:
        archive.add(root, arcname='images')
    dataset = TimmDataset(str(tmp_path / 'images.tar'), transform=LIGHT)
    assert len(dataset) == 12 and dataset.metainfo['classes'] == ('cat', 'dog', 'owl')
    assert dataset[11]['label'] == 2 and dataset[11]['inputs'].shape == (3, 30, 40)


def test_torchvisions_datasets_by_name(make_tree):
    root, _ = make_tree()
    dataset = TimmDataset(str(root), name='torch/image_folder', transform=LIGHT)
    assert len(dataset) == 12 and dataset[4]['label'] == 1 and dataset.metainfo['classes'] == ('cat', 'dog', 'owl')


def test_grey_images_on_request(make_tree):
    assert TimmDataset(str(make_tree()[0]), mode='L', transform=LIGHT)[0]['inputs'].shape == (1, 30, 40)


def test_greys_of_sixteen_bits_keep_their_shades(make_tree):
    root, files = make_tree()
    shades = np.linspace(0, 65535, 200).astype(np.uint16).reshape(10, 20)
    files[0].unlink()
    Image.fromarray(shades).save(files[0].with_suffix('.png'))
    inputs = TimmDataset(str(root), transform=LIGHT)[0]['inputs']
    assert torch.equal(inputs, torch.from_numpy((shades >> 8).astype(np.uint8)).expand(3, 10, 20))


def test_imagenet_labels_are_official_even_when_classes_are_missing(make_tree):
    # tench, goldfish, toilet tissue: the first two and the last of the 1000
    root, _ = make_tree(('n01440764', 'n15075141', 'n01443537'))
    dataset = TimmDataset(str(root), class_map='imagenet-1k', transform=LIGHT)
    assert sorted({dataset[i]['label'] for i in range(12)}) == [0, 1, 999]
    assert len(dataset.metainfo['classes']) == 1000 and dataset.metainfo['descriptions'][0].startswith('tench')


def test_official_imagenet_order_is_that_of_sorted_synsets():
    names = list(class_names('imagenet-1k'))
    assert names == sorted(names) == ImageNetInfo('imagenet-1k').label_names()


@pytest.mark.parametrize('form', ['list', 'dict', 'file'])
def test_a_given_class_order(make_tree, tmp_path, form):
    root, _ = make_tree()
    order = ['owl', 'cat', 'dog']
    (tmp_path / 'classes.txt').write_text('\n'.join(order))
    class_map = {'list': order, 'dict': {name: i for i, name in enumerate(order)},
                 'file': str(tmp_path / 'classes.txt')}[form]
    dataset = TimmDataset(str(root), class_map=class_map, transform=LIGHT)
    assert dataset.metainfo['classes'] == tuple(order)
    assert {dataset[i]['path'].split('/')[-2]: dataset[i]['label'] for i in range(12)} == {'owl': 0, 'cat': 1, 'dog': 2}


def test_folders_outside_the_class_map_are_named(make_tree):
    with pytest.raises(ValueError, match='folders that are no class of the class map: dog, owl'):
        TimmDataset(str(make_tree()[0]), class_map=['cat', 'fish'])


def test_a_missing_class_map_is_named(make_tree):
    with pytest.raises(FileNotFoundError, match='nowhere.txt'):
        TimmDataset(str(make_tree()[0]), class_map='nowhere.txt')


def test_a_missing_folder_names_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'absent.*does not exist; expected .*absent/val/<class>/<image>.jpg'):
        TimmDataset(str(tmp_path / 'absent'), split='val')


def test_a_folder_without_images_names_the_layout(tmp_path):
    (tmp_path / 'empty' / 'cat').mkdir(parents=True)
    (tmp_path / 'empty' / 'cat' / 'notes.txt').write_text('no image')
    with pytest.raises(ValueError, match=r'no images in the data folder .*empty.*<class>/<image>.jpg'):
        TimmDataset(str(tmp_path / 'empty'))


def test_streams_point_to_their_class(tmp_path):
    with pytest.raises(ValueError, match="type='TimmStream'"):
        TimmDataset(str(tmp_path), name='wds/shards')


def test_a_damaged_jpeg_is_replaced_and_reported_once(make_tree, truncate, caplog):
    root, files = make_tree()
    truncate(files[5])
    dataset = TimmDataset(str(root), transform=LIGHT)
    with caplog.at_level(logging.WARNING, 'visionssm'):
        samples = [dataset[5], dataset[5]]
    assert [(sample['index'], sample['path']) for sample in samples] == [(6, str(files[6]))] * 2
    assert dataset.num_unreadable == 1
    assert [str(files[5]) in record.message for record in caplog.records] == [True]


def test_workers_share_the_count_of_damaged_images(make_tree, truncate):
    root, files = make_tree()
    truncate(files[2]), truncate(files[9])
    dataset = TimmDataset(str(root), transform=LIGHT)
    loader = DataLoader(dataset, 3, sampler=SeededSampler(dataset, seed=0), num_workers=2, collate_fn=collate_images)
    assert sum(len(batch['labels']) for batch in loader) == 12
    assert dataset.num_unreadable == 2


def test_too_many_damaged_images_are_an_error(make_tree, truncate):
    root, files = make_tree(per_class=8)
    for path in files[:12]:
        truncate(path)
    dataset = TimmDataset(str(root), transform=LIGHT)
    with pytest.raises(UnreadableImagesError, match='11 of 24 images cannot be read.*at most 10.*max_unreadable=0.01'):
        dataset[0]


def test_nothing_but_damaged_images_is_an_error(make_tree, truncate):
    root, files = make_tree(per_class=1)
    for path in files:
        truncate(path)
    with pytest.raises(UnreadableImagesError, match='3 of 3 images cannot be read'):
        TimmDataset(str(root), transform=LIGHT)[0]
