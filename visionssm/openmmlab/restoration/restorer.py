"""Restoration networks as a model of the engine: loss, tiled prediction, and weights that a training starts from."""
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import DefaultScope
from torch import nn

import visionssm

from ...checkpoints import CheckpointError, save_safetensors
from ...registry import MODELS
from ...restoration.losses import CharbonnierLoss, PixelLoss
from ...restoration.tiling import Progress, restore_official, restore_tiled, self_ensemble
from ...utils.files import atomic_write
from ...utils.suggest import did_you_mean
from ..checkpoint import read_weights

__all__ = ['ImageRestorer', 'create_restorer', 'restore']

for _loss in (CharbonnierLoss, PixelLoss):
    MODELS.register_module(module=_loss)


def create_restorer(name: str, **kwargs: Any) -> nn.Module:
    """Create a restoration model, with errors that name the nearest valid spelling.

    Args:
        name: As `visionssm.list_models('restoration')` has it, with or without a tag.
        **kwargs: What `visionssm.create_model` takes.

    Returns:
        The model.
    """
    names = visionssm.list_models('restoration')
    if str(name).partition('.')[0] not in names:
        raise ValueError(f'model.name is {name!r}; it must be a model of the task restoration. '
                         f'{did_you_mean(str(name), names)}')
    try:
        return visionssm.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f'the model {name!r} cannot be built with {kwargs}: {error}') from error


def restore(
        net: nn.Module,
        inputs: torch.Tensor,
        tile: int | str | None = None,
        overlap: int = 32,
        ensemble: bool = False,
        device: torch.device | str | None = None,
        progress: Progress | None = None,
) -> torch.Tensor:
    """Restore pictures of any size.

    Args:
        net: A restoration model.
        inputs: Pictures, (B, C, H, W).
        tile: Side of the pieces that are restored one by one and blended; 'official' takes those of the official
            evaluation; None restores the whole at once.
        overlap: Pixels that pieces share.
        ensemble: Average over the eight turned and mirrored forms.
        device: Where to compute; that of `inputs` when None.
        progress: Called with the number of pieces done and of all pieces.

    Returns:
        (B, C, s H, s W) in float32, clamped to [0, 1], on the device of `inputs`.
    """
    scale, multiple = int(net.upscale), int(getattr(net, 'multiple', 1))

    def run(x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        pad = -width % multiple, -height % multiple
        if any(pad):
            x = F.pad(x, (0, pad[0], 0, pad[1]), mode='reflect' if min(height, width) >= multiple else 'replicate')
        return net(x)[..., :scale * height, :scale * width].float()

    def whole(x: torch.Tensor) -> torch.Tensor:
        return self_ensemble(run, x) if ensemble else run(x)

    if tile == 'official':
        out = restore_official(whole, inputs, scale)
    elif tile is None:
        out = whole(inputs if device is None else inputs.to(device)).to(inputs.device)
    else:
        out = restore_tiled(whole, inputs, scale, int(tile), overlap, device, progress)
    return out.clamp_(0, 1)


def _check_tile(tile: int | str | None, overlap: int) -> None:
    if tile is None or tile == 'official':
        return
    if not isinstance(tile, int) or not 0 <= overlap < tile:
        raise ValueError(f"tile is {tile!r} and overlap {overlap}; tile is None, 'official', or the side of a piece, "
                         'and 0 <= overlap < tile')


@MODELS.register_module()
class ImageRestorer(BaseModel):
    """Any restoration model of the package as an MMEngine model.

    Args:
        model: `name` and any argument of `visionssm.create_model`.
        loss: A registered loss; None takes `PixelLoss`, the mean absolute difference.
        tile: How predictions are made of large pictures, see `restore`.
        overlap: Pixels that pieces share.
        self_ensemble: Average predictions over eight forms of the picture ("+" in the papers).
        mixup: Parameter of the beta distribution by which half of the training batches are mixed; None mixes none.
        init_from: Weights that a training starts from, also those of another scale: what does not fit keeps its
            initial values. A resumed or evaluated model does not read them.
        grad_checkpointing: Whether blocks are recomputed in the backward pass to save memory.
        init_cfg: Not used: the models initialise themselves. Kept for MMEngine's protocol.
    """

    def __init__(
            self,
            model: dict,
            loss: dict | None = None,
            tile: int | str | None = None,
            overlap: int = 32,
            self_ensemble: bool = False,
            mixup: float | None = None,
            init_from: str | None = None,
            grad_checkpointing: bool = False,
            init_cfg: dict | None = None,
    ) -> None:
        if 'name' not in model:
            raise ValueError(f"model needs a 'name', as in dict(name='mambair_light_sr_x2'): got {dict(model)}")
        _check_tile(tile, overlap)
        if mixup is not None and not mixup > 0:
            raise ValueError(f'mixup is {mixup}; it must be above 0, or None')
        super().__init__(data_preprocessor=BaseDataPreprocessor(), init_cfg=init_cfg)
        self.model = create_restorer(**model)
        self.options = dict(model)
        if grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        with DefaultScope.overwrite_default_scope('visionssm'):
            self.loss = MODELS.build(loss or {'type': 'PixelLoss'})
        self.tile, self.overlap, self.self_ensemble = tile, overlap, self_ensemble
        self.mixup = mixup
        self.init_from = init_from

    def init_weights(self) -> None:
        """Read `init_from`, if it is given; else keep what the model has drawn or loaded."""
        if self.init_from is not None and not getattr(self, '_is_init', False):
            self._start_from(self.init_from)
        self._is_init = True

    def _start_from(self, source: str) -> None:
        if '://' not in source and not Path(source).is_file():
            raise FileNotFoundError(f'model.init_from is {source}, which does not exist: train that model first, name '
                                    'its published weights, or set model.init_from=None')
        own, state = self.model.state_dict(), read_weights(self.model, source, whole=False)
        fits = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
        if len(fits) < len(own) / 2:
            raise CheckpointError(f'model.init_from is {source}, which has {len(fits) or "none"} of the {len(own)} '
                                  f'tensors of {self.options["name"]}: it belongs to another model')
        self.model.load_state_dict(fits, strict=False)
        left = [key for key in own if key not in fits]
        print_log(f'training starts from {source}' + (f'; initial values stay in {", ".join(left)}' if left else ''),
                  logger='current', level=logging.INFO)

    def _mix(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mixup is None or torch.rand(()) < 0.5:
            return inputs, targets
        share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
        order = torch.randperm(len(inputs)).to(inputs.device)
        return inputs.lerp(inputs[order], 1 - share), targets.lerp(targets[order], 1 - share)

    def forward(
            self,
            inputs: torch.Tensor,
            targets: torch.Tensor | None = None,
            paths: Sequence[str] | None = None,
            indices: Sequence[int] | None = None,
            names: Sequence[str] | None = None,
            mode: Literal['tensor', 'loss', 'predict'] = 'tensor',
    ) -> torch.Tensor | dict[str, torch.Tensor] | list[dict[str, Any]]:
        """Restored pictures, a loss or predictions.

        Args:
            inputs: Bad pictures, (B, C, H, W), in [0, 1].
            targets: Good ones, (B, C, s H, s W).
            paths: Where they come from.
            indices: Their places in the data set.
            names: The data sets that they are from.
            mode: `tensor` for what the network gives, `loss` for `dict(loss=...)`, `predict` for one
                `dict(index, path, name, restored, target)` a picture, clamped to [0, 1], on the CPU.

        Returns:
            What `mode` asks for.
        """
        if mode == 'tensor':
            return self.model(inputs)
        if mode == 'loss':
            inputs, targets = self._mix(inputs, targets)
            # in float32 whatever autocast chose for the network
            return {'loss': self.loss(self.model(inputs).float(), targets)}
        if mode != 'predict':
            raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")
        restored = restore(self.model, inputs, self.tile, self.overlap, self.self_ensemble).cpu()
        count = len(restored)
        targets = [None] * count if targets is None else targets.cpu()
        rows = zip(range(count) if indices is None else indices, paths or [None] * count, names or [''] * count,
                   restored, targets, strict=True)
        return [{'index': index, 'path': path, 'name': name, 'restored': picture, 'target': target}
                for index, path, name, picture, target in rows]

    def export(self, state: Mapping[str, torch.Tensor], folder: str | Path, notes: Mapping[str, Any]) -> Path:
        """Write `model.safetensors` and `config.json`, from which `tools/predict.py` rebuilds the model.

        Args:
            state: State dict of this model, averaged where training averages.
            folder: Where to write.
            notes: Plain values about the training, kept in the file's metadata.

        Returns:
            The path of the weights; `visionssm.create_model(NAME, checkpoint_path=...)` reads them too.
        """
        arguments = {key: value for key, value in self.options.items()
                     if key not in ('name', 'pretrained', 'checkpoint_path')}
        config = {'architecture': self.options['name'], 'task': 'restoration', 'model_args': arguments}
        weights = {key.removeprefix('model.'): value for key, value in state.items() if key.startswith('model.')}
        metadata = {'config': json.dumps(config), 'notes': json.dumps(dict(notes))}
        target = save_safetensors(weights, Path(folder) / 'model.safetensors', metadata)
        atomic_write(json.dumps(config, indent=2).encode(), Path(folder) / 'config.json')
        return Path(target)
