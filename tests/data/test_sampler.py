"""The sampler: same order everywhere, exact division among processes, resumption in mid-epoch."""
from itertools import islice

import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from visionssm.openmmlab import data
from visionssm.openmmlab.data import SampleKey, SeededSampler


def sampler_of(monkeypatch, size, rank=0, world=1, **kwargs):
    monkeypatch.setattr(data, 'get_dist_info', lambda: (rank, world))
    return SeededSampler(range(size), **{'seed': 5, **kwargs})


def test_an_epoch_visits_every_sample_once(monkeypatch):
    assert sorted(key.index for key in sampler_of(monkeypatch, 37)) == list(range(37))


def test_epochs_differ_and_repeat_exactly(monkeypatch):
    sampler = sampler_of(monkeypatch, 37)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([key.index for key in sampler])
    assert orders[0] == orders[2] != orders[1]


def test_keys_carry_the_epoch(monkeypatch):
    sampler = sampler_of(monkeypatch, 5)
    sampler.set_epoch(3)
    assert {key.epoch for key in sampler} == {3}


@pytest.mark.parametrize('world', [2, 3])
def test_processes_together_see_the_batches_of_one_process(monkeypatch, world):
    whole = list(sampler_of(monkeypatch, 36))
    parts = [list(sampler_of(monkeypatch, 36, rank, world)) for rank in range(world)]
    step = 12 // world
    for start in range(0, 36, 12):
        together = [key for part in parts for key in part[start // world:start // world + step]]
        assert sorted(together) == sorted(whole[start:start + 12])


def test_rounding_up_gives_all_processes_equally_many(monkeypatch):
    parts = [list(sampler_of(monkeypatch, 10, rank, 4)) for rank in range(4)]
    assert [len(part) for part in parts] == [3, 3, 3, 3]
    assert {key.index for part in parts for key in part} == set(range(10))


def test_without_rounding_no_sample_is_seen_twice(monkeypatch):
    parts = [list(sampler_of(monkeypatch, 10, rank, 4, round_up=False)) for rank in range(4)]
    assert sorted(key.index for part in parts for key in part) == list(range(10))


@pytest.mark.parametrize('size', [100, 600], ids=['below-a-block', 'blocks-of-256'])
@pytest.mark.parametrize('rank,world', [(0, 1), (1, 4)])
def test_repeated_augmentation_has_timms_order(monkeypatch, size, rank, world):
    ours = sampler_of(monkeypatch, size, rank, world, seed=0, repeats=3)
    theirs = RepeatAugSampler(range(size), num_replicas=world, rank=rank, num_repeats=3)
    for epoch in (0, 2):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert [key.index for key in ours] == list(theirs)


def test_repeats_of_an_image_are_told_apart(monkeypatch):
    keys = list(sampler_of(monkeypatch, 30, repeats=3))
    assert len(set(keys)) == len(keys)
    assert {key.draw for key in keys} == {0, 1, 2}


def test_skipping_continues_where_the_epoch_stopped(monkeypatch):
    sampler = sampler_of(monkeypatch, 20)
    whole = list(sampler)
    sampler.skip(13)
    assert list(sampler) == whole[13:]
    assert list(sampler) == whole, 'only the next epoch is cut'


def test_infinite_sampling_passes_through_the_epochs(monkeypatch):
    stream = list(islice(sampler_of(monkeypatch, 7, infinite=True), 21))
    assert [key.epoch for key in stream] == [0] * 7 + [1] * 7 + [2] * 7
    skipping = sampler_of(monkeypatch, 7, infinite=True)
    skipping.skip(9)
    assert list(islice(skipping, 12)) == stream[9:]


@pytest.mark.parametrize('kwargs,problem', [({'repeats': 0}, 'repeats=0')])
def test_impossible_settings_are_refused(monkeypatch, kwargs, problem):
    with pytest.raises(ValueError, match=problem):
        sampler_of(monkeypatch, 4, **kwargs)


def test_a_key_is_what_the_loader_hands_to_the_dataset(monkeypatch):
    loader = torch.utils.data.DataLoader(list(range(4)), sampler=sampler_of(monkeypatch, 4), batch_size=2)
    assert [type(key) for batch in loader.batch_sampler for key in batch] == [SampleKey] * 4
