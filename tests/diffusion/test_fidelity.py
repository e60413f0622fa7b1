"""Fréchet distance, inception score, precision and recall: against closed forms and the libraries of the field."""
import logging

import numpy as np
import pytest
import torch

from visionssm.diffusion.fidelity import Moments, frechet_distance, inception_score, moments, precision_recall


def cloud(number: int, size: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64) / size ** 0.5
    return torch.randn(number, size, generator=generator, dtype=torch.float64) @ mix + shift


def as_numpy(item: Moments) -> dict[str, np.ndarray]:
    return {'mu': item.mean.numpy(), 'sigma': item.covariance.numpy()}


def test_moments_are_those_of_numpy():
    features = cloud(9000, 5, 0, shift=3.0)
    found = moments(features.float())
    assert found.pictures == 9000 and found.covariance.dtype == torch.float64
    np.testing.assert_allclose(found.mean, features.float().double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.float().double().numpy(), rowvar=False), rtol=1e-10)


def test_the_distance_is_that_of_torch_fidelity_and_of_scipy():
    one, two = moments(cloud(400, 48, 1)), moments(cloud(300, 48, 2, shift=0.3))
    found = frechet_distance(one, two)
    library = pytest.importorskip('torch_fidelity.metric_fid')
    expected = library.fid_statistics_to_metric(as_numpy(one), as_numpy(two), False)['frechet_inception_distance']
    assert found == pytest.approx(expected, rel=1e-6)
    linalg = pytest.importorskip('scipy.linalg')
    root = linalg.sqrtm(one.covariance.numpy() @ two.covariance.numpy()).real
    trace = float((one.covariance + two.covariance).trace()) - 2 * root.trace()
    expected = float((one.mean - two.mean).square().sum()) + trace
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_distance_of_commuting_covariances_has_a_closed_form():
    one = Moments(torch.tensor([1.0, -2.0]), torch.diag(torch.tensor([4.0, 9.0])))
    two = Moments(torch.tensor([0.0, 1.0]), torch.diag(torch.tensor([1.0, 25.0])))
    assert frechet_distance(one, two) == pytest.approx(1 + 9 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-12)


def test_singular_covariances_give_the_exact_distance():
    one, two = cloud(20, 64, 3), cloud(30, 64, 4, shift=0.5)
    # the trace of the root is the nuclear norm of the product of the centred features
    product = (one - one.mean(0)) @ (two - two.mean(0)).T / (19 * 29) ** 0.5
    root = torch.linalg.svdvals(product).sum()
    trace = moments(one).covariance.trace() + moments(two).covariance.trace()
    expected = float((one.mean(0) - two.mean(0)).square().sum() + trace - 2 * root)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('number', [10, 500])
def test_the_distance_is_symmetric_and_zero_for_equal_sets(number):
    one, two = cloud(number, 32, 5), cloud(number, 32, 6)
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), rel=1e-12)
    scale = float(moments(one).covariance.trace())
    assert 0 <= frechet_distance(one, one) < 1e-9 * scale
    assert 0 <= frechet_distance(one, one.flip(0)) < 1e-9 * scale


def test_features_without_any_spread_give_the_distance_of_the_means():
    assert frechet_distance(torch.zeros(4, 3), torch.full((5, 3), 2.0)) == pytest.approx(12.0)


def test_too_few_pictures_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, 'visionssm'):
        frechet_distance(cloud(100, 8, 7), cloud(100, 8, 8))
        assert not caplog.records
        frechet_distance(cloud(8, 8, 7), cloud(100, 8, 8))
    assert '8 features from 8 pictures' in caplog.text


def test_the_inception_score_is_that_of_torch_fidelity():
    library = pytest.importorskip('torch_fidelity.metric_isc')
    logits = cloud(107, 12, 9).float() * 3
    expected = library.isc_features_to_metric(logits, splits=10)
    assert inception_score(logits) == pytest.approx(
        (expected['inception_score_mean'], expected['inception_score_std']), rel=1e-6)


def test_the_inception_score_counts_classes_that_are_told_apart():
    logits = torch.eye(4).repeat(25, 1) * 1000
    mean, deviation = inception_score(logits, splits=1)
    assert (mean, deviation) == (pytest.approx(4.0), 0.0)
    assert inception_score(torch.zeros(40, 4))[0] == pytest.approx(1.0)
    # sorted by class, parts in order would hold one class each
    assert inception_score(logits.sort(0).values, splits=2, seed=None)[0] < inception_score(logits, splits=2)[0]


@pytest.mark.parametrize('chunk', [7, 1024])
def test_precision_and_recall_are_those_of_torch_fidelity(chunk):
    library = pytest.importorskip('torch_fidelity.metric_prc')
    real, drawn = cloud(60, 6, 10).float(), cloud(45, 6, 11, shift=0.8).float()
    expected = library.calculate_precision_recall_full(drawn, real)
    assert 0.05 < expected[0] < 0.95
    assert precision_recall(real, drawn, chunk=chunk) == pytest.approx(expected)


def test_precision_and_recall_tell_missing_modes_from_wrong_pictures():
    points = cloud(80, 4, 12)
    far = points + 1000
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, far) == (0.0, 0.0)
    # real pictures of two modes, drawn ones of the first alone
    assert precision_recall(torch.cat([points, far]), points) == (1.0, 0.5)
    assert precision_recall(points, torch.cat([points, far])) == (0.5, 1.0)


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: moments(torch.zeros(1, 4)), r'\(1, 4\)'),
    (lambda: moments(torch.tensor([[0.0], [torch.nan]])), 'picture 1'),
    (lambda: frechet_distance(torch.zeros(5, 2), torch.zeros(5, 3)), 'same features'),
    (lambda: frechet_distance(Moments(torch.zeros(2), torch.eye(2) * torch.inf), torch.zeros(5, 2)), 'not finite'),
    (lambda: inception_score(torch.zeros(5, 2)), 'splits is 10'),
    (lambda: precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)), 'k is 3 for 3 real'),
    (lambda: precision_recall(torch.zeros(9, 2), torch.zeros(9, 3)), r'\(9, 3\)'),
    (lambda: precision_recall(torch.zeros(9, 2), torch.zeros(9, 2), chunk=0), 'chunk is 0'),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
