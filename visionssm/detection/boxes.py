"""Boxes: how a detector's raw maps say where they are, how they are compared, and which ones are kept.

Boxes are (x1, y1, x2, y2) in pixels unless said otherwise. All arithmetic is in float32 for half-precision maps.
"""

import math
from collections.abc import Sequence

import torch
from torchvision.ops import batched_nms, box_convert

from visionssm.layers.precision import widen

__all__ = ['NUM_BINS', 'box_ciou', 'decode_boxes', 'flatten_maps', 'make_anchors', 'non_max_suppression']

NUM_BINS = 16
"""Bins of the distribution over the distance from an anchor to each side of its box, in units of the stride."""


def box_ciou(a: torch.Tensor, b: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Return the complete IoU of pairs of boxes: IoU, less what the centres and the aspect ratios differ by.

    Args:
        a: Boxes, (..., 4).
        b: As many boxes, (..., 4).
        eps: Keeps the quotients finite for boxes without area.

    Returns:
        (...), at most 1. The weight of the aspect ratios passes no gradient.
    """
    ax1, ay1, ax2, ay2 = widen(a).unbind(-1)
    bx1, by1, bx2, by2 = widen(b).unbind(-1)
    a_width, a_height = ax2 - ax1, ay2 - ay1 + eps
    b_width, b_height = bx2 - bx1, by2 - by1 + eps
    overlap_width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    overlap_height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    overlap = overlap_width * overlap_height
    iou = overlap / (a_width * a_height + b_width * b_height - overlap + eps)
    hull_width = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    hull_height = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    diagonal = hull_width.square() + hull_height.square() + eps
    between = ((bx1 + bx2 - ax1 - ax2).square() + (by1 + by2 - ay1 - ay2).square()) / 4
    aspect = 4 / math.pi ** 2 * (torch.atan(b_width / b_height) - torch.atan(a_width / a_height)).square()
    with torch.no_grad():
        weight = aspect / (aspect - iou + 1 + eps)
    return iou - between / diagonal - weight * aspect


def make_anchors(
        raw_maps: Sequence[torch.Tensor],
        strides: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the centres of the cells of all maps, and the strides of the cells.

    Args:
        raw_maps: One map (B, ..., H_l, W_l) a level.
        strides: Pixels of the image between neighbouring cells of each level.

    Returns:
        Centres (x, y) in units of the stride, (A, 2), levels in order and row by row; and the strides, (A, 1); both in
        the type of the maps, but at least float32.
    """
    centres, sizes = [], []
    for raw, stride in zip(raw_maps, strides, strict=True):
        height, width = raw.shape[-2:]
        dtype = torch.promote_types(raw.dtype, torch.float32)
        x = torch.arange(width, dtype=dtype, device=raw.device) + 0.5
        y = torch.arange(height, dtype=dtype, device=raw.device) + 0.5
        grid = torch.stack([x.expand(height, width), y.unsqueeze(1).expand(height, width)], dim=-1)
        centres.append(grid.flatten(0, 1))
        sizes.append(torch.full_like(centres[-1][:, :1], stride))
    return torch.cat(centres), torch.cat(sizes)


def flatten_maps(raw_maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the cells of all maps side by side.

    Args:
        raw_maps: One map (B, 64 + num_classes, H_l, W_l) a level.

    Returns:
        Logits of the distances (B, A, 4, 16), sides left, top, right, bottom; and of the classes (B, A, num_classes);
        at least in float32.
    """
    flat = torch.cat([widen(raw).flatten(2) for raw in raw_maps], dim=2).transpose(1, 2)  # (B, A, 64 + num_classes)
    distances, scores = flat.split([4 * NUM_BINS, flat.shape[2] - 4 * NUM_BINS], dim=2)
    return distances.unflatten(2, (4, NUM_BINS)), scores


def boxes_around(anchors: torch.Tensor, distances: torch.Tensor, bins: torch.Tensor | None = None) -> torch.Tensor:
    """Return boxes in units of the stride: the expected distances from the anchors to the sides.

    Args:
        anchors: Centres, (A, 2).
        distances: Logits, (B, A, 4, 16).
        bins: Distance that each bin stands for, 16 numbers; 0, ..., 15 when None.

    Returns:
        (B, A, 4).
    """
    if bins is None:
        bins = torch.arange(NUM_BINS, dtype=distances.dtype, device=distances.device)
    sides = distances.softmax(3).matmul(bins.to(distances.dtype))
    return torch.cat([anchors - sides[..., :2], anchors + sides[..., 2:]], dim=-1)


def decode_boxes(
        raw_maps: Sequence[torch.Tensor],
        strides: Sequence[int],
        bins: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a detector's raw maps into boxes; shapes follow from those of the maps alone, so it exports.

    Args:
        raw_maps: One map (B, 64 + num_classes, H_l, W_l) a level.
        strides: Pixels of the image between neighbouring cells of each level.
        bins: Distance in strides that each bin stands for, 16 numbers; 0, ..., 15 when None.

    Returns:
        Boxes (B, A, 4) and class logits (B, A, num_classes), at least in float32; A cells, levels in order and row by
        row.
    """
    distances, scores = flatten_maps(raw_maps)
    anchors, sizes = make_anchors(raw_maps, strides)
    return boxes_around(anchors, distances, bins) * sizes, scores


def non_max_suppression(
        prediction: torch.Tensor,
        score_threshold: float = 0.25,
        iou_threshold: float = 0.7,
        multi_label: bool = False,
        classes: Sequence[int] | None = None,
        agnostic: bool = False,
        max_detections: int = 300,
        max_candidates: int = 30000,
) -> list[torch.Tensor]:
    """Keep of boxes that overlap the one that is surest.

    Args:
        prediction: Centre, width and height in pixels and class probabilities, (B, 4 + num_classes, A), as a detector
            in evaluation mode returns them.
        score_threshold: Boxes must exceed it.
        iou_threshold: Boxes of one class that overlap more than this exclude each other.
        multi_label: Take a box once for each class above the threshold, as for COCO AP (with a threshold of 0.001);
            else for its best class only.
        classes: Take these classes only; all when None.
        agnostic: Boxes of different classes exclude each other too.
        max_detections: Most boxes an image.
        max_candidates: Most boxes that are compared with each other.

    Returns:
        One (n, 6) a image, rows x1, y1, x2, y2, score, class, the surest first; at least in float32.
    """
    boxes = box_convert(widen(prediction[:, :4]).transpose(1, 2), 'cxcywh', 'xyxy')
    scores = widen(prediction[:, 4:]).transpose(1, 2)
    found = []
    for box, score in zip(boxes, scores, strict=True):
        if multi_label:
            cell, label = (score > score_threshold).nonzero(as_tuple=True)
            score = score[cell, label]
        else:
            score, label = score.max(1)
            cell = (score > score_threshold).nonzero().squeeze(1)
            score, label = score[cell], label[cell]
        if classes is not None:
            wanted = torch.isin(label, torch.as_tensor(classes, device=label.device))
            cell, label, score = cell[wanted], label[wanted], score[wanted]
        score, order = score.sort(descending=True, stable=True)
        score, order = score[:max_candidates], order[:max_candidates]
        box, label = box[cell[order]], label[order]
        groups = torch.zeros_like(label) if agnostic else label
        keep = batched_nms(box, score, groups, iou_threshold)[:max_detections]
        found.append(torch.cat([box[keep], score[keep, None], label[keep, None].to(box.dtype)], dim=1))
    return found
