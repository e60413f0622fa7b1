"""Diffusion networks as a model of the engine: the training loss, and losses at fixed noise for validation."""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import DefaultScope
from torch import nn

import visionssm

from ...checkpoints import save_safetensors
from ...diffusion.process import GaussianDiffusion
from ...registry import MODELS
from ...utils.suggest import did_you_mean

__all__ = ['DiffusionModel', 'LatentPreprocessor', 'create_denoiser']

# the fractions of its multiples spread evenly over [0, 1) however many there are
GOLDEN = 0.6180339887498949
# what the arguments of GaussianDiffusion are
PROCESS_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    'steps': ((int,), 'a whole number'),
    'schedule': ((str,), 'a name'),
    'respacing': ((str, list, tuple), 'a text or a list of whole numbers'),
    'prediction_type': ((str,), 'a name'),
    'learn_sigma': ((bool,), 'True or False'),
    'rescale_vlb': ((bool,), 'True or False'),
    'snr_gamma': ((int, float, type(None)), 'a number or None'),
}


def create_denoiser(name: str, **kwargs: Any) -> nn.Module:
    """Create a diffusion network, with errors that name the nearest valid spelling.

    Args:
        name: As `visionssm.list_models('diffusion')` has it.
        **kwargs: What `visionssm.create_model` takes.

    Returns:
        The model.
    """
    names = visionssm.list_models('diffusion')
    if str(name).partition('.')[0] not in names:
        raise ValueError(f'model.name is {name!r}; it must be a model of the task diffusion. '
                         f'{did_you_mean(str(name), names)}')
    try:
        return visionssm.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f'the model {name!r} cannot be built with {kwargs}: {error}') from error


def _check_process(process: Any) -> dict[str, Any]:
    """Return the arguments of the process, or raise a ValueError for one that it does not take."""
    if process is not None and not isinstance(process, Mapping):
        raise ValueError(f"model.process is {process!r}; it must be a dict, as in dict(prediction_type='epsilon')")
    for key, value in (process or {}).items():
        if key not in PROCESS_TYPES:
            raise ValueError(f'model.process has no key {key!r}. {did_you_mean(str(key), PROCESS_TYPES)}'.rstrip())
        kinds, words = PROCESS_TYPES[key]
        # True is an int to Python
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f'model.process.{key} is {value!r}; it must be {words}')
    return dict(process or {})


@MODELS.register_module()
class LatentPreprocessor(BaseDataPreprocessor):
    """Draw latents from the means and deviations that `tools/cache_latents.py` stored, and scale them.

    Args:
        scale: Factor of the latents; 0.18215 is that of Stable Diffusion's autoencoders.
        non_blocking: Whether copies to the device may overlap with computation.
    """

    def __init__(self, scale: float = 0.18215, non_blocking: bool = True) -> None:
        super().__init__(non_blocking=non_blocking)
        self.scale = scale

    def forward(self, data: dict, training: bool = False) -> dict:
        """Prepare one batch.

        Args:
            data: `inputs` (B, 2 C, H, W), means and deviations; anything else is passed on.
            training: Draw from the distribution; else its mean is taken.

        Returns:
            The batch with `inputs` (B, C, H, W).
        """
        data = self.cast_data(data)
        if data['inputs'].dim() != 4 or data['inputs'].shape[1] % 2:
            raise ValueError(f'the inputs have the shape {tuple(data["inputs"].shape)}; expected means and deviations '
                             'of latents, (B, 2 C, H, W), as LatentDataset reads them')
        mean, deviation = data['inputs'].float().chunk(2, dim=1)
        data['inputs'] = self.scale * (mean + deviation * torch.randn_like(mean) if training else mean)
        return data


@MODELS.register_module()
class DiffusionModel(BaseModel):
    """Any diffusion network of the package as an MMEngine model.

    Args:
        model: `name` and any argument of `visionssm.create_model`.
        process: Arguments of `visionssm.diffusion.GaussianDiffusion`: `schedule`, `prediction_type`, `snr_gamma`, ...
        data_preprocessor: None scales pixels to [-1, 1]; `dict(type='LatentPreprocessor')` reads cached latents.
        vae: Name or folder of the autoencoder that turns latents into pictures, for sampling; None for pixels.
        grad_checkpointing: Whether blocks are recomputed in the backward pass to save memory.
        seed: Of the noise of validation.
        init_cfg: Not used: the models initialise themselves. Kept for MMEngine's protocol.
    """

    def __init__(
            self,
            model: dict,
            process: dict | None = None,
            data_preprocessor: dict | None = None,
            vae: str | None = None,
            grad_checkpointing: bool = False,
            seed: int = 0,
            init_cfg: dict | None = None,
    ) -> None:
        if not isinstance(model, Mapping) or 'name' not in model:
            raise ValueError(f"model.model needs a 'name', as in dict(name='dis_small_patch2'): got {model!r}")
        options = _check_process(process)
        net = create_denoiser(**model)
        pixels = {'type': 'ClsDataPreprocessor', 'mean': [0.5] * net.in_chans, 'std': [0.5] * net.in_chans}
        with DefaultScope.overwrite_default_scope('visionssm'):
            super().__init__(data_preprocessor=MODELS.build(data_preprocessor or pixels), init_cfg=init_cfg)
        self.model = net
        self.options = dict(model)
        self.process = GaussianDiffusion(**{'learn_sigma': net.learn_sigma, **options})
        if self.process.learn_sigma != net.learn_sigma:
            raise ValueError(f'process.learn_sigma is {self.process.learn_sigma} and the network has '
                             f'learn_sigma={net.learn_sigma}; leave it out of process')
        self.process_options = options
        self.vae = vae
        self.seed = seed
        self.last_steps: list[int] = []
        if grad_checkpointing:
            net.set_grad_checkpointing(True)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None for a model without."""
        return self.model.num_classes or None

    def init_weights(self) -> None:
        """Keep what the network has drawn or loaded."""
        self._is_init = True

    def note_failure(self) -> str:
        """Return what a report of a loss that is not finite should say beside the step of the training."""
        return f'the time steps of the batch are {", ".join(map(str, self.last_steps))}'

    def _check(self, inputs: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
        """Return the labels, None for a model without classes."""
        net = self.model
        shape = (net.in_chans, net.img_size, net.img_size)
        if tuple(inputs.shape[1:]) != shape:
            kind = 'latents' if isinstance(self.data_preprocessor, LatentPreprocessor) else 'images'
            raise ValueError(f'the {kind} have the shape {tuple(inputs.shape[1:])} and the model takes {shape}; set '
                             'model.model.in_chans and model.model.img_size, or prepare them in another size')
        if net.num_classes == 0:
            return None
        if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < net.num_classes:
            raise ValueError(f'labels from {int(labels.min())} to {int(labels.max())}, and the model has the classes '
                             f'0 to {net.num_classes - 1}; set model.model.num_classes')
        return labels

    def _fixed(self, inputs: torch.Tensor, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return time steps and noise that are functions of the images' places in the data set."""
        steps = [int(index * GOLDEN % 1 * self.process.num_steps) for index in indices]
        noise = [torch.randn(inputs.shape[1:], generator=torch.Generator().manual_seed(self.seed * 2 ** 32 + index))
                 for index in indices]
        return torch.tensor(steps, device=inputs.device), torch.stack(noise).to(inputs)

    def _losses(self, inputs: torch.Tensor, labels: torch.Tensor | None, t: torch.Tensor, noise: torch.Tensor) -> dict:
        output = self.model(self.process.q_sample(inputs, t, noise), self.process.timesteps.to(t.device)[t], labels)
        return self.process.losses(inputs, output, noise, t)

    def forward(
            self,
            inputs: torch.Tensor,
            labels: torch.Tensor | None = None,
            paths: Sequence[str] | None = None,
            indices: Sequence[int] | None = None,
            mode: Literal['tensor', 'loss', 'predict'] = 'tensor',
    ) -> torch.Tensor | dict[str, torch.Tensor] | list[dict[str, Any]]:
        """The network's output for noisy images, losses of a batch, or losses of each image.

        Args:
            inputs: Clean images in [-1, 1], or latents, (B, C, H, W).
            labels: Classes, (B,).
            paths: Where the images come from; not used.
            indices: Places of the images in the data set, which fix time step and noise outside of training.
            mode: `loss` for `dict(loss=..., mse=..., vlb=...)` at random steps, `predict` for one
                `dict(index, step, loss, mse, vlb)` an image, `tensor` for the output at fixed steps.

        Returns:
            What `mode` asks for.
        """
        labels = self._check(inputs, labels)
        if mode == 'loss':
            t = torch.randint(0, self.process.num_steps, (len(inputs),), device=inputs.device)
            self.last_steps = t.tolist()
            losses = self._losses(inputs, labels, t, torch.randn_like(inputs))
            return {name: value.mean() for name, value in losses.items()}
        places = list(range(len(inputs))) if indices is None else list(indices)
        t, noise = self._fixed(inputs, places)
        if mode == 'tensor':
            return self.model(self.process.q_sample(inputs, t, noise), t, labels)
        if mode != 'predict':
            raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")
        columns = {name: value.tolist() for name, value in self._losses(inputs, labels, t, noise).items()}
        return [{'index': index, 'step': step, **{name: values[place] for name, values in columns.items()}}
                for place, (index, step) in enumerate(zip(places, t.tolist(), strict=True))]

    def export(self, state: Mapping[str, torch.Tensor], folder: str | Path, notes: Mapping[str, Any]) -> Path:
        """Write the network's weights, averaged where training averages.

        Args:
            state: State dict of this model.
            folder: Where `model.safetensors` goes; `visionssm.create_model(NAME, checkpoint_path=...)` reads it.
            notes: Plain values about the training, kept in the file's metadata; `classes` names the classes.

        Returns:
            The path of the weights.
        """
        notes = dict(notes)
        config = {'architecture': self.options['name'], 'task': 'diffusion', 'classes': notes.pop('classes', []),
                  'process': self.process_options,
                  'model_args': {key: value for key, value in self.options.items() if key != 'name'}}
        weights = {key.removeprefix('model.'): value for key, value in state.items() if key.startswith('model.')}
        metadata = {'config': json.dumps(config), 'notes': json.dumps(notes)}
        return Path(save_safetensors(weights, Path(folder) / 'model.safetensors', metadata))
