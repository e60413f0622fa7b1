"""A segmentor of MMSegmentation around the U-Nets of `visionssm.segmentation`, for one class or several."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmseg.models.segmentors import BaseSegmentor
from mmseg.structures import SegDataSample

import visionssm

from ...checkpoints import load_state_dict
from ...layers import MultiHeadScan
from ...registry import MODELS
from ...segmentation.losses import BceDiceLoss, CeDiceLoss
from ...utils.suggest import did_you_mean
from ..checkpoint import SCHEME, load_from_visionssm

__all__ = ['MedicalSegmentor']

for _loss in (BceDiceLoss, CeDiceLoss):
    MODELS.register_module(module=_loss)


class _Head(NamedTuple):
    """What MMSegmentation asks a decode head for."""
    threshold: float
    out_channels: int
    num_classes: int
    align_corners: bool = False


def _vmamba_weights(source: str) -> dict[str, torch.Tensor]:
    """Weights of a VMamba in our names, by `visionssm://NAME` or from a file in ours or the authors' names."""
    if source.startswith(SCHEME):
        return load_from_visionssm(source)['state_dict']
    if not Path(source).is_file():
        raise FileNotFoundError(f'encoder={source!r} is no file; give one, or the name of a model as in '
                                f"'{SCHEME}vmamba_tiny_v0'")
    state = load_state_dict(source)
    return state if 'stem.conv1.weight' in state else visionssm.from_official('vmamba', state).state_dict()


@MODELS.register_module()
class MedicalSegmentor(BaseSegmentor):
    """A U-Net as a segmentor of MMSegmentation: one class by its probability, several by the largest logit.

    Args:
        model: `name` and arguments of `visionssm.create_model`: `num_classes`, `pretrained`, `threshold`, ...
        loss: A registered loss; None takes `BceDiceLoss` for one class and `CeDiceLoss` for several.
        data_preprocessor: MMSegmentation's; None takes one that only turns BGR into RGB, for images that the pipeline
            has stretched.
        encoder: VMamba that a training of VM-UNet starts from: `visionssm://vmamba_tiny_v0`, or a file.
        test_threshold: Threshold of MHS-VM's fusion in tests and predictions; None keeps the model's. The authors train
            with one (`model.threshold`) and evaluate with 0.4.
        mask_threshold: Probability from which on a pixel belongs to the one class.
        grad_checkpointing: Whether blocks are recomputed in the backward pass to save memory.
        init_cfg: Not used: the models initialise themselves. Kept for MMEngine's protocol.
    """

    align_corners = False

    def __init__(
            self,
            model: dict,
            loss: dict | None = None,
            data_preprocessor: dict | None = None,
            encoder: str | None = None,
            test_threshold: float | None = None,
            mask_threshold: float = 0.5,
            grad_checkpointing: bool = False,
            init_cfg: dict | None = None,
    ) -> None:
        names = visionssm.list_models('segmentation')
        name = str(model.get('name'))
        if name.partition('.')[0] not in names:
            raise ValueError(f'model.name is {model.get("name")!r}; it must be a model of the task segmentation. '
                             f'{did_you_mean(name, names)}')
        super().__init__(data_preprocessor or {
            'type': 'mmseg.SegDataPreProcessor', 'bgr_to_rgb': True, 'size_divisor': 1}, init_cfg)
        self.model = visionssm.create_model(**model)
        self.out_channels = self.model.num_classes
        self.num_classes = max(2, self.out_channels)
        self.decode_head = _Head(mask_threshold, self.out_channels, self.num_classes)
        self.loss_fn = MODELS.build(loss or {
            'type': 'visionssm.BceDiceLoss' if self.out_channels == 1 else 'visionssm.CeDiceLoss'})
        wrong = CeDiceLoss if self.out_channels == 1 else BceDiceLoss
        if isinstance(self.loss_fn, wrong):
            raise ValueError(f'{wrong.__name__} does not fit {self.out_channels} classes; set loss=None for the one '
                             'that does')
        self.encoder = encoder
        if encoder is not None and not hasattr(self.model, 'load_vmamba'):
            raise ValueError(f'encoder={encoder!r}: only VM-UNet starts from a VMamba, {name} does not')
        self.scans: list[Any] = [module for module in self.model.modules() if isinstance(module, MultiHeadScan)]
        self.test_threshold = test_threshold
        if test_threshold is not None and not self.scans:
            raise ValueError(f'test_threshold={test_threshold}: {name} has no fusion with a threshold, only the models '
                             'mhs_vm_unet_* have')
        if grad_checkpointing:
            self.model.set_grad_checkpointing(True)

    def init_weights(self) -> None:
        """Start from the encoder, if one is named; else keep the model's own values."""
        if self.encoder is not None and not self._is_init:
            self.model.load_vmamba(_vmamba_weights(self.encoder))
        self._is_init = True

    @contextmanager
    def _testing(self) -> Iterator[None]:
        """The threshold of tests, in place of the training's."""
        if self.test_threshold is None:
            yield
            return
        before = [scan.threshold for scan in self.scans]
        try:
            for scan in self.scans:
                scan.threshold = self.test_threshold
            yield
        finally:
            for scan, value in zip(self.scans, before, strict=True):
                scan.threshold = value

    def test_step(self, data: dict | tuple | list) -> list[SegDataSample]:
        """Predict with the threshold of tests; a validation during training keeps the training's.

        Args:
            data: A batch of the loader.

        Returns:
            As `predict`.
        """
        with self._testing():
            return super().test_step(data)

    def extract_feat(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return what the stages of the encoder read and its last map, (B, H', W', C') each."""
        deepest, skips = self.model.encode(inputs)
        return [*skips, deepest]

    def encode_decode(self, inputs: torch.Tensor, batch_data_samples: Sequence[Any] | None = None) -> torch.Tensor:
        """Return logits (B, C, H, W) in float32, whatever autocast chose."""
        return self.model.forward_logits(inputs).float()

    def _forward(self, inputs: torch.Tensor, data_samples: Sequence[SegDataSample] | None = None) -> torch.Tensor:
        return self.encode_decode(inputs)

    def _targets(self, data_samples: Sequence[SegDataSample], size: torch.Size) -> torch.Tensor:
        if any('gt_sem_seg' not in sample for sample in data_samples):
            raise ValueError('training needs masks; give the data set seg_map_path, and its pipeline LoadBinaryMask')
        soft = self.out_channels == 1
        maps = [(sample.gt_soft_seg if soft and 'gt_soft_seg' in sample else sample.gt_sem_seg).data
                for sample in data_samples]
        other = next((number for number, item in enumerate(maps) if item.shape[-2:] != size), None)
        if other is not None or any(sample.get('padding_size') not in (None, (0, 0, 0, 0), [0, 0, 0, 0])
                                    for sample in data_samples):
            raise ValueError(f'the images of a batch have different sizes (now {tuple(size)}); end the pipeline with '
                             'MedicalResize')
        return torch.stack(maps).float() if soft else torch.cat(maps)

    def loss(self, inputs: torch.Tensor, data_samples: Sequence[SegDataSample]) -> dict[str, torch.Tensor]:
        """Return the parts of the loss.

        Args:
            inputs: Images, (B, 3, H, W).
            data_samples: With `gt_sem_seg`, and `gt_soft_seg` where masks are soft.

        Returns:
            Name to number.
        """
        logits = self.encode_decode(inputs)
        target = self._targets(data_samples, inputs.shape[-2:])
        prediction = logits.sigmoid() if self.out_channels == 1 else logits
        if hasattr(self.loss_fn, 'terms'):
            return self.loss_fn.terms(prediction, target)
        return {'loss': self.loss_fn(prediction, target)}

    def predict(self, inputs: torch.Tensor,
                data_samples: Sequence[SegDataSample] | None = None) -> list[SegDataSample]:
        """Return a class for every pixel of the original images.

        Args:
            inputs: Images, (B, 3, H, W).
            data_samples: Their samples; None for images that keep their size.

        Returns:
            Samples with `pred_sem_seg` and `seg_logits` at the size of the original image, as MMSegmentation has them.
            For one class `pred_sem_seg.net_probs` are the probabilities (1, H, W) at the size of the network.
        """
        logits = self.encode_decode(inputs)
        samples = self.postprocess_result(logits, data_samples)
        for sample, own in zip(samples, logits, strict=True):
            sample.pred_sem_seg.data = sample.pred_sem_seg.data.long()
            if self.out_channels == 1:
                # MMSegmentation leaves probabilities here, of which its average over views takes the sigmoid again
                sample.seg_logits.data = sample.seg_logits.data.logit()
                # a part of the prediction, so that what replaces it does not leave the probabilities of one view
                sample.pred_sem_seg.set_metainfo({'net_probs': own.detach().sigmoid()})
        return samples
