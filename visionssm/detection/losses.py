"""What Mamba-YOLO, like YOLOv8, is trained with: CIoU and distribution focal loss of boxes, cross-entropy of classes.

Papers: `Enhancing Geometric Factors in Model Learning and Inference for Object Detection and Instance Segmentation`
    - https://arxiv.org/abs/2005.03572
`Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection`
    - https://arxiv.org/abs/2006.04388
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert

from .assigner import Assignment, TaskAlignedAssigner
from .boxes import NUM_BINS, box_ciou, boxes_around, flatten_maps, make_anchors

__all__ = ['YOLOLoss', 'distribution_focal_loss', 'pad_targets']


def distribution_focal_loss(logits: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the two bins beside each distance, weighted by how near they are.

    Args:
        logits: (..., 16).
        distances: In bins, (...); clamped to [0, 14.99].

    Returns:
        (...).
    """
    distances = distances.clamp(0, NUM_BINS - 1 - 0.01)
    left = distances.long()
    log_probabilities = logits.log_softmax(-1)
    beside = torch.stack([left, left + 1], dim=-1)
    near = torch.stack([left + 1 - distances, distances - left], dim=-1)
    return -(log_probabilities.gather(-1, beside) * near).sum(-1)


def pad_targets(
        targets: torch.Tensor,
        batch: int,
        height: int,
        width: int,
        num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the objects of a batch by image.

    Args:
        targets: Rows image index, class, centre x, y, width, height as parts of the image, (n, 6).
        batch: Images B.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        num_classes: Classes.

    Returns:
        Classes (B, M), int64; boxes in pixels (B, M, 4); which rows are objects (B, M), bool; M is the most objects of
        an image. Boxes without any extent at the origin are no objects.

    Raises:
        ValueError: An image index or a class does not exist.
    """
    if targets.dim() != 2 or targets.shape[1] != 6:
        raise ValueError(f'targets have the shape {tuple(targets.shape)}; expected rows (image index, class, centre x, '
                         f'y, width, height), (n, 6).')
    image, label = targets[:, 0].long(), targets[:, 1].long()
    for name, values, limit in (('image index', image, batch), ('class', label, num_classes)):
        wrong = values[(values < 0) | (values >= limit)]
        if len(wrong):
            raise ValueError(f'targets have the {name} {int(wrong[0])}; allowed are 0 to {limit - 1}.')
    counts = torch.bincount(image, minlength=batch)
    most = int(counts.max()) if len(image) else 0
    order = image.argsort(stable=True)
    image = image[order]
    place = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]
    labels = image.new_zeros(batch, most)
    boxes = targets.new_zeros(batch, most, 4)
    labels[image, place] = label[order]
    boxes[image, place] = box_convert(targets[order, 2:], 'cxcywh', 'xyxy') * targets.new_tensor(
        [width, height, width, height])
    return labels, boxes, boxes.sum(2) > 0


class YOLOLoss(nn.Module):
    """The three losses of a detector's raw maps, each times its gain, per unit of wanted score.

    The official training multiplies their sum by the number of images of a batch (and of processes) before it
    backpropagates; that is left to the caller.
    """

    def __init__(
            self,
            num_classes: int = 80,
            strides: Sequence[int] = (8, 16, 32),
            box: float = 7.5,
            cls: float = 0.5,
            dfl: float = 1.5,
            assigner: TaskAlignedAssigner | None = None,
    ) -> None:
        """Note the gains.

        Args:
            num_classes: Classes.
            strides: Pixels of the image between neighbouring cells of each map.
            box: Gain of the CIoU loss.
            cls: Gain of the classification loss.
            dfl: Gain of the distribution focal loss.
            assigner: Says which cells learn which objects; `TaskAlignedAssigner()` when None.
        """
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.gains = (box, cls, dfl)
        self.assigner = assigner or TaskAlignedAssigner()

    def forward(self, raw_maps: Sequence[torch.Tensor], targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compare raw maps with the objects of the images.

        Args:
            raw_maps: One map (B, 64 + num_classes, H_l, W_l) a level; the images have the size of the first map times
                its stride.
            targets: Rows image index, class, centre x, y, width, height as parts of the image, (n, 6); n may be 0.

        Returns:
            'loss_box', 'loss_cls' and 'loss_dfl', scalars, at least in float32 also under autocast.
        """
        with torch.autocast(raw_maps[0].device.type, enabled=False):
            distances, scores = flatten_maps(raw_maps)
            anchors, sizes = make_anchors(raw_maps, self.strides)
            boxes = boxes_around(anchors, distances)
            assignment = self._assign(raw_maps, targets, scores, boxes * sizes, anchors * sizes)
            total = assignment.scores.sum().clamp(min=1)
            loss_cls = F.binary_cross_entropy_with_logits(scores, assignment.scores, reduction='sum') / total
            loss_box, loss_dfl = self._box_losses(assignment, distances, boxes, anchors, sizes, total)
            box, cls, dfl = self.gains
            return {'loss_box': box * loss_box, 'loss_cls': cls * loss_cls, 'loss_dfl': dfl * loss_dfl}

    def _assign(
            self,
            raw_maps: Sequence[torch.Tensor],
            targets: torch.Tensor,
            scores: torch.Tensor,
            boxes: torch.Tensor,
            anchors: torch.Tensor,
    ) -> Assignment:
        """Assign the cells, of `boxes` and `anchors` in pixels."""
        batch, channels, height, width = raw_maps[0].shape
        if channels != 4 * NUM_BINS + self.num_classes:
            raise ValueError(f'The maps have {channels} channels; with {self.num_classes} classes '
                             f'{4 * NUM_BINS + self.num_classes} are expected.')
        labels, true_boxes, valid = pad_targets(
            targets.to(scores), batch, height * self.strides[0], width * self.strides[0], self.num_classes)
        return self.assigner(scores.detach().sigmoid(), boxes.detach(), anchors, labels, true_boxes, valid)

    def _box_losses(
            self,
            assignment: Assignment,
            distances: torch.Tensor,
            boxes: torch.Tensor,
            anchors: torch.Tensor,
            sizes: torch.Tensor,
            total: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the CIoU loss and the distribution focal loss; `boxes` and `anchors` in units of the stride."""
        image, cell = assignment.positive.nonzero(as_tuple=True)
        weight = assignment.scores[image, cell].sum(1)
        true_boxes = assignment.boxes[image, cell] / sizes[cell]
        loss_box = ((1 - box_ciou(boxes[image, cell], true_boxes)) * weight).sum() / total
        centre = anchors[cell]
        sides = torch.cat([centre - true_boxes[:, :2], true_boxes[:, 2:] - centre], dim=1)
        loss_dfl = (distribution_focal_loss(distances[image, cell], sides).mean(1) * weight).sum() / total
        return loss_box, loss_dfl
