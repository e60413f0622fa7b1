"""How close a restored image comes to the true one: PSNR and SSIM as the papers of the field compute them."""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['luma', 'psnr', 'ssim', 'ssim_volume', 'to_uint8']

_LUMA = (65.481, 128.553, 24.966)
_WINDOW, _SIGMA = 11, 1.5


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Return images in [0, 1] as bytes: clamped, and rounded half to even as the official tools do."""
    return (x.float().clamp(0, 1) * 255).round().to(torch.uint8)


def luma(x: torch.Tensor) -> torch.Tensor:
    """Return the Y channel of ITU-R BT.601 in its narrow range.

    Args:
        x: RGB images, (..., 3, H, W), with values in [0, 255]; gray ones, (..., 1, H, W), stay as they are.

    Returns:
        (..., 1, H, W) in float32, from 16 to 235 for RGB.
    """
    x = x.float() / 255
    if x.shape[-3] == 3:
        weights = torch.tensor(_LUMA, dtype=torch.float64, device=x.device).view(3, 1, 1)
        x = (((x.double() * weights).sum(-3, keepdim=True) + 16) / 255).float()
    elif x.shape[-3] != 1:
        raise ValueError(f'Expected RGB or gray images (..., 3 or 1, H, W), got {tuple(x.shape)}.')
    return x * 255


def _prepare(
        restored: torch.Tensor,
        target: torch.Tensor,
        border: int,
        y_channel: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check a pair, cut the border off and take the luma where asked for."""
    if restored.shape != target.shape or restored.dim() < 3:
        raise ValueError(f'Expected two images of one shape (..., C, H, W), got {tuple(restored.shape)} and '
                         f'{tuple(target.shape)}.')
    height, width = target.shape[-2:]
    if border < 0 or min(height, width) <= 2 * border:
        raise ValueError(f'border is {border}; of images of {height} x {width} pixels it leaves nothing.')
    pair = [x[..., border:height - border, border:width - border] for x in (restored, target)]
    pair = [luma(x) if y_channel else x.double() for x in pair]
    return pair[0], pair[1]


def psnr(
        restored: torch.Tensor,
        target: torch.Tensor,
        border: int = 0,
        y_channel: bool = False,
        peak: float = 255.,
) -> torch.Tensor:
    """Compute the peak signal-to-noise ratio, 20 log10(peak / sqrt(MSE)).

    Args:
        restored: Images, (..., C, H, W), with values in [0, peak].
        target: True images of the same shape.
        border: Pixels to leave out on every side; the scale in super-resolution.
        y_channel: Compare the luma of RGB images alone, in float32 as the official code; `peak` must be 255 then.
        peak: Largest possible value.

    Returns:
        One value in decibel an image, (...,) in float64; infinite for equal images.
    """
    restored, target = _prepare(restored, target, border, y_channel)
    mse = (restored - target).square().flatten(-3).mean(-1).double()
    return 20 * torch.log10(peak / mse.sqrt())


def _gaussian(device: torch.device) -> torch.Tensor:
    at = torch.arange(_WINDOW, dtype=torch.float64, device=device) - _WINDOW // 2
    window = torch.exp(-at.square() / (2 * _SIGMA ** 2))
    return window / window.sum()


def _similarity(a: torch.Tensor, b: torch.Tensor, blur: nn.Module, peak: float) -> torch.Tensor:
    """Return the map of structural similarity, given a local average."""
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_a, mean_b, square_a, square_b, product = blur(torch.stack([a, b, a * a, b * b, a * b]))
    covariance = product - mean_a * mean_b
    variances = square_a - mean_a.square() + square_b - mean_b.square()
    return ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a.square() + mean_b.square() + c1) * (variances + c2))


class _Blur(nn.Module):
    """Local average along the last `axes` axes, where the window fits or with edges repeated."""

    def __init__(self, window: torch.Tensor, axes: int, repeat_edges: bool) -> None:
        super().__init__()
        self.window, self.axes, self.repeat_edges = window, axes, repeat_edges

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Average over (..., H, W) or (..., C, H, W)."""
        for axis in range(-self.axes, 0):
            x = x.transpose(axis, -1)
            line = x.reshape(-1, 1, x.shape[-1])
            if self.repeat_edges:
                line = F.pad(line, (_WINDOW // 2, _WINDOW // 2), mode='replicate')
            line = F.conv1d(line, self.window.view(1, 1, -1))
            x = line.view(*x.shape[:-1], -1).transpose(axis, -1)
        return x


def ssim(
        restored: torch.Tensor,
        target: torch.Tensor,
        border: int = 0,
        y_channel: bool = False,
        peak: float = 255.,
) -> torch.Tensor:
    """Compute the structural similarity: 11 x 11 Gaussian windows of deviation 1.5, where they fit, channel by channel.

    Args:
        restored: Images, (..., C, H, W), with values in [0, peak], at least 11 x 11 without the border.
        target: True images of the same shape.
        border: Pixels to leave out on every side.
        y_channel: Compare the luma of RGB images alone; `peak` must be 255 then.
        peak: Largest possible value.

    Returns:
        One value an image, (...,) in float64.
    """
    restored, target = (x.double() for x in _prepare(restored, target, border, y_channel))
    if min(target.shape[-2:]) < _WINDOW:
        raise ValueError(f'SSIM needs images of at least {_WINDOW} x {_WINDOW} pixels, got '
                         f'{target.shape[-2]} x {target.shape[-1]} without a border of {border}.')
    blur = _Blur(_gaussian(target.device), 2, False)
    return _similarity(restored, target, blur, peak).flatten(-3).mean(-1)


def ssim_volume(restored: torch.Tensor, target: torch.Tensor, peak: float = 1.) -> torch.Tensor:
    """Compute the structural similarity of SIDD's benchmark, which takes an RGB image as a volume.

    Args:
        restored: Images, (..., C, H, W), with values in [0, peak].
        target: True images of the same shape.
        peak: Largest possible value.

    Returns:
        One value an image, (...,) in float64: 11 x 11 x 11 Gaussian windows with repeated edges.
    """
    restored, target = _prepare(restored, target, 0, False)
    blur = _Blur(_gaussian(target.device), 3, True)
    return _similarity(restored, target, blur, peak).flatten(-3).mean(-1)
