"""Losses of image restoration; images have values in [0, 1]."""

import torch
from torch import nn

from visionssm.utils.suggest import check_choice

__all__ = ['CharbonnierLoss', 'GANLoss', 'PixelLoss']


class PixelLoss(nn.Module):
    """Mean absolute or squared difference, of all pixels alike or weighted."""

    def __init__(self, kind: str = 'l1', weight: float = 1.) -> None:
        """Choose the difference.

        Args:
            kind: 'l1' or 'mse'.
            weight: Factor of the loss.
        """
        super().__init__()
        check_choice('kind', kind, ('l1', 'mse'))
        self.kind = kind
        self.weight = weight

    def difference(self, restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the difference of every value, in float32 at least."""
        gap = restored.to(target.dtype) - target
        return gap.abs() if self.kind == 'l1' else gap.square()

    def forward(
            self,
            restored: torch.Tensor,
            target: torch.Tensor,
            mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compare images.

        Args:
            restored: (B, C, H, W).
            target: (B, C, H, W).
            mask: Factors of the pixels, to be broadcast; ones when None.

        Returns:
            A scalar.
        """
        if restored.shape != target.shape:
            raise ValueError(f'The restored images are {tuple(restored.shape)} and the true ones '
                             f'{tuple(target.shape)}; does the scale of the model fit the data?')
        gap = self.difference(restored, target.float() if target.dtype != torch.float64 else target)
        return self.weight * (gap if mask is None else gap * mask).mean()


class CharbonnierLoss(PixelLoss):
    """Mean of sqrt(d^2 + eps), a smooth absolute difference; the official recipes take eps = 1e-3."""

    def __init__(self, eps: float = 1e-3, weight: float = 1.) -> None:
        """Set the width of the smooth part.

        Args:
            eps: Added to the squared difference.
            weight: Factor of the loss.
        """
        super().__init__('mse', weight)
        if not eps > 0:
            raise ValueError(f'eps is {eps}; it must be above 0.')
        self.eps = eps

    def difference(self, restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the smooth difference of every value."""
        return (super().difference(restored, target) + self.eps).sqrt()


class GANLoss(nn.Module):
    """Loss of a discriminator's logits, and of the generator that wants them high."""

    def __init__(self, kind: str = 'vanilla', weight: float = 1.) -> None:
        """Choose the loss.

        Args:
            kind: 'vanilla' (cross-entropy), 'lsgan' (squared distance to 0 and 1) or 'hinge'.
            weight: Factor of the generator's loss; the discriminator's has none.
        """
        super().__init__()
        check_choice('kind', kind, ('vanilla', 'lsgan', 'hinge'))
        self.kind = kind
        self.weight = weight

    def forward(self, logits: torch.Tensor, real: bool, discriminator: bool = False) -> torch.Tensor:
        """Judge logits.

        Args:
            logits: Of the discriminator, any shape.
            real: Whether they should say that the images are real.
            discriminator: Whether the discriminator learns, rather than the generator.

        Returns:
            A scalar.
        """
        logits = logits.float()
        if self.kind == 'hinge':
            sign = 1. if real else -1.
            loss = (1 - sign * logits).relu().mean() if discriminator else -sign * logits.mean()
        elif self.kind == 'lsgan':
            loss = (logits - float(real)).square().mean()
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))
        return loss if discriminator else self.weight * loss
