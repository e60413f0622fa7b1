"""Non-maximum suppression and overlaps of boxes (x1, y1, x2, y2)."""
import torch
import torchvision
from torch import Tensor

from .precision import widened

__all__ = ['bbox_overlaps', 'nms', 'nms_match', 'softnms']

LINEAR, GAUSSIAN = 1, 2


def _overlaps(boxes1: Tensor, boxes2: Tensor, offset: int, of_first: bool = False) -> Tensor:
    """Intersection over union, or over the first boxes' area, of boxes (..., 4) that broadcast."""
    size1, size2 = boxes1[..., 2:] - boxes1[..., :2] + offset, boxes2[..., 2:] - boxes2[..., :2] + offset
    shared = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(boxes1[..., :2], boxes2[..., :2])
    intersection = (shared + offset).clamp(min=0).prod(-1)
    area = size1.prod(-1)
    return intersection / (area if of_first else area + size2.prod(-1) - intersection)


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Overlaps of boxes, written into `ious`.

    Args:
        bboxes1: Boxes (M, 4).
        bboxes2: Boxes (N, 4).
        ious: Receives the overlaps (M, N), or (M,) of pairs.
        mode: 0 divides by the union, 1 by the area of the first box.
        aligned: Whether box i is paired with box i only.
        offset: What is added to widths and heights; 1 where coordinates name pixels.
    """
    first, second = widened(bboxes1, bboxes2)
    ious.copy_(_overlaps(first if aligned else first[:, None], second, offset, of_first=mode == 1))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Drop every box that overlaps one of higher score.

    Args:
        boxes: Boxes (N, 4).
        scores: Scores (N,).
        iou_threshold: Overlap above which the lower box is dropped.
        offset: What is added to widths and heights.

    Returns:
        Indices of the boxes kept, highest score first.
    """
    if not boxes.numel():
        return boxes.new_empty(0, dtype=torch.long)
    boxes, scores = widened(boxes, scores)
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:4] + offset], dim=1)
    # mmcv compares in float32: an overlap of exactly 0.3 in float32 does not exceed a threshold of 0.3.
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), torch.tensor(iou_threshold, dtype=torch.float32).item())


def softnms(boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float, min_score: float,
            method: int, offset: int) -> Tensor:
    """Lower the scores of boxes that overlap one of higher score; the boxes and their new scores go into `dets`.

    Args:
        boxes: Boxes (N, 4).
        scores: Scores (N,).
        dets: Receives (N, 5) rows of box and score in the order of selection; rows past the result stay as they are.
        iou_threshold: Overlap from which on scores are lowered (methods 0 and 1).
        sigma: Width of the Gaussian (method 2).
        min_score: Boxes whose lowered score is below it are dropped.
        method: 0 drops, 1 lowers linearly, 2 lowers by a Gaussian.
        offset: What is added to widths and heights.

    Returns:
        Indices of the boxes kept, in the order of selection.
    """
    wide, rest = widened(boxes, scores.clone())
    left = torch.arange(len(wide), device=wide.device)
    kept: list[Tensor] = []
    while len(left):
        best = rest.argmax()
        dets[len(kept)] = torch.cat([wide[best], rest[best, None]])
        kept.append(left[best])
        others = torch.arange(len(left), device=left.device) != best
        wide, rest, left, chosen = wide[others], rest[others], left[others], wide[best]
        overlap = _overlaps(chosen, wide, offset)
        if method == GAUSSIAN:
            rest = rest * torch.exp(-overlap ** 2 / sigma)
        else:
            rest = torch.where(overlap >= iou_threshold, rest * (1 - overlap if method == LINEAR else 0), rest)
        stay = ~(rest < min_score)
        wide, rest, left = wide[stay], rest[stay], left[stay]
    return torch.stack(kept) if kept else left


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes: each box kept by suppression with the boxes that it suppressed.

    Args:
        dets: Rows (N, 5) of box and score.
        iou_threshold: Overlap from which on the lower box is suppressed.

    Returns:
        Indices by group, highest score first.
    """
    dets, = widened(dets)
    left = dets[:, 4].sort(descending=True).indices
    groups = []
    while len(left):
        best, left = left[0], left[1:]
        hit = _overlaps(dets[best, :4], dets[left, :4], 0) >= iou_threshold
        groups.append([int(best), *left[hit].tolist()])
        left = left[~hit]
    return groups
