"""How close drawn pictures come to real ones, from features of both: Fréchet distance, inception score, precision.

The functions take features of any network. Numbers of two papers compare only where network, preprocessing and number
of pictures are the same: FID means the Inception network of 2015 and, by custom, 50,000 drawn pictures.
"""
import logging
from typing import NamedTuple

import numpy as np
import torch

__all__ = ['Moments', 'frechet_distance', 'inception_score', 'moments', 'precision_recall']

logger = logging.getLogger('visionssm')


class Moments(NamedTuple):
    """Mean and covariance of the features of a set of pictures."""
    mean: torch.Tensor
    """(D,) in float64."""
    covariance: torch.Tensor
    """(D, D) in float64, unbiased."""
    pictures: int | None = None
    """Number of pictures; None where it is not known."""


def moments(features: torch.Tensor) -> Moments:
    """Mean and covariance.

    Args:
        features: (N, D), a row a picture.

    Returns:
        The moments.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f'features have shape {tuple(features.shape)}; give (N, D) with two pictures or more')
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).any(1).nonzero()[0])
        raise ValueError(f'the features of picture {bad} are not finite')
    mean = features.mean(0, dtype=torch.float64)
    total = mean.new_zeros(len(mean), len(mean))
    # in pieces, because a float64 copy of 50,000 x 2048 features takes 800 MB
    for piece in features.split(8192):
        centred = piece.double() - mean
        total += centred.T @ centred
    return Moments(mean, total / (len(features) - 1), len(features))


def _square_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    # what is zero comes out as rounding noise of either sign, whose root would be eight digits larger
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return (vectors * values.where(values > noise, 0.0).sqrt()) @ vectors.T


def frechet_distance(first: Moments | torch.Tensor, second: Moments | torch.Tensor) -> float:
    """Squared Fréchet distance of two normal distributions (Heusel et al. 2017, arXiv 1706.08500).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root is the sum of the singular values of
    C1^(1/2) C2^(1/2), which exist also where a covariance is singular, as it is with fewer pictures than features.

    Args:
        first: Features (N, D) of one set of pictures, or their moments.
        second: Those of the other set.

    Returns:
        The distance, not negative; the same for either order.
    """
    one, two = (item if isinstance(item, Moments) else moments(item) for item in (first, second))
    one, two = (Moments(item.mean.double(), item.covariance.double(), item.pictures) for item in (one, two))
    size = len(one.mean)
    for item in (one, two):
        if item.mean.shape != (size,) or item.covariance.shape != (size, size):
            raise ValueError(f'the moments have means of {tuple(one.mean.shape)} and {tuple(two.mean.shape)}, '
                             f'covariances of {tuple(one.covariance.shape)} and {tuple(two.covariance.shape)}; both '
                             'must come from the same features')
        if not (torch.isfinite(item.mean).all() and torch.isfinite(item.covariance).all()):
            raise ValueError('mean or covariance has entries that are not finite')
        if item.pictures is not None and item.pictures <= size:
            logger.warning('a covariance of %d features from %d pictures is singular and the distance biased upwards; '
                           'more than %d pictures are needed, and papers take 50,000', size, item.pictures, size)
    root = torch.linalg.svdvals(_square_root(one.covariance) @ _square_root(two.covariance)).sum()
    trace = one.covariance.trace() + two.covariance.trace()
    # rounding may leave a trace of a negative number between equal sets
    return max(0.0, float((one.mean - two.mean).square().sum() + trace - 2 * root))


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int | None = 2020) -> tuple[float, float]:
    """Inception score, exp(E KL(p(y|x) || p(y))), over equal parts of the pictures (Salimans et al. 2016).

    Args:
        logits: Scores of a classifier for drawn pictures, (N, K), before the softmax; log-probabilities serve as well.
        splits: Number of parts.
        seed: Of the order in which pictures are dealt to the parts, so that no part holds one class alone; None keeps
            the order. The default gives the parts that torch-fidelity takes.

    Returns:
        Mean and standard deviation over the parts.
    """
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise ValueError(f'splits is {splits} and logits have shape {tuple(logits.shape)}; give (N, K) and from 1 to '
                         'N parts')
    if seed is not None:
        order = np.random.RandomState(seed).permutation(len(logits))  # noqa: NPY002  # torch-fidelity's generator
        logits = logits[torch.from_numpy(order).to(logits.device)]
    scores = []
    for part in range(splits):
        rows = logits[part * len(logits) // splits:(part + 1) * len(logits) // splits].double()
        log_p = rows.log_softmax(1)
        marginal = log_p.logsumexp(0) - np.log(len(rows))
        scores.append(float((log_p.exp() * (log_p - marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def _radii(features: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
    """Distance of each point to its k-th nearest neighbour."""
    # the point itself is the nearest one
    return torch.cat([torch.cdist(piece, features).kthvalue(k + 1, dim=1).values for piece in features.split(chunk)])


def _covered(points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor, chunk: int) -> float:
    """Share of the points that lie in the ball of some centre."""
    inside = sum(int((torch.cdist(piece, centres) <= radii).any(1).sum()) for piece in points.split(chunk))
    return inside / len(points)


def precision_recall(
        real: torch.Tensor,
        drawn: torch.Tensor,
        k: int = 3,
        chunk: int = 1024,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    Precision is the share of drawn pictures within the balls around real ones, recall that of real pictures within the
    balls around drawn ones; a ball reaches to the k-th nearest neighbour in its own set.

    Args:
        real: Features (N, D).
        drawn: Features (M, D), on the same device.
        k: Which neighbour.
        chunk: Pictures that are compared with all others at a time: chunk x N distances are in memory.

    Returns:
        Precision and recall, from 0 to 1.
    """
    if real.ndim != 2 or drawn.ndim != 2 or real.shape[1] != drawn.shape[1]:
        raise ValueError(f'features have shapes {tuple(real.shape)} and {tuple(drawn.shape)}; give (N, D) and (M, D)')
    if not 1 <= k < min(len(real), len(drawn)):
        raise ValueError(f'k is {k} for {len(real)} real and {len(drawn)} drawn pictures; it must be at least 1 and '
                         'less than both')
    if chunk < 1:
        raise ValueError(f'chunk is {chunk}; it must be at least 1')
    # distances come from products, which lose digits far from the origin
    middle = real.mean(0)
    real, drawn = real - middle, drawn - middle
    return (_covered(drawn, real, _radii(real, k, chunk), chunk),
            _covered(real, drawn, _radii(drawn, k, chunk), chunk))
