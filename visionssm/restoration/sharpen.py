"""Sharpened pictures, which a network for photographs learns from so that its results are crisp."""

import torch

from .degradations import blur

__all__ = ['unsharp_mask']


def unsharp_mask(x: torch.Tensor, side: int = 51, weight: float = 0.5, threshold: float = 10.) -> torch.Tensor:
    """Add what a wide blur takes away, where that is more than noise; the defaults are Real-ESRGAN's.

    Computed in float32 at least, whatever autocast says.

    Args:
        x: Pictures, (..., H, W), in [0, 1].
        side: Side of the Gaussian kernel, odd, in pixels; its deviation is that of OpenCV, 0.15 side + 0.35.
        weight: Share of the difference that is added.
        threshold: Differences up to it are left alone, in units of 1 / 255.

    Returns:
        Pictures of the same shape, in [0, 1].
    """
    if side < 1 or side % 2 == 0:
        raise ValueError(f'side is {side}; it must be odd and above 0.')
    x = x if x.dtype == torch.float64 else x.float()
    at = torch.arange(side, dtype=torch.float64) - side // 2
    line = torch.exp(-0.5 * (at / (0.15 * side + 0.35)).square())
    line = (line / line.sum()).to(x)

    def smooth(maps: torch.Tensor) -> torch.Tensor:
        return blur(blur(maps, line[None, :]), line[:, None])

    with torch.autocast(x.device.type, enabled=False):
        maps = x.flatten(0, -3) if x.ndim > 2 else x[None]
        rest = maps - smooth(maps)
        # blurred, so that no seam shows where sharpening begins
        share = smooth((rest.abs() * 255 > threshold).to(maps))
        sharp = (maps + weight * rest).clamp(0, 1)
        return maps.lerp(sharp, share).view(x.shape)
