"""Mamba-YOLO as a detector of MMDetection: batches in, losses or boxes of the original images out."""
import torch
from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from mmengine.dist import all_reduce, get_world_size
from mmengine.structures import InstanceData

import visionssm

from ...detection.boxes import non_max_suppression
from ...detection.losses import YOLOLoss
from ...registry import MODELS
from ...utils.suggest import did_you_mean
from .transforms import to_original

__all__ = ['MambaYOLODetector']

PREPROCESSOR = {
    # padding comes after the division by 255
    'type': 'mmdet.DetDataPreprocessor', 'mean': [0.0, 0.0, 0.0], 'std': [255.0, 255.0, 255.0], 'bgr_to_rgb': True,
    'pad_size_divisor': 32, 'pad_value': 114 / 255}
TEST_CFG = {'score_thr': 0.001, 'iou_thr': 0.7, 'multi_label': True, 'max_per_img': 300, 'nms_pre': 30000}
GAINS = {'box': 7.5, 'cls': 0.5, 'dfl': 1.5}


def _with_defaults(name: str, defaults: dict, given: dict | None) -> dict:
    for key in given or {}:
        if key not in defaults:
            raise ValueError(f'{name} has no key {key!r}. {did_you_mean(key, defaults)} '
                             f'It takes {", ".join(defaults)}.')
    return {**defaults, **(given or {})}


@MODELS.register_module()
class MambaYOLODetector(BaseDetector):
    """A YOLO detector of :mod:`visionssm.detection` with its losses and its non-maximum suppression.

    Like the official trainer, the backward pass takes the sum of the three losses times the images of the *whole*
    step: the batch size, times the number of processes (MMEngine's wrapper averages their gradients, as the official
    one does, so this makes a sum of them), times the accumulated batches (by whose number MMEngine's optimizer wrapper
    divides). So the gradient grows with the images of a step, and the recipe's clipping at 10 sees nearly every step.
    The log shows the losses before this multiplication, averaged over the processes. As officially, each process
    divides by the target scores of its own images.

    Args:
        model: ``name`` of a registered detector and its arguments, as for ``visionssm.create_model``.
        data_preprocessor: Arguments of MMDetection's ``DetDataPreprocessor``; RGB in 0..1 unless given.
        train_cfg: Gains of the losses: ``box`` (7.5), ``cls`` (0.5), ``dfl`` (1.5).
        test_cfg: ``score_thr`` (0.001, as for COCO AP; the authors show boxes from 0.25 on), ``iou_thr`` (0.7),
            ``multi_label`` (True: a box counts once for each class above the threshold), ``max_per_img`` (300),
            ``nms_pre`` (30000).
        init_cfg: Not used: the model initialises itself. Kept for MMEngine's protocol.
    """

    def __init__(
            self,
            model: dict,
            data_preprocessor: dict | None = None,
            train_cfg: dict | None = None,
            test_cfg: dict | None = None,
            init_cfg: dict | None = None,
    ) -> None:
        if 'name' not in model:
            raise ValueError(f"model needs a 'name', as in dict(name='mamba_yolo_tiny'): got {dict(model)}")
        super().__init__(data_preprocessor={**PREPROCESSOR, **(data_preprocessor or {})}, init_cfg=init_cfg)
        options = dict(model)
        self.model = visionssm.create_model(options.pop('name'), **options)
        gains = _with_defaults('train_cfg', GAINS, train_cfg)
        self.test_cfg = _with_defaults('test_cfg', TEST_CFG, test_cfg)
        self.criterion = YOLOLoss(self.model.num_classes, self.model.strides, **gains)
        self.accumulation = 1

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.model.num_classes

    def init_weights(self) -> None:
        """Keep what the model has initialised or loaded: MMEngine would call the model's own initialiser again."""
        self._is_init = True

    def extract_feat(self, batch_inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Maps of the neck.

        Args:
            batch_inputs: Images (B, 3, H, W).

        Returns:
            Maps of strides 8, 16 and 32.
        """
        return tuple(self.model.neck(self.model.backbone(batch_inputs)))

    def _forward(self, batch_inputs: torch.Tensor, batch_data_samples: list[DetDataSample] | None = None,
                 ) -> tuple[torch.Tensor, ...]:
        return tuple(self.model.forward_raw(batch_inputs))

    def loss(self, batch_inputs: torch.Tensor, batch_data_samples: list[DetDataSample]) -> dict[str, torch.Tensor]:
        """Losses of a batch.

        Args:
            batch_inputs: Images (B, 3, H, W), sides multiples of 32.
            batch_data_samples: Their boxes, (x1, y1, x2, y2) in pixels of the images, and labels.

        Returns:
            ``loss_box``, ``loss_cls`` and ``loss_dfl`` with their gains, and ``num_images``.
        """
        targets = self._targets(batch_inputs, batch_data_samples)
        losses = self.criterion(self.model.forward_raw(batch_inputs), targets)
        return {**losses, 'num_images': targets.new_tensor(len(batch_inputs))}

    def _targets(self, batch_inputs: torch.Tensor, batch_data_samples: list[DetDataSample]) -> torch.Tensor:
        """Rows (image, class, cx, cy, w, h), the box as a share of the image, for all boxes of a batch."""
        height, width = batch_inputs.shape[-2:]
        rows = [batch_inputs.new_zeros((0, 6), dtype=torch.float32)]
        for image, sample in enumerate(batch_data_samples):
            boxes = sample.gt_instances.bboxes.to(rows[0])
            labels = sample.gt_instances.labels.to(rows[0])
            low, high = boxes[:, :2], boxes[:, 2:]
            size = boxes.new_tensor([width, height])
            rows.append(torch.cat([torch.full_like(labels, image)[:, None], labels[:, None],
                                   (low + high) / 2 / size, (high - low) / size], dim=1))
        return torch.cat(rows)

    def parse_losses(self, losses: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum the losses for the backward pass, and average over all processes what is logged.

        Args:
            losses: What :meth:`loss` returns.

        Returns:
            The loss of this process times the images of the step, and values for the log, not multiplied.
        """
        items = dict(losses)
        images = items.pop('num_images')
        loss, log_vars = super().parse_losses(items)
        logged = {name: value.detach().clone() for name, value in log_vars.items()}
        for value in logged.values():
            all_reduce(value, 'mean')
        return loss * images * (get_world_size() * self.accumulation), logged

    def predict(
            self,
            batch_inputs: torch.Tensor,
            batch_data_samples: list[DetDataSample],
            rescale: bool = True,
    ) -> list[DetDataSample]:
        """Find objects.

        Args:
            batch_inputs: Images (B, 3, H, W), sides multiples of 32.
            batch_data_samples: How they came about: ``scale_factor``, ``pad_param``, ``ori_shape``.
            rescale: Whether boxes are those of the original images.

        Returns:
            The samples with ``pred_instances``: ``bboxes`` (n, 4), ``scores`` and ``labels``, the surest first.
        """
        cfg = self.test_cfg
        found = non_max_suppression(self.model(batch_inputs), cfg['score_thr'], cfg['iou_thr'], cfg['multi_label'],
                                    max_detections=cfg['max_per_img'], max_candidates=cfg['nms_pre'])
        results = []
        for rows, sample in zip(found, batch_data_samples, strict=True):
            boxes = to_original(rows[:, :4], sample.metainfo) if rescale else rows[:, :4]
            results.append(InstanceData(bboxes=boxes, scores=rows[:, 4], labels=rows[:, 5].long()))
        return self.add_pred_to_datasample(batch_data_samples, results)
