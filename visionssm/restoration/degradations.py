"""What makes good images bad: bicubic shrinking, noise, JPEG, and the chain of faults of photographs from the web.

Images are (C, H, W) with values in [0, 1]; whatever is drawn comes from a `torch.Generator`, so that a sample can be
made again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torchvision.io import decode_jpeg, encode_jpeg

from .metrics import to_uint8
from .resize import imresize

__all__ = ['SecondOrderDegradation', 'Stage', 'add_gaussian_noise', 'add_poisson_noise', 'blur', 'compress_jpeg',
           'draw_kernel', 'sinc_kernel', 'shrink_bicubic']

Range = tuple[float, float]


def draw_uniform(low: float, high: float, generator: torch.Generator | None) -> float:
    """Draw a number from [low, high)."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def draw_index(weights: Sequence[float], generator: torch.Generator | None) -> int:
    """Draw an index with probabilities proportional to `weights`."""
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator))


def shrink_bicubic(x: torch.Tensor, scale: int, bytes_only: bool = True) -> torch.Tensor:
    """Shrink as the benchmarks' images were shrunk.

    Args:
        x: Image, (C, H, W).
        scale: How many times; the sides are cropped to a multiple of it first.
        bytes_only: Round to 256 values, as a file would.

    Returns:
        (C, H / scale, W / scale).
    """
    height, width = (side - side % scale for side in x.shape[-2:])
    if not height or not width:
        raise ValueError(f'An image of {x.shape[-2]} x {x.shape[-1]} pixels cannot be shrunk {scale} times.')
    small = imresize(x[..., :height, :width], 1 / scale)
    return to_uint8(small).to(x.dtype) / 255 if bytes_only else small


def add_gaussian_noise(
        x: torch.Tensor,
        sigma: float,
        generator: torch.Generator | None = None,
        gray: bool = False,
) -> torch.Tensor:
    """Add Gaussian noise, which is not clipped.

    Args:
        x: Image, (C, H, W).
        sigma: Deviation, in units of 1 / 255.
        generator: Source of randomness.
        gray: The same noise in all channels.
    """
    shape = (1, *x.shape[1:]) if gray else x.shape
    return x + sigma / 255 * torch.randn(shape, generator=generator, dtype=x.dtype)


def add_poisson_noise(
        x: torch.Tensor,
        scale: float,
        generator: torch.Generator | None = None,
        gray: bool = False,
) -> torch.Tensor:
    """Add the noise of counted photons, which grows with the brightness.

    Args:
        x: Image, (C, H, W).
        scale: Factor of the noise.
        generator: Source of randomness.
        gray: The noise of the mean of the channels, in all of them.
    """
    light = (x.mean(0, keepdim=True) if gray else x).clamp(0, 1)
    light = to_uint8(light).to(x.dtype) / 255
    # as many photons for white as there are brightnesses in the image, to the next power of two
    photons = 2 ** math.ceil(math.log2(max(light.unique().numel(), 2)))
    return x + scale * (torch.poisson(light * photons, generator=generator) / photons - light)


def compress_jpeg(x: torch.Tensor, quality: int) -> torch.Tensor:
    """Write and read a JPEG of a quality from 1 to 100."""
    if not 1 <= quality <= 100:
        raise ValueError(f'quality is {quality}; JPEG knows 1 to 100.')
    return decode_jpeg(encode_jpeg(to_uint8(x), quality)).to(x.dtype) / 255


def blur(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Convolve an image (C, H, W) with a kernel of odd sides, (k, l), mirrored at the borders."""
    at = [torch.arange(-(size // 2), side + size // 2, device=x.device) % max(2 * side - 2, 1)
          for side, size in zip(x.shape[1:], kernel.shape)]
    rows, columns = (torch.minimum(i, 2 * side - 2 - i) if side > 1 else i * 0 for i, side in zip(at, x.shape[1:]))
    padded = x[:, rows][:, :, columns]
    return F.conv2d(padded.unsqueeze(1), kernel.to(x)[None, None]).squeeze(1)


def _grid(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.arange(size, dtype=torch.float64) - size // 2
    return at[:, None].expand(size, size), at.expand(size, size)


def _distance(size: int, sigma: Range, angle: float) -> torch.Tensor:
    """Return the squared distance from the centre in units of two deviations along turned axes."""
    y, x = _grid(size)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return (along / sigma[0]).square() + (across / sigma[1]).square()


def sinc_kernel(size: int, cutoff: float) -> torch.Tensor:
    """Return a circular low-pass filter, which rings at edges.

    Args:
        size: Side of the kernel, odd.
        cutoff: Cut-off frequency in radians a pixel.
    """
    y, x = _grid(size)
    radius = (x.square() + y.square()).sqrt()
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff ** 2 / (4 * math.pi)
    return kernel / kernel.sum()


KERNELS = ('gaussian', 'anisotropic', 'generalised', 'generalised_anisotropic', 'plateau', 'plateau_anisotropic')


@dataclass(frozen=True)
class Stage:
    """Ranges and probabilities of one stage of faults; the defaults are the first stage of Real-ESRGAN.

    Attributes:
        blur: Probability of a blur.
        kernels: Weights of the kernels `KERNELS`.
        sinc: Probability that the kernel rings instead.
        sigma: Deviations of the kernels, in pixels.
        generalised: Exponents of the generalised kernels.
        plateau: Exponents of the kernels with a plateau.
        resize: Weights of enlarging, shrinking and keeping.
        factors: Least and largest factor of the size.
        gaussian: Probability that the noise is Gaussian; else it is Poisson's.
        noise: Deviations of Gaussian noise, in units of 1 / 255.
        poisson: Factors of Poisson noise.
        gray: Probability that the noise is gray.
        quality: Of the JPEG.
    """

    blur: float = 1.0
    kernels: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sinc: float = 0.1
    sigma: Range = (0.2, 3.0)
    generalised: Range = (0.5, 4.0)
    plateau: Range = (1.0, 2.0)
    resize: tuple[float, float, float] = (0.2, 0.7, 0.1)
    factors: Range = (0.15, 1.5)
    gaussian: float = 0.5
    noise: Range = (1.0, 30.0)
    poisson: Range = (0.05, 3.0)
    gray: float = 0.4
    quality: tuple[int, int] = (30, 95)


SECOND_STAGE = Stage(
    blur=0.8, sigma=(0.2, 1.5), resize=(0.3, 0.4, 0.3), factors=(0.3, 1.2), noise=(1.0, 25.0), poisson=(0.05, 2.5))


def draw_kernel(stage: Stage, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw a blur kernel of an odd side from 7 to 21, normalised."""
    size = 2 * int(torch.randint(3, 11, (), generator=generator)) + 1
    if draw_uniform(0, 1, generator) < stage.sinc:
        return sinc_kernel(size, draw_uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi, generator))
    kind = KERNELS[draw_index(stage.kernels, generator)]
    sigma = draw_uniform(*stage.sigma, generator)
    other = draw_uniform(*stage.sigma, generator) if kind.endswith('anisotropic') else sigma
    angle = draw_uniform(-math.pi, math.pi, generator) if kind.endswith('anisotropic') else 0.
    distance = _distance(size, (sigma, other), angle)
    if kind.startswith('generalised'):
        kernel = torch.exp(-0.5 * distance ** draw_uniform(*stage.generalised, generator))
    elif kind.startswith('plateau'):
        kernel = 1 / (1 + distance ** draw_uniform(*stage.plateau, generator))
    else:
        kernel = torch.exp(-0.5 * distance)
    return kernel / kernel.sum()


def _resize(x: torch.Tensor, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    mode = ('area', 'bilinear', 'bicubic')[draw_index((1, 1, 1), generator)]
    align = None if mode == 'area' else False
    return F.interpolate(x[None], size=(height, width), mode=mode, align_corners=align)[0]


@dataclass(frozen=True)
class SecondOrderDegradation:
    """The faults of photographs that were taken, shrunk, saved and shared twice over.

    Blur, resizing, noise and JPEG in two stages, then a resizing to the small size and a ringing filter around a last
    JPEG, with the probabilities of Real-ESRGAN (https://arxiv.org/abs/2107.10833).

    Attributes:
        scale: How many times smaller the result is.
        first: First stage.
        second: Second stage.
        final_sinc: Probability of the last ringing filter.
    """

    scale: int = 4
    first: Stage = field(default_factory=Stage)
    second: Stage = SECOND_STAGE
    final_sinc: float = 0.8

    def __call__(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Spoil an image.

        Args:
            x: Image, (C, H, W), with sides that `scale` divides.
            generator: Source of randomness.

        Returns:
            (C, H / scale, W / scale) with 256 values in [0, 1].
        """
        height, width = x.shape[-2:]
        if height % self.scale or width % self.scale or not height or not width:
            raise ValueError(f'The sides {height} x {width} are no multiples of the scale {self.scale}; crop first.')
        x = self._spoil(x, self.first, (height, width), generator)
        x = self._compress(x, self.first, generator)
        x = self._spoil(x, self.second, (height // self.scale, width // self.scale), generator)
        small = (height // self.scale, width // self.scale)
        ending: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda y: self._ring(_resize(y, *small, generator), generator),
            lambda y: self._compress(y, self.second, generator)]
        if draw_uniform(0, 1, generator) < 0.5:
            ending.reverse()
        for step in ending:
            x = step(x)
        return to_uint8(x).to(x.dtype) / 255

    @staticmethod
    def _spoil(x: torch.Tensor, stage: Stage, size: tuple[int, int], generator: torch.Generator | None) -> torch.Tensor:
        if draw_uniform(0, 1, generator) < stage.blur:
            x = blur(x, draw_kernel(stage, generator))
        way = draw_index(stage.resize, generator)
        factor = (draw_uniform(1, stage.factors[1], generator), draw_uniform(stage.factors[0], 1, generator), 1.)[way]
        x = _resize(x, max(1, int(size[0] * factor)), max(1, int(size[1] * factor)), generator)
        gray = draw_uniform(0, 1, generator) < stage.gray
        if draw_uniform(0, 1, generator) < stage.gaussian:
            return add_gaussian_noise(x, draw_uniform(*stage.noise, generator), generator, gray).clamp(0, 1)
        return add_poisson_noise(x, draw_uniform(*stage.poisson, generator), generator, gray).clamp(0, 1)

    @staticmethod
    def _compress(x: torch.Tensor, stage: Stage, generator: torch.Generator | None) -> torch.Tensor:
        low, high = stage.quality
        return compress_jpeg(x, int(torch.randint(low, high + 1, (), generator=generator)))

    def _ring(self, x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        if draw_uniform(0, 1, generator) >= self.final_sinc:
            return x
        size = 2 * int(torch.randint(3, 11, (), generator=generator)) + 1
        return blur(x, sinc_kernel(size, draw_uniform(math.pi / 3, math.pi, generator)))
