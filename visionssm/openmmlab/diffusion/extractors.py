"""Networks that look at pictures for FID and its relatives: Inception of 2015, or any classifier."""
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from PIL import Image
from torch import nn

from ...checkpoints import CheckpointError, load_state_dict
from ..data import convert_mode
from ..predict import Predictor
from ..transforms import to_tensor

__all__ = ['INCEPTION', 'ClassifierExtractor', 'Extractor', 'InceptionExtractor', 'build_extractor']

logger = logging.getLogger('visionssm')

INCEPTION = 'inception'
# of the file that torch-fidelity publishes, and pytorch-fid too
INCEPTION_SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
# ADM's spatial features: the first channels of one branch in the middle of the network
SPATIAL_CHANNELS = 7


class Extractor:
    """A network that looks at pictures.

    Args:
        name: What the numbers are called after.
        device: Where it computes.
        fingerprint: Digest of the weights.
        suffix: What stands behind the names of the numbers.
        num_classes: Number of classes that it tells apart, None where they are not those of the pictures.
    """

    def __init__(self, name: str, device: torch.device, fingerprint: str, suffix: str,
                 num_classes: int | None = None) -> None:
        self.name, self.device, self.fingerprint, self.suffix = name, device, fingerprint, suffix
        self.num_classes = num_classes

    def __call__(self, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """Look at a batch.

        Args:
            pictures: The pictures, of any size and mode.

        Returns:
            `features` (B, D), `logits` (B, K) and, for Inception, `spatial` (B, S): float32, on the CPU.
        """
        # numbers must not depend on the mixed precision of the model that draws
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return {key: value.float().cpu() for key, value in self._look(pictures).items()}

    def _look(self, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class InceptionExtractor(Extractor):
    """Inception of 2015 as torch-fidelity has it, which is that of the original FID.

    Args:
        weights: File of its weights; None takes torch-fidelity's own download.
        device: Where to compute; None takes an accelerator where there is one.
    """

    def __init__(self, weights: str | None = None, device: str | None = None) -> None:
        path = self.find_weights(weights)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        official = digest == INCEPTION_SHA256
        name = INCEPTION if official else f'{INCEPTION}:{digest[:8]}'
        super().__init__(name, torch.device(device or get_device()), digest, '' if official else f'[{name}]')
        if not official:
            logger.warning('%s is not the published file of Inception (its SHA-256 begins with %s and not with %s); '
                           'the numbers are called %s', path, digest[:8], INCEPTION_SHA256[:8], f'FID{self.suffix}')
        self.net = self._build(path).to(self.device)
        self._spatial: torch.Tensor | None = None
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    @staticmethod
    def find_weights(weights: str | None) -> Path:
        """Find the file, or say where it belongs.

        Args:
            weights: As given to the class.

        Returns:
            The file.
        """
        # torch-fidelity is in the extra [diffusion]
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        path = Path(weights or Path(torch.hub.get_dir(), 'checkpoints', URL_INCEPTION_V3.rpartition('/')[2]))
        if not path.is_file():
            raise FileNotFoundError(
                f"Inception's weights are missing: there is no file {path}. Put {URL_INCEPTION_V3} there, or name the "
                'file by weights=FILE (--weights FILE); another network can look at the pictures instead, for example '
                "extractor='vim_pico' with checkpoint=FILE (--extractor vim_pico --checkpoint FILE)")
        return path

    @staticmethod
    def _build(path: Path) -> nn.Module:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        # torch-fidelity would unpickle whatever the file holds, so it gets plain tensors in a file of ours
        state = load_state_dict(path)
        with tempfile.TemporaryDirectory() as scratch:
            copy = os.path.join(scratch, 'inception.pth')
            torch.save(state, copy)
            try:
                return FeatureExtractorInceptionV3('inception-v3-compat', ['2048', 'logits_unbiased'], copy)
            except RuntimeError as error:
                raise CheckpointError(f"{path} does not fit torch-fidelity's network of Inception: "
                                      f'{str(error)[:400]} ...') from error

    def _keep(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        # in the order of the TensorFlow network, in which statistics are published
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def _look(self, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        tensors = [to_tensor(convert_mode(picture, 'RGB')) for picture in pictures]
        found: dict[str, list[torch.Tensor]] = {key: [torch.empty(0)] * len(tensors)
                                                for key in ('features', 'logits', 'spatial')}
        # the network scales pictures itself, as many at a time as have one size
        for size in {tensor.shape for tensor in tensors}:
            places = [place for place, tensor in enumerate(tensors) if tensor.shape == size]
            batch = torch.stack([tensors[place] for place in places]).to(self.device)
            features, logits = self.net(batch)
            for key, rows in (('features', features), ('logits', logits), ('spatial', self._spatial)):
                for place, row in zip(places, rows, strict=True):
                    found[key][place] = row
        return {key: torch.stack(rows) for key, rows in found.items()}


class ClassifierExtractor(Extractor):
    """A classifier of timm or of this package: what its last layer reads, with the preprocessing of its own.

    Args:
        name: Name of the model.
        checkpoint: Its weights, of any kind that `visionssm.openmmlab.checkpoint.load_weights` takes; None takes the
            published ones.
        device: Where to compute; None takes an accelerator where there is one.
    """

    def __init__(self, name: str, checkpoint: str | None = None, device: str | None = None) -> None:
        self.predictor = Predictor(name, checkpoint, device=device)
        digest = hashlib.sha256()
        for key, value in sorted(self.predictor.model.state_dict().items()):
            digest.update(key.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        super().__init__(name, self.predictor.device, digest.hexdigest(), f'[{name}]', self.predictor.model.num_classes)

    def _look(self, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        predictor, mode = self.predictor, 'L' if self.predictor.channels == 1 else 'RGB'
        batch = torch.stack([predictor.transform(convert_mode(picture, mode)) for picture in pictures])
        tokens = predictor.model.forward_features(batch.to(self.device))
        return {'features': predictor.model.forward_head(tokens, pre_logits=True),
                'logits': predictor.model.forward_head(tokens)}


def build_extractor(
        extractor: str = INCEPTION,
        checkpoint: str | None = None,
        weights: str | None = None,
        device: str | None = None,
) -> Extractor:
    """Build what looks at the pictures.

    Args:
        extractor: 'inception', or the name of a classifier of timm or of this package.
        checkpoint: Weights of the classifier.
        weights: Weights of Inception.
        device: Where to compute; None takes an accelerator where there is one.

    Returns:
        The extractor.
    """
    if extractor == INCEPTION:
        if checkpoint is not None:
            raise ValueError(f"checkpoint={checkpoint!r} is for classifiers; the file of extractor='inception' is "
                             'called weights')
        return InceptionExtractor(weights, device)
    if weights is not None:
        raise ValueError(f'weights={weights!r} is for Inception; the file of extractor={extractor!r} is called '
                         'checkpoint')
    if checkpoint is not None and '://' not in checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f'the weights {checkpoint} of the extractor {extractor!r} do not exist; train it, or '
                                "name other weights by checkpoint=FILE (--checkpoint FILE); extractor='inception' "
                                'needs none of them')
    return ClassifierExtractor(extractor, checkpoint, device)
