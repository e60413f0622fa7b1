"""Fashion-MNIST: where it comes from, and the subset that ships with the package."""
import gzip
import logging
import struct

import numpy as np
import pytest

from visionssm.openmmlab import datasets
from visionssm.openmmlab.datasets import DEBIAN_FOLDER, FashionMNIST, load_fashion_mnist
from visionssm.utils.paths import data_file

needs_debian = pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason='needs the Debian package dataset-fashion-mnist')


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without Debian's files and without a network."""
    def refuse(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr(datasets, 'DEBIAN_FOLDER', tmp_path / 'none')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr('torchvision.datasets.FashionMNIST.__init__', refuse)


def write_idx(folder, count=30, zipped=True, split='train'):
    """The original format with made pictures; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    images = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, count, dtype=np.uint8)
    for name, magic, data in zip(datasets.IDX_FILES[split], (0x803, 0x801), (images, labels), strict=True):
        content = struct.pack(f'>{1 + data.ndim}I', magic, *data.shape) + data.tobytes()
        path = folder / (name + '.gz' * zipped)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return images, labels


@pytest.mark.parametrize('split,count', [('train', 6000), ('test', 1000)])
def test_the_subset_is_balanced(split, count):
    images, labels, _ = load_fashion_mnist(split, 'embedded')
    assert images.shape == (count, 28, 28) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [count // 10] * 10


def test_the_subset_is_small_and_names_its_licence():
    path = data_file('fashion_mnist_7k.npz')
    assert path.stat().st_size < 4_000_000
    text = path.with_name('README.txt').read_text()
    assert 'MIT License' in text and 'Zalando' in text


@needs_debian
@pytest.mark.parametrize('split', ['train', 'test'])
def test_the_subset_is_what_its_readme_says(split):
    images, labels, _ = load_fashion_mnist(split, 'debian')
    order = np.random.RandomState(0).permutation(len(labels))  # noqa: NPY002
    per_class = {'train': 600, 'test': 100}[split]
    chosen = np.sort(np.concatenate([order[labels[order] == c][:per_class] for c in range(10)]))
    subset, subset_labels, _ = load_fashion_mnist(split, 'embedded')
    assert np.array_equal(images[chosen], subset) and np.array_equal(labels[chosen], subset_labels)


@needs_debian
def test_debians_files_come_before_the_subset():
    assert load_fashion_mnist('test')[0].shape == (10000, 28, 28)


@pytest.mark.parametrize('zipped', [True, False], ids=['gz', 'plain'])
@pytest.mark.parametrize('below', ['', 'FashionMNIST/raw'], ids=['flat', 'torchvision'])
def test_a_given_root_comes_first(tmp_path, zipped, below):
    images, labels = write_idx(tmp_path / below, zipped=zipped)
    found, found_labels, source = load_fashion_mnist('train', root=str(tmp_path))
    assert np.array_equal(found, images) and np.array_equal(found_labels, labels) and str(tmp_path) in source


def test_an_earlier_download_is_used(nowhere, tmp_path):
    folder = tmp_path / 'cache' / 'visionssm' / 'FashionMNIST' / 'raw'
    images, _ = write_idx(folder), write_idx(folder, split='test')
    assert np.array_equal(load_fashion_mnist('train')[0], images[0])


def test_without_any_source_the_subset_is_taken_and_named(nowhere, caplog):
    with caplog.at_level(logging.INFO, 'visionssm'):
        dataset = FashionMNIST('test')
    assert len(dataset) == 1000
    assert any('1000 pictures from the subset of 7,000' in record.message for record in caplog.records)


def test_an_explicit_download_that_fails_is_an_error(nowhere):
    with pytest.raises(FileNotFoundError, match="could not be downloaded.*source='embedded'"):
        load_fashion_mnist('train', 'download')


def test_a_root_without_the_files_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match='train-images-idx3-ubyte'):
        load_fashion_mnist('train', root=str(tmp_path))


@pytest.mark.parametrize('arguments,problem', [
    (('validation',), "split='validation'"), (('train', 'web'), "source='web'"), (('train', 'root'), 'needs root')])
def test_wrong_choices_are_named(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        load_fashion_mnist(*arguments)


@pytest.mark.parametrize('left', [-5, 7, 0])
@pytest.mark.parametrize('zipped', [False, True])
def test_a_damaged_file_is_named(tmp_path, zipped, left):
    write_idx(tmp_path, zipped=zipped)
    path = next(tmp_path.glob('train-images-idx3-ubyte*'))
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match='train-images-idx3-ubyte.* is damaged'):
        load_fashion_mnist('train', root=str(tmp_path))


@pytest.mark.parametrize('mode,channels', [('L', 1), ('RGB', 3)])
def test_samples_are_grey_or_three_equal_channels(mode, channels):
    dataset = FashionMNIST('test', source='embedded', mode=mode)
    sample = dataset[17]
    assert sample['inputs'].shape == (channels, 28, 28)
    assert all(np.array_equal(plane, dataset.images[17]) for plane in sample['inputs'].numpy())
    assert sample['label'] == dataset.labels[17] and dataset.metainfo['classes'][9] == 'Ankle boot'
