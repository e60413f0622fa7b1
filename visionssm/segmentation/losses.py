"""Losses of medical segmentation: cross-entropy and Dice, for one class and for several."""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['BceDiceLoss', 'CeDiceLoss', 'binary_dice', 'soft_dice']


def _check_maps(prediction: torch.Tensor, target: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(target.shape) != expected or prediction.dim() != 4:
        raise ValueError(f'The prediction is {tuple(prediction.shape)} and the target {tuple(target.shape)}; a '
                         f'prediction (B, C, H, W) needs a target {expected}.')


def binary_dice(prob: torch.Tensor, target: torch.Tensor, smooth: float = 1.) -> torch.Tensor:
    """Return 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth), averaged over the images.

    Args:
        prob: Probabilities, (B, ...).
        target: Masks in 0..1, (B, ...).
        smooth: Keeps the quotient defined for empty masks.

    Returns:
        A number, float32.
    """
    p, t = prob.float().flatten(1), target.float().flatten(1)
    return 1 - ((2 * (p * t).sum(1) + smooth) / (p.sum(1) + t.sum(1) + smooth)).mean()


def soft_dice(prob: torch.Tensor, target: torch.Tensor, smooth: float = 1e-5) -> torch.Tensor:
    """Return 1 - (2 sum(p t) + smooth) / (sum(p^2) + sum(t^2) + smooth) over the batch, averaged over the classes.

    Args:
        prob: Probabilities, (B, C, H, W).
        target: Masks of the classes, (B, C, H, W).
        smooth: Keeps the quotient defined for classes that are nowhere.

    Returns:
        A number, float32.
    """
    p, t = prob.float().transpose(0, 1).flatten(1), target.float().transpose(0, 1).flatten(1)
    return 1 - ((2 * (p * t).sum(1) + smooth) / (p.square().sum(1) + t.square().sum(1) + smooth)).mean()


class BceDiceLoss(nn.Module):
    """Binary cross-entropy of probabilities plus Dice, in float32 whatever autocast says."""

    def __init__(self, bce_weight: float = 1., dice_weight: float = 1.) -> None:
        """Build the loss.

        Args:
            bce_weight: Factor of the cross-entropy, a mean over all pixels.
            dice_weight: Factor of the Dice loss, a mean over the images.
        """
        super().__init__()
        self.bce_weight = bce_weight
        self.dice_weight = dice_weight

    def terms(self, prob: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the weighted parts of the loss.

        Args:
            prob: Probabilities, (B, 1, H, W).
            target: Masks of the same shape, in 0..1; soft edges are allowed.

        Returns:
            `loss_bce` and `loss_dice`, float32 numbers.
        """
        _check_maps(prob, target, tuple(prob.shape))
        # autocast forbids this function, and its rounding of probabilities would end the gradient near 0 and 1
        with torch.autocast(prob.device.type, enabled=False):
            # what is no number stays so in the other term; here it would stop a GPU for the rest of the process
            bce = F.binary_cross_entropy(prob.float().nan_to_num(), target.float())
            return {'loss_bce': self.bce_weight * bce, 'loss_dice': self.dice_weight * binary_dice(prob, target)}

    def forward(self, prob: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the sum of `terms`."""
        return torch.stack(list(self.terms(prob, target).values())).sum()


class CeDiceLoss(nn.Module):
    """Cross-entropy of logits plus soft Dice of their softmax, in float32 whatever autocast says."""

    def __init__(self, ce_weight: float = 0.4, dice_weight: float = 0.6, ignore_index: int = 255) -> None:
        """Build the loss.

        Args:
            ce_weight: Factor of the cross-entropy, a mean over all pixels.
            dice_weight: Factor of the Dice loss, a mean over the classes.
            ignore_index: Label of pixels that count in neither part.
        """
        super().__init__()
        self.ce_weight = ce_weight
        self.dice_weight = dice_weight
        self.ignore_index = ignore_index

    def terms(self, logits: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the weighted parts of the loss.

        Args:
            logits: (B, C, H, W).
            target: Labels, (B, H, W), integers.

        Returns:
            `loss_ce` and `loss_dice`, float32 numbers.
        """
        _check_maps(logits, target, (logits.shape[0], *logits.shape[2:]))
        with torch.autocast(logits.device.type, enabled=False):
            logits, target = logits.float(), target.long()
            valid = target != self.ignore_index
            ce = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction='sum')
            masks = F.one_hot(target.where(valid, 0), logits.shape[1]).movedim(3, 1)
            dice = soft_dice(logits.softmax(1) * valid[:, None], masks * valid[:, None])
            return {'loss_ce': self.ce_weight * ce / valid.sum().clamp(min=1), 'loss_dice': self.dice_weight * dice}

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the sum of `terms`."""
        return torch.stack(list(self.terms(logits, target).values())).sum()
