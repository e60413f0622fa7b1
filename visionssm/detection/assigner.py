"""Which cells of a detector's maps learn which objects: task-aligned assignment.

Paper: `TOOD: Task-aligned One-stage Object Detection`
    - https://arxiv.org/abs/2108.07755
"""

from typing import NamedTuple

import torch

from .boxes import box_ciou

__all__ = ['Assignment', 'TaskAlignedAssigner']


class Assignment(NamedTuple):
    """What the cells of a batch are to learn.

    Attributes:
        positive: Cells that belong to an object, (B, A), bool.
        index: Which object of its image a cell belongs to, (B, A), int64; 0 for the others.
        labels: Its class, (B, A), int64; for the others that of the first object, or `num_classes` where there is none.
        boxes: Its box, (B, A, 4), in pixels; as for `labels`.
        scores: What a cell should answer for each class, (B, A, num_classes); 0 but for the object's class.
    """

    positive: torch.Tensor
    index: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor
    scores: torch.Tensor


class TaskAlignedAssigner:
    """Give each object the cells inside it that already find it best, by class and place together.

    The metric of a cell for an object is score^alpha * overlap^beta, with the probability that the cell gives to the
    object's class, and the CIoU (at least 0) of the two boxes. An object takes its `topk` best cells; a cell that
    several objects want goes to the one that it overlaps most. Wanted scores are the metrics, scaled so that the best
    cell of an object is asked for the overlap that the object reaches.
    """

    def __init__(self, topk: int = 10, alpha: float = 0.5, beta: float = 6.0, eps: float = 1e-9) -> None:
        """Note the constants.

        Args:
            topk: Most cells an object.
            alpha: Exponent of the score.
            beta: Exponent of the overlap.
            eps: A centre must be farther inside an object than this, in pixels; also keeps a quotient finite.
        """
        if topk < 1:
            raise ValueError(f'topk is {topk}; an object needs at least 1 cell.')
        self.topk = topk
        self.alpha = alpha
        self.beta = beta
        self.eps = eps

    @torch.no_grad()
    def __call__(
            self,
            scores: torch.Tensor,
            boxes: torch.Tensor,
            anchors: torch.Tensor,
            true_labels: torch.Tensor,
            true_boxes: torch.Tensor,
            valid: torch.Tensor,
    ) -> Assignment:
        """Assign the cells of a batch.

        Args:
            scores: Class probabilities of the cells, (B, A, num_classes), at least in float32 like the rest.
            boxes: Their boxes in pixels, (B, A, 4).
            anchors: Their centres in pixels, (A, 2).
            true_labels: Classes of the objects, (B, M), int64.
            true_boxes: Their boxes in pixels, (B, M, 4).
            valid: Which of the M rows of an image are objects, (B, M), bool.

        Returns:
            The assignment.
        """
        count, num_classes = true_boxes.shape[1], scores.shape[2]
        if count == 0:
            empty = torch.zeros(scores.shape[:2], dtype=torch.int64, device=scores.device)
            return Assignment(
                empty.bool(), empty, empty + num_classes, torch.zeros_like(boxes), torch.zeros_like(scores))
        metric, overlap, inside = self._measure(scores, boxes, anchors, true_labels, true_boxes, valid)
        best = metric.topk(min(self.topk, metric.shape[2]), dim=2).indices
        chosen = torch.zeros_like(inside).scatter_(2, best, True) & inside
        wanted = chosen.sum(1, keepdim=True)
        surest = torch.zeros_like(inside).scatter_(1, overlap.argmax(1, keepdim=True), True)
        chosen = torch.where(wanted > 1, surest, chosen)  # (B, M, A), one object a cell at most
        index = chosen.byte().argmax(1)
        labels = true_labels.gather(1, index)
        metric, overlap = metric * chosen, overlap * chosen
        reached = overlap.amax(2, keepdim=True) / (metric.amax(2, keepdim=True) + self.eps)
        weight = (metric * reached).amax(1)  # (B, A)
        target = torch.zeros_like(scores).scatter_(2, labels.unsqueeze(2), weight.unsqueeze(2))
        target_boxes = true_boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4))
        return Assignment(chosen.any(1), index, labels, target_boxes, target)

    def _measure(
            self,
            scores: torch.Tensor,
            boxes: torch.Tensor,
            anchors: torch.Tensor,
            true_labels: torch.Tensor,
            true_boxes: torch.Tensor,
            valid: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return metric, overlap, and whether a cell's centre is inside an object; (B, M, A) each."""
        first, last = true_boxes.unsqueeze(2).chunk(2, dim=3)  # (B, M, 1, 2)
        margin = torch.minimum((anchors - first).amin(3), (last - anchors).amin(3))
        inside = (margin > self.eps) & valid.unsqueeze(2)
        overlap = torch.zeros_like(margin)
        # Few of all pairs: the others cost nothing.
        image, row, cell = inside.nonzero(as_tuple=True)
        overlap[image, row, cell] = box_ciou(true_boxes[image, row], boxes[image, cell]).clamp(min=0).to(overlap.dtype)
        score = torch.zeros_like(margin)
        score[image, row, cell] = scores[image, cell, true_labels[image, row]].to(score.dtype)
        return score.pow(self.alpha) * overlap.pow(self.beta), overlap, inside
