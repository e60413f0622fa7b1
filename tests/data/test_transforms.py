"""Transforms: values and shapes, against timm's own pipeline where there is one."""
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from visionssm.openmmlab.transforms import Albumentations, PixelErasing, ShiftFlip, TimmTransform, to_tensor


@pytest.fixture
def photo():
    pixels = np.random.default_rng(1).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize('shape,expected', [((5, 7), (1, 5, 7)), ((5, 7, 3), (3, 5, 7))], ids=['grey', 'colour'])
def test_arrays_become_channel_first(shape, expected):
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    tensor = to_tensor(pixels)
    assert tensor.shape == expected and tensor.dtype == torch.uint8
    assert tensor[0, 2, 4] == (pixels[2, 4] if pixels.ndim == 2 else pixels[2, 4, 0])


def test_evaluation_equals_timms_normalised_pipeline(photo):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    ours = TimmTransform(input_size=32, interpolation='bicubic', crop_pct=0.875)(photo)
    theirs = create_transform(32, interpolation='bicubic', crop_pct=0.875, mean=mean, std=std)(photo)
    column = [torch.tensor(values).view(3, 1, 1) for values in (mean, std)]
    torch.testing.assert_close((ours.float() / 255 - column[0]) / column[1], theirs, atol=1e-6, rtol=0)


def test_erasing_fills_with_standard_normal_noise_after_normalisation():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    erase = PixelErasing(1.0, 'pixel', 1, mean, std)
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    column = [torch.tensor(values).view(3, 1, 1) for values in (mean, std)]
    noise = []
    for seed in range(20):
        random.seed(seed)
        result = erase(image)
        changed = (result - image / 255).abs().amax(dim=0) > 1e-5
        assert 0.02 * 0.9 <= changed.float().mean() <= 0.34
        noise.append(((result - column[0]) / column[1])[:, changed].flatten())
    noise = torch.cat(noise)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_erasing_is_off_in_evaluation(photo):
    assert TimmTransform(input_size=32, re_prob=1.0)(photo).dtype == torch.uint8


@pytest.mark.parametrize('build', [
    lambda: TimmTransform(32, is_training=True, hflp=0.5),
    lambda: Albumentations([{'type': 'HorizontalFlip', 'hflp': 0.5}])], ids=['timm', 'albumentations'])
def test_a_misspelt_argument_is_an_error(build):
    with pytest.raises(ValueError, match="has no argument 'hflp'.* It takes .*"):
        build()


def test_albumentations_runs_a_pipeline_from_configs(photo):
    flip = Albumentations([{'type': 'HorizontalFlip', 'p': 1.0}, {'type': 'Resize', 'height': 25, 'width': 30}])
    expected = np.asarray(photo)[:, ::-1]
    result = flip(photo)
    assert result.shape == (3, 25, 30)
    assert abs(result.float().mean() - expected.mean()) < 1


def test_albumentations_keeps_grey_images_at_one_channel():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert Albumentations([{'type': 'VerticalFlip', 'p': 1.0}])(grey)[0, 0].tolist() == list(range(56, 64))


@pytest.mark.parametrize('config', [{'type': 'NoSuchThing'}, {'p': 0.5}], ids=['unknown', 'no-type'])
def test_a_wrong_albumentations_step_is_named(config):
    with pytest.raises(ValueError, match='albumentations has no transform'):
        Albumentations([config])


@pytest.mark.parametrize('size,shape', [(None, (1, 4, 6)), (8, (1, 8, 8)), (2, (1, 2, 2))],
                         ids=['as-is', 'padded', 'cropped'])
def test_light_transform_centres_when_it_does_not_shift(size, shape):
    image = np.arange(1, 25, dtype=np.uint8).reshape(4, 6)
    result = ShiftFlip(size=size)(image)
    assert result.shape == shape
    expected = {None: image, 8: np.pad(image, ((2, 2), (1, 1))), 2: image[1:3, 2:4]}[size]
    assert result[0].tolist() == expected.tolist()


def test_light_transform_shifts_within_its_range_and_fills_with_black():
    image = np.zeros((9, 9), dtype=np.uint8)
    image[4, 4] = 255
    places = set()
    for seed in range(300):
        random.seed(seed)
        result = ShiftFlip(shift=1)(image)
        assert result.sum() == 255
        places.add(tuple(result[0].nonzero()[0].tolist()))
    assert places == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}


def test_light_transform_mirrors_with_its_probability():
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert ShiftFlip(flip=1.0)(image)[0].tolist() == image[:, ::-1].tolist()
    random.seed(0)
    mirrored = [ShiftFlip(flip=0.25)(image)[0].tolist() == image[:, ::-1].tolist() for _ in range(400)]
    assert 60 < sum(mirrored) < 140
