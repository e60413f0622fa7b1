"""The Gaussian diffusion process: its tables, noisy images, and the training loss with a learned variance.

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, a_t being the product of 1 - beta up to step t. The loss is that of
"Improved Denoising Diffusion Probabilistic Models" (https://arxiv.org/abs/2102.09672), which DiT and DiS train with;
samplers come from the package diffusers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from visionssm.utils.suggest import check_choice

__all__ = ['GaussianDiffusion', 'Posterior', 'make_betas', 'respaced_timesteps']

PREDICTIONS = ('epsilon', 'v_prediction', 'sample')


def make_betas(schedule: str = 'linear', steps: int = 1000) -> torch.Tensor:
    """Return the variance of the noise that each step adds, (steps,) in float64.

    Args:
        schedule: 'linear', 1e-4 to 0.02 for 1000 steps and scaled for others; 'squaredcos_cap_v2', a squared cosine.
        steps: Steps of the process.
    """
    check_choice('schedule', schedule, ('linear', 'squaredcos_cap_v2'))
    if steps < 1:
        raise ValueError(f'steps is {steps}; at least 1 is needed.')
    if schedule == 'linear':
        scale = 1000 / steps
        return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    at = torch.arange(steps + 1, dtype=torch.float64) / steps
    level = torch.cos((at + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


def respaced_timesteps(steps: int, respacing: str | Sequence[int] = '') -> list[int]:
    """Choose the steps of a shorter process.

    Args:
        steps: Steps of the whole process.
        respacing: '' for all; 'ddimN', N steps of one integer stride; else the number of steps of each of equal
            sections, as '10,15,20' or a list.

    Returns:
        The chosen steps, rising.
    """
    if isinstance(respacing, str) and respacing.startswith('ddim'):
        wanted = int(respacing[4:])
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == wanted:
                return list(range(0, steps, stride))
        raise ValueError(f'No integer stride gives {wanted} of {steps} steps; use {wanted!r} without ddim.')
    counts = [int(part) for part in respacing.split(',') if part] if isinstance(respacing, str) else list(respacing)
    counts = counts or [steps]
    chosen: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f'respacing asks for {count} of the {size} steps of section {i}; 1 to {size} are there.')
        gap = 1. if count == 1 else (size - 1) / (count - 1)
        chosen |= {start + round(gap * k) for k in range(count)}
        start += size
    return sorted(chosen)


class Posterior(NamedTuple):
    """What a model says about the step before: mean, logarithm of the variance, and the clean image."""

    mean: torch.Tensor
    log_variance: torch.Tensor
    sample: torch.Tensor


class GaussianDiffusion:
    """Tables of a diffusion process, and the training loss of a network that undoes its steps.

    The tables are computed in float64 and are no part of any model, so that no cast of its weights reaches them; images
    meet them in float32, or in float64 if they have it.
    """

    def __init__(
            self,
            steps: int = 1000,
            schedule: str = 'linear',
            respacing: str | Sequence[int] = '',
            prediction_type: str = 'epsilon',
            learn_sigma: bool = True,
            rescale_vlb: bool = False,
            snr_gamma: float | None = None,
    ) -> None:
        """Make the tables.

        Args:
            steps: Steps of the process.
            schedule: As in `make_betas`.
            respacing: As in `respaced_timesteps`.
            prediction_type: What the network returns: 'epsilon', the noise; 'v_prediction', sqrt(a) noise -
                sqrt(1 - a) image; 'sample', the clean image.
            learn_sigma: The network's output has a second half: where the logarithm of the variance lies between its
                bounds, from -1 to 1.
            rescale_vlb: Multiply the bound's term by steps / 1000.
            snr_gamma: Weight min(SNR, gamma) of the squared error ("min-SNR", https://arxiv.org/abs/2303.09556); equal
                weights when None.
        """
        check_choice('prediction_type', prediction_type, PREDICTIONS)
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f'snr_gamma is {snr_gamma}; it must be above 0, or None.')
        chosen = respaced_timesteps(steps, respacing)
        kept = (1 - make_betas(schedule, steps)).cumprod(0)[chosen]
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        betas = 1 - kept / before
        variance = betas * (1 - before) / (1 - kept)
        first = variance[1:2] if len(chosen) > 1 else betas
        self.timesteps = torch.tensor(chosen)
        self.betas = betas
        self.alphas_cumprod = kept
        # the first step has no posterior variance, its logarithm takes that of the second one
        self.posterior_log_variance = torch.cat([first, variance[1:]]).log()
        self._tables = {
            'sqrt_signal': kept.sqrt(), 'sqrt_noise': (1 - kept).sqrt(), 'recip': (1 / kept).sqrt(),
            'recip_minus_one': (1 / kept - 1).sqrt(), 'clean': betas * before.sqrt() / (1 - kept),
            'noisy': (1 - before) * (1 - betas).sqrt() / (1 - kept), 'low': self.posterior_log_variance,
            'high': betas.log(), 'snr': kept / (1 - kept)}
        self._copies: dict[tuple, dict[str, torch.Tensor]] = {}
        self.prediction_type = prediction_type
        self.learn_sigma = learn_sigma
        self.rescale_vlb = rescale_vlb
        self.snr_gamma = snr_gamma

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return len(self.betas)

    def _at(self, name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return entries of a table for steps t, to be broadcast with images."""
        key = (t.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
        if key not in self._copies:
            self._copies[key] = {name: table.to(*key) for name, table in self._tables.items()}
        return self._copies[key][name][t].view(-1, *[1] * (like.dim() - 1))

    def q_sample(self, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Add the noise of the first t + 1 steps.

        Args:
            x: Clean images, (B, C, H, W).
            t: Steps, (B,), integers below `num_steps`.
            noise: Of the shape of `x`.

        Returns:
            (B, C, H, W).
        """
        return self._at('sqrt_signal', t, x) * x + self._at('sqrt_noise', t, x) * noise

    def q_posterior(self, x: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> Posterior:
        """Return the distribution of the step before, given the clean image.

        Args:
            x: Clean images, (B, C, H, W).
            noisy: The same after step t.
            t: Steps, (B,).

        Returns:
            Mean, logarithm of the variance (to be broadcast), and `x`.
        """
        mean = self._at('clean', t, x) * x + self._at('noisy', t, x) * noisy
        return Posterior(mean, self._at('low', t, x), x)

    def p_posterior(self, output: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor, clip: bool = False) -> Posterior:
        """Return the distribution of the step before that a network's output means.

        Args:
            output: Of the network, (B, C or 2 C, H, W).
            noisy: What the network saw, (B, C, H, W).
            t: Steps, (B,).
            clip: Keep the clean image within [-1, 1].

        Returns:
            Mean, logarithm of the variance, and the clean image.
        """
        prediction, position = self.split(output)
        if self.prediction_type == 'sample':
            sample = prediction
        else:
            signal, noise = ('recip', 'recip_minus_one') if self.prediction_type == 'epsilon' else (
                'sqrt_signal', 'sqrt_noise')
            sample = self._at(signal, t, noisy) * noisy - self._at(noise, t, noisy) * prediction
        if clip:
            sample = sample.clamp(-1, 1)
        mean, low, _ = self.q_posterior(sample, noisy, t)
        if position is None:
            return Posterior(mean, low, sample)
        share = (position + 1) / 2
        return Posterior(mean, share * self._at('high', t, noisy) + (1 - share) * low, sample)

    def split(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Split a network's output into the prediction and the position of the variance, if it has one."""
        if not self.learn_sigma:
            return output, None
        prediction, position = output.chunk(2, dim=1)
        return prediction, position

    def bound(
            self,
            x: torch.Tensor,
            output: torch.Tensor,
            noisy: torch.Tensor,
            t: torch.Tensor,
            clip: bool = False,
    ) -> torch.Tensor:
        """Return the step's term of the variational bound in bits a value, (B,); arguments as in `p_posterior`."""
        true, model = self.q_posterior(x, noisy, t), self.p_posterior(output, noisy, t, clip)
        divergence = 0.5 * (
            model.log_variance - true.log_variance - 1 + torch.exp(true.log_variance - model.log_variance)
            + (true.mean - model.mean).square() * torch.exp(-model.log_variance))
        likelihood = -_discretised_log_likelihood(x, model.mean, 0.5 * model.log_variance)
        term = torch.where(t.view(-1, *[1] * (x.dim() - 1)) == 0, likelihood, divergence)
        return term.flatten(1).mean(1) / math.log(2)

    def losses(
            self,
            x: torch.Tensor,
            output: torch.Tensor,
            noise: torch.Tensor,
            t: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the training loss of every image.

        Args:
            x: Clean images, (B, C, H, W).
            output: Of the network for `q_sample(x, t, noise)`, (B, C or 2 C, H, W).
            noise: What was added, (B, C, H, W).
            t: Steps, (B,).

        Returns:
            'loss' (B,), the sum of 'mse' (B,) and, with a learned variance, 'vlb' (B,), which teaches the variance
            alone. All are computed in float32 at least.
        """
        x, output, noise = (value if value.dtype == torch.float64 else value.float() for value in (x, output, noise))
        expected = x.shape[1] * (2 if self.learn_sigma else 1)
        if output.shape[1] != expected:
            raise ValueError(f'The network returns {output.shape[1]} channels for images of {x.shape[1]}; '
                             f'learn_sigma={self.learn_sigma} needs {expected}.')
        prediction, position = self.split(output)
        target = noise if self.prediction_type == 'epsilon' else x
        if self.prediction_type == 'v_prediction':
            target = self._at('sqrt_signal', t, x) * noise - self._at('sqrt_noise', t, x) * x
        losses = {'mse': self._snr_weight(t, x) * (target - prediction).square().flatten(1).mean(1)}
        if position is not None:
            frozen = torch.cat([prediction.detach(), position], dim=1)
            scale = self.num_steps / 1000 if self.rescale_vlb else 1.
            losses['vlb'] = scale * self.bound(x, frozen, self.q_sample(x, t, noise), t)
        return {'loss': sum(losses.values()), **losses}

    def _snr_weight(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the weight of the squared error of what is predicted, (B,) or one for all."""
        if self.snr_gamma is None:
            return torch.ones((), device=t.device)
        snr = self._at('snr', t, x).flatten()
        scale = {'epsilon': snr, 'v_prediction': snr + 1, 'sample': torch.ones_like(snr)}[self.prediction_type]
        return snr.clamp(max=self.snr_gamma) / scale


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """Return an approximation of the distribution function of a normal variable."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def _discretised_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of bytes, scaled to [-1, 1], under a Gaussian."""
    centered, inverse = x - mean, torch.exp(-log_scale)
    upper = _normal_cdf(inverse * (centered + 1 / 255))
    lower = _normal_cdf(inverse * (centered - 1 / 255))
    inside = (upper - lower).clamp(min=1e-12)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, inside))
    return probability.clamp(min=1e-12).log()
