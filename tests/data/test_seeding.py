"""Random transforms depend on (seed, epoch, index, draw) and on nothing else."""
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from visionssm.openmmlab.data import ImageDataset, SampleKey, SeededSampler, collate_images, sample_rng

RAND_AUGMENT = {'type': 'TimmTransform', 'input_size': 24, 'is_training': True,
                'auto_augment': 'rand-m9-mstd0.5-inc1', 're_prob': 0.5}
ALBUMENTATIONS = {'type': 'Albumentations', 'transforms': [
    {'type': 'RandomResizedCrop', 'size': (24, 24)}, {'type': 'GaussNoise', 'p': 0.8},
    {'type': 'OneOf', 'transforms': [{'type': 'HorizontalFlip'}, {'type': 'VerticalFlip'}]}]}
LIGHT = {'type': 'ShiftFlip', 'shift': 3, 'flip': 0.5}
TRANSFORMS = pytest.mark.parametrize('transform', [RAND_AUGMENT, ALBUMENTATIONS, LIGHT],
                                     ids=['timm', 'albumentations', 'light'])


class Gradients(ImageDataset):
    """Twelve images whose pixels tell the index."""

    def __len__(self):
        return 12

    def read(self, index):
        rows = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3) * (index + 3) % 251
        return Image.fromarray(rows.astype(np.uint8)), index % 4, self.path(index)


@TRANSFORMS
def test_a_sample_is_the_same_each_time(transform):
    dataset = Gradients(transform)
    first = dataset[SampleKey(5, 2, 1)]['inputs']
    dataset[SampleKey(6, 2, 1)]
    assert torch.equal(dataset[SampleKey(5, 2, 1)]['inputs'], first)
    assert torch.equal(Gradients(transform)[SampleKey(5, 2, 1)]['inputs'], first)


@TRANSFORMS
@pytest.mark.parametrize('other', [{'epoch': 3}, {'draw': 2}, {'seed': 1}], ids=['epoch', 'draw', 'seed'])
def test_epoch_draw_and_seed_change_the_augmentation(transform, other):
    other = dict(other)
    ours, theirs = Gradients(transform), Gradients(transform, seed=other.pop('seed', 0))
    keys = [SampleKey(index, 2, 1) for index in range(12)]
    assert any(not torch.equal(ours[key]['inputs'], theirs[key._replace(**other)]['inputs']) for key in keys)


@pytest.mark.parametrize('workers', [1, 2])
def test_the_number_of_workers_does_not_matter(workers):
    def epoch(count):
        dataset = Gradients(RAND_AUGMENT, seed=7)
        loader = DataLoader(dataset, 4, sampler=SeededSampler(dataset, seed=7), num_workers=count,
                            collate_fn=collate_images)
        return [batch['inputs'] for batch in loader]

    assert all(torch.equal(a, b) for a, b in zip(epoch(0), epoch(workers), strict=True))


@TRANSFORMS
def test_reading_leaves_the_global_generators_alone(transform):
    dataset = Gradients(transform)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    dataset[0]
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002


def test_generators_come_back_after_an_error():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(KeyError), sample_rng(0, SampleKey(1)):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_has_the_agreed_form():
    batch = collate_images([Gradients(LIGHT)[index] for index in (3, 9)])
    assert batch['inputs'].shape == (2, 3, 32, 32) and batch['inputs'].dtype == torch.uint8
    assert batch['labels'].tolist() == [3, 1] and batch['labels'].dtype == torch.int64
    assert batch['paths'] == ['Gradients[3]', 'Gradients[9]'] and batch['indices'] == [3, 9]


def test_images_of_different_shapes_are_refused():
    samples = [{'inputs': torch.zeros(3, side, side), 'label': 0, 'path': '', 'index': 0} for side in (4, 5)]
    with pytest.raises(ValueError, match='different shapes.*resize or crop'):
        collate_images(samples)
