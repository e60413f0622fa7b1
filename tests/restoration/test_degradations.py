"""Degradations: each does what its formula says, and the same seed gives the same image."""
import math

import pytest
import torch

from visionssm.restoration.degradations import (
    KERNELS,
    SecondOrderDegradation,
    Stage,
    add_gaussian_noise,
    add_poisson_noise,
    blur,
    compress_jpeg,
    draw_kernel,
    shrink_bicubic,
    sinc_kernel,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(height: int = 48, width: int = 64) -> torch.Tensor:
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.stack([(rows * columns), (rows + columns) / 2, (8 * rows).sin().abs() * columns])


def test_noise_has_the_deviation_that_was_asked_for():
    x = torch.full((3, 200, 200), 0.5)
    noisy = add_gaussian_noise(x, 25, seeded())
    assert (noisy - x).std().item() == pytest.approx(25 / 255, rel=0.02)
    gray = add_gaussian_noise(x, 25, seeded(), gray=True) - x
    assert torch.allclose(gray[0], gray[2])


def test_photon_noise_grows_with_the_brightness():
    x = torch.stack([torch.full((300, 300), level) for level in (0.1, 0.4, 0.9)])
    x[:, 0, :256] = torch.arange(256) / 255
    error = (add_poisson_noise(x, 1., seeded()) - x)[:, 1:].flatten(1).std(1)
    for level, deviation in zip((0.1, 0.4, 0.9), error):
        assert deviation.item() == pytest.approx(math.sqrt(level / 256), rel=0.05)


def test_gray_photon_noise_is_the_same_in_all_channels():
    noise = add_poisson_noise(photo(), 1., seeded(), gray=True) - photo()
    assert noise.abs().max() > 0.01
    torch.testing.assert_close(noise[0], noise[2], rtol=0, atol=1e-6)


def test_a_worse_jpeg_is_further_away():
    x = photo()
    errors = [(compress_jpeg(x, quality) - x).abs().mean().item() for quality in (95, 50, 5)]
    assert errors == sorted(errors) and errors[0] < 0.02
    assert compress_jpeg(x[:1], 50).shape == (1, 48, 64)
    with pytest.raises(ValueError, match='1 to 100'):
        compress_jpeg(x, 0)


def test_blurring_keeps_constants_up_to_the_border_and_a_point_shows_the_kernel():
    kernel = draw_kernel(Stage(sinc=0.), seeded(3))
    assert torch.allclose(blur(torch.full((3, 5, 9), 0.7), kernel), torch.tensor(0.7))
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    half = len(kernel) // 2
    spread = blur(point, kernel)[0, 20 - half:21 + half, 20 - half:21 + half]
    assert torch.allclose(spread, kernel.flip(0, 1).float(), atol=1e-6)
    assert torch.allclose(blur(torch.full((1, 1, 1), 0.2), kernel), torch.tensor(0.2))


def test_kernels_are_normalised_whatever_is_drawn():
    for i in range(len(KERNELS)):
        weights = tuple(float(i == j) for j in range(len(KERNELS)))
        kernel = draw_kernel(Stage(kernels=weights, sinc=0.), seeded(i))
        assert kernel.sum().item() == pytest.approx(1) and kernel.min() >= 0
        assert torch.allclose(kernel, kernel.T) != KERNELS[i].endswith('anisotropic')
    ringing = sinc_kernel(21, math.pi / 3)
    assert ringing.sum().item() == pytest.approx(1) and ringing.min() < 0
    assert torch.allclose(ringing, ringing.T)


def test_shrinking_crops_to_a_multiple_and_rounds_to_bytes():
    small = shrink_bicubic(photo(50, 63), 4)
    assert small.shape == (3, 12, 15)
    assert torch.allclose(small * 255, (small * 255).round(), atol=1e-4)
    with pytest.raises(ValueError, match='cannot be shrunk'):
        shrink_bicubic(photo(3, 9), 4)


@pytest.mark.parametrize(('resize', 'grows'), [((1., 0., 0.), 1), ((0., 1., 0.), -1), ((0., 0., 1.), 0)])
def test_a_stage_enlarges_shrinks_or_keeps(resize: tuple, grows: int):
    stage = Stage(blur=0., resize=resize)
    sizes = [SecondOrderDegradation._spoil(photo(), stage, (48, 64), seeded(seed)).shape[1] for seed in range(5)]
    assert all((size > 48) - (size < 48) == grows for size in sizes) and (grows == 0 or len(set(sizes)) > 1)


@pytest.mark.parametrize('share', [0., 1.])
def test_the_last_filter_rings_as_often_as_was_asked_for(share: float):
    x = photo()
    rings = [not torch.equal(SecondOrderDegradation(final_sinc=share)._ring(x, seeded(seed)), x) for seed in range(5)]
    assert rings == [share == 1.] * 5


@pytest.mark.parametrize('seed', range(12))
def test_the_chain_of_faults_is_a_function_of_the_seed(seed):
    x = photo()
    spoil = SecondOrderDegradation(scale=4)
    first, again = spoil(x, seeded(seed)), spoil(x, seeded(seed))
    assert first.shape == (3, 12, 16) and torch.equal(first, again)
    assert torch.isfinite(first).all() and 0 <= first.min() and first.max() <= 1
    assert not torch.equal(first, spoil(x, seeded(seed + 100)))


def test_sides_that_the_scale_does_not_divide_are_refused():
    with pytest.raises(ValueError, match='no multiples of the scale 4'):
        SecondOrderDegradation()(photo(47, 64))
