"""Streams behind the interface of datasets with random access."""
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.dataset import IterableImageDataset
from torch.utils.data import DataLoader

from visionssm.openmmlab import datasets
from visionssm.openmmlab.data import SampleKey, SeededSampler, collate_images
from visionssm.openmmlab.datasets import TimmDataset, TimmStream


class Numbers:
    """A reader of eight grey images whose order turns with the epoch."""
    num_samples = 8
    class_to_idx = {'even': 0, 'odd': 1}

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for number in np.roll(np.arange(8), self.epoch):
            yield Image.new('L', (4, 4), int(number)), int(number) % 2


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr(datasets, 'create_dataset', lambda *a, **k: IterableImageDataset(None, reader=Numbers()))
    return TimmStream('shards', 'wds/numbers')


def values(dataset, epoch):
    sampler = SeededSampler(dataset, seed=0)
    sampler.set_epoch(epoch)
    loader = DataLoader(dataset, 4, sampler=sampler, collate_fn=collate_images)
    return [value for batch in loader for value in batch['inputs'][:, 0, 0, 0].tolist()]


def test_an_epoch_is_the_stream_of_that_epoch(stream):
    assert [values(stream, epoch) for epoch in (0, 2)] == [list(range(8)), [6, 7, 0, 1, 2, 3, 4, 5]]


def test_a_sample_has_the_agreed_form(stream):
    sample = stream[SampleKey(3, 0)]
    assert sample['inputs'].shape == (1, 4, 4) and sample['inputs'].dtype == torch.uint8
    assert (sample['label'], sample['index']) == (0, 3)
    assert stream.metainfo['classes'] == ('even', 'odd') and len(stream) == 8


def test_a_share_that_is_used_up_starts_again(stream):
    assert [int(stream[SampleKey(i, 1)]['inputs'][0, 0, 0]) for i in range(10)][-3:] == [6, 7, 0]


def test_a_share_without_images_is_an_error_and_no_early_end(stream, monkeypatch):
    monkeypatch.setattr(Numbers, '__iter__', lambda self: iter(()))
    with pytest.raises(ValueError, match="'wds/numbers' gives this worker no images: take fewer workers"):
        values(stream, 0)


def test_other_datasets_point_to_their_class():
    with pytest.raises(ValueError, match="is no stream.*type='TimmDataset'"):
        TimmStream('folder', 'hfds/name')


def test_webdataset_shards_are_read_once_an_epoch(tmp_path):
    pytest.importorskip('webdataset', reason='needs webdataset')
    for shard in range(2):
        with tarfile.open(tmp_path / f'train-{shard:04d}.tar', 'w') as archive:
            for number in range(6 * shard, 6 * shard + 6):
                image = io.BytesIO()
                Image.new('RGB', (4, 4), (number,) * 3).save(image, 'PNG')
                for suffix, content in (('png', image.getvalue()), ('cls', str(number % 3).encode())):
                    member = tarfile.TarInfo(f'{number:05d}.{suffix}')
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    dataset = TimmStream(str(tmp_path), 'wds/numbers', split='train-{0000..0001}.tar', num_samples=12,
                         is_training=True)
    first, second = values(dataset, 0), values(dataset, 1)
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


def test_hugging_face_datasets_have_random_access(make_tree, tmp_path, monkeypatch):
    pytest.importorskip('datasets', reason='needs datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    root, files = make_tree(name='hub/train')
    dataset = TimmDataset(str(tmp_path / 'cache'), name=f'hfds/{root.parent}', transform={'type': 'ShiftFlip'})
    assert len(dataset) == 12 and dataset.metainfo['classes'] == ('cat', 'dog', 'owl')
    assert {dataset[i]['path'].split('/')[-2]: dataset[i]['label'] for i in range(12)} == {'cat': 0, 'dog': 1, 'owl': 2}
