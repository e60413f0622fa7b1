"""Scores of binary masks as the papers on skin lesions count them: all pixels of all images in one confusion matrix."""

import math

import torch

__all__ = ['SCORES', 'binary_confusion', 'binary_scores']

SCORES = ('mIoU', 'DSC', 'accuracy', 'sensitivity', 'specificity')


def binary_confusion(prob: torch.Tensor, target: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Count the pixels by mask and prediction.

    Args:
        prob: Probabilities or a mask, any shape.
        target: Masks of the same shape, in 0..1; at least 0.5 is foreground.
        threshold: A prediction of at least this is foreground.

    Returns:
        int64 (2, 2), rows by mask, columns by prediction: [[TN, FP], [FN, TP]]. Sum it over images.
    """
    if prob.shape != target.shape:
        raise ValueError(f'The prediction is {tuple(prob.shape)} and the mask {tuple(target.shape)}; they are compared '
                         'pixel by pixel, so resize one of them.')
    places = 2 * (target >= 0.5).long() + (prob >= threshold).long()
    return torch.bincount(places.flatten(), minlength=4).unflatten(0, (2, 2))


def binary_scores(confusion: torch.Tensor) -> dict[str, float]:
    """Turn pooled counts into scores.

    Args:
        confusion: [[TN, FP], [FN, TP]] of all images, (2, 2).

    Returns:
        In 0..1, or nan where there is nothing to divide by: `mIoU` (of the foreground alone, TP / (TP + FP + FN), under
        the papers' name), `DSC` (Dice, which is the F1 score), `accuracy`, `sensitivity` and `specificity`.
    """
    (tn, fp), (fn, tp) = confusion.tolist()

    def share(part: int, whole: int) -> float:
        return part / whole if whole else math.nan

    values = (share(tp, tp + fp + fn), share(2 * tp, 2 * tp + fp + fn), share(tp + tn, tp + tn + fp + fn),
              share(tp, tp + fn), share(tn, tn + fp))
    return dict(zip(SCORES, values, strict=True))
