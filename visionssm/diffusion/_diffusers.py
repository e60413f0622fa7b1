"""What needs the package diffusers: samplers, DiS as one of its models, and the pipeline that draws images."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

try:
    # SchedulerMixin stands here for diffusers, which looks for the kinds it can load in the module of a class
    from diffusers import (
        AutoencoderKL,
        ConfigMixin,
        DDIMScheduler,
        DDPMScheduler,
        DiffusionPipeline,
        DPMSolverMultistepScheduler,
        ImagePipelineOutput,
        ModelMixin,
        SchedulerMixin,
    )
    from diffusers.configuration_utils import register_to_config
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError('Sampling needs the package diffusers: pip install "visionssm[diffusion]" brings it.') from error

from visionssm.utils.suggest import check_choice

from .dis import DiS
from .process import GaussianDiffusion, respaced_timesteps

__all__ = ['SAMPLERS', 'DiSModel', 'DiSPipeline', 'RespacedDDIMScheduler', 'RespacedDDPMScheduler', 'SchedulerMixin',
           'image_generators', 'make_scheduler']

SAMPLERS = ('ddpm', 'ddim', 'dpmsolver++')


def _check_steps(steps: int | None, total: int) -> None:
    if steps is None or not 1 <= steps <= total:
        raise ValueError(f'The number of steps is {steps}; the process was trained with {total}, so 1 to {total} are '
                         'possible.')


def _chosen(total: int, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> list[int]:
    """Return the steps of the short process, falling."""
    if timesteps is not None:
        return list(timesteps)
    _check_steps(num_inference_steps, total)
    return respaced_timesteps(total, [int(num_inference_steps or 0)])[::-1]


class RespacedDDPMScheduler(DDPMScheduler):
    """diffusers' DDPM with the steps of improved diffusion's respacing, and tables in float64."""

    def set_timesteps(
            self,
            num_inference_steps: int | None = None,
            device: torch.device | str | None = None,
            timesteps: list[int] | None = None,
    ) -> None:
        """Choose the steps.

        Args:
            num_inference_steps: How many, from the first to the last one of the process.
            device: Where `timesteps` lies.
            timesteps: The steps themselves, falling.
        """
        chosen = _chosen(self.config.num_train_timesteps, num_inference_steps, timesteps)
        super().set_timesteps(device=device, timesteps=chosen)
        if self.config.trained_betas is not None:
            # the product of a thousand float32 values is further from the truth than the samples may be
            self.alphas_cumprod = (1 - torch.tensor(self.config.trained_betas, dtype=torch.float64)).cumprod(0)


class RespacedDDIMScheduler(DDIMScheduler):
    """diffusers' DDIM on any choice of steps, with a learned variance, which it does not read.

    diffusers computes the step before by one division, which is another step than the chosen one unless their number
    divides that of the process. So a second scheduler walks through the short process step by step.
    """

    def set_timesteps(
            self,
            num_inference_steps: int | None = None,
            device: torch.device | str | None = None,
            timesteps: list[int] | None = None,
    ) -> None:
        """Choose the steps; arguments as in `RespacedDDPMScheduler.set_timesteps`."""
        chosen = _chosen(self.config.num_train_timesteps, num_inference_steps, timesteps)
        self.num_inference_steps = len(chosen)
        self.timesteps = torch.tensor(chosen, device=device)
        betas = self.config.trained_betas
        alphas = self.alphas_cumprod if betas is None else (
            1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
        self.short = DDIMScheduler.from_config(
            {**self.config, 'num_train_timesteps': len(chosen), 'trained_betas': [0.5] * len(chosen)})
        self.short.alphas_cumprod = alphas[chosen[::-1]]
        self.short.num_inference_steps = len(chosen)
        self.places = {step: len(chosen) - 1 - place for place, step in enumerate(chosen)}

    def step(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, **kwargs: Any) -> Any:
        """Go to the step before.

        Args:
            model_output: (B, C or 2 C, H, W).
            timestep: The step, one of `timesteps`.
            sample: (B, C, H, W).
            **kwargs: `eta`, `generator`, `variance_noise`, `return_dict` as in diffusers.

        Returns:
            As diffusers' scheduler.
        """
        prediction = model_output[:, :sample.shape[1]]
        # the noise follows from the clipped image, as everywhere but in diffusers' defaults
        return self.short.step(
            prediction, self.places[int(timestep)], sample, use_clipped_model_output=True, **kwargs)


class LearnedDPMSolverScheduler(DPMSolverMultistepScheduler):
    """diffusers' DPM-Solver for networks that return a variance too, which diffusers expects after three channels."""

    def step(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Go to the step before; arguments as in diffusers, the output may have twice the channels of `sample`."""
        return super().step(model_output[:, :sample.shape[1]], timestep, sample, *args, **kwargs)


def make_scheduler(
        name: str,
        process: GaussianDiffusion,
        steps: int | str | None = None,
        clip: bool = False,
) -> SchedulerMixin:
    """Make a sampler of diffusers for a process.

    Args:
        name: 'ddpm', 'ddim' or 'dpmsolver++'.
        process: The process that the model was trained with, of all steps.
        steps: How many steps to take, or their respacing as in `respaced_timesteps`; None leaves that to
            `set_timesteps`. DPM-Solver++ chooses its own steps and takes a number only.
        clip: Keep the clean image within [-1, 1] at every step.

    Returns:
        The scheduler.
    """
    check_choice('sampler', name, SAMPLERS)
    common = {'num_train_timesteps': process.num_steps, 'trained_betas': process.betas.tolist(),
              'prediction_type': process.prediction_type}
    if name == 'ddpm':
        kind = 'learned_range' if process.learn_sigma else 'fixed_large'
        scheduler = RespacedDDPMScheduler(**common, variance_type=kind, clip_sample=clip)
    elif name == 'ddim':
        scheduler = RespacedDDIMScheduler(**common, clip_sample=clip)
    else:
        scheduler = LearnedDPMSolverScheduler(**common, algorithm_type='dpmsolver++', timestep_spacing='linspace')
    if isinstance(steps, str) and name == 'dpmsolver++':
        raise ValueError(f'DPM-Solver++ chooses its own steps; give a number instead of the respacing {steps!r}.')
    if isinstance(steps, str):
        scheduler.set_timesteps(timesteps=respaced_timesteps(process.num_steps, steps)[::-1])
    elif steps is not None:
        _check_steps(steps, process.num_steps)
        scheduler.set_timesteps(steps)
    return scheduler


def image_generators(seed: int, indices: Sequence[int], device: torch.device | str = 'cpu') -> list[torch.Generator]:
    """Return one generator an image, so that an image is the same whatever the others of its batch are.

    Args:
        seed: Of the run.
        indices: Numbers of the images.
        device: Where the noise is drawn; on the CPU it is the same for all devices.
    """
    states = [np.random.SeedSequence([seed, index]).generate_state(2) for index in indices]
    return [torch.Generator(device).manual_seed(int(low) << 31 | int(high) >> 1) for low, high in states]


class DiSModel(ModelMixin, ConfigMixin):
    """A `DiS` as a model of diffusers, which can save and load itself."""

    @register_to_config
    def __init__(
            self,
            img_size: int = 32,
            patch_size: int = 2,
            in_chans: int = 4,
            num_classes: int = 1000,
            embed_dim: int = 768,
            depth: int = 24,
            d_state: int = 16,
            learn_sigma: bool = True,
    ) -> None:
        """Build the network; arguments as in `DiS`."""
        super().__init__()
        self.net = DiS(img_size, patch_size, in_chans, num_classes, embed_dim, depth, d_state, learn_sigma)

    @classmethod
    def wrap(cls, net: DiS) -> 'DiSModel':
        """Make a model of diffusers around a network, which is not copied."""
        with torch.device('meta'):
            model = cls(
                net.img_size, net.patch_size, net.in_chans, net.num_classes, net.pos_embed.shape[-1],
                2 * len(net.in_blocks), net.mid_block.mixer.ssm.A_log.shape[-1], net.learn_sigma)
        model.net = net
        return model

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Predict the noise, as `DiS.forward`."""
        return self.net(x, t, y)


class DiSPipeline(DiffusionPipeline):
    """Draws images with a `DiS`: a class each, or none, and guidance; latents become images by an autoencoder."""

    model_cpu_offload_seq = 'transformer->vae'
    _optional_components = ['vae']

    def __init__(
            self,
            transformer: nn.Module,
            scheduler: SchedulerMixin,
            vae: AutoencoderKL | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            transformer: A `DiS`, or a `DiSModel`.
            scheduler: One of `make_scheduler`, or any of diffusers that fits the training.
            vae: Where the model draws latents: what decodes them after division by `vae.config.scaling_factor`.
        """
        super().__init__()
        wrapped = DiSModel.wrap(transformer) if isinstance(transformer, DiS) else transformer
        self.register_modules(transformer=wrapped, scheduler=scheduler, vae=vae)

    def _labels(self, class_labels: int | Sequence[int] | None, batch_size: int | None) -> torch.Tensor | None:
        classes = self.transformer.net.num_classes
        if classes == 0:
            if class_labels is not None:
                raise ValueError('This model is unconditional and takes no class_labels.')
            return None
        if class_labels is None:
            raise ValueError(f'This model needs class_labels, 0 to {classes - 1}.')
        given = class_labels.tolist() if isinstance(class_labels, torch.Tensor | np.ndarray) else class_labels
        labels = [given] * (1 if batch_size is None else batch_size) if isinstance(given, int) else list(given)
        wrong = [label for label in labels if not isinstance(label, int | np.integer) or not 0 <= label < classes]
        if wrong or not labels:
            raise ValueError(f'class_labels holds {wrong or "nothing"}; the model has the classes 0 to {classes - 1}.')
        if batch_size not in (None, len(labels)):
            raise ValueError(f'batch_size is {batch_size} and class_labels has {len(labels)} classes; leave one out.')
        return torch.tensor(labels)

    @torch.no_grad()
    def __call__(
            self,
            class_labels: int | Sequence[int] | None = None,
            num_inference_steps: int | None = 250,
            guidance_scale: float = 1.5,
            generator: torch.Generator | list[torch.Generator] | None = None,
            batch_size: int | None = None,
            guided_channels: int | None = None,
            eta: float = 0.0,
            output_type: str = 'pil',
            return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            class_labels: A class an image; None for a model without classes.
            num_inference_steps: Steps; None keeps those that the scheduler has.
            guidance_scale: Strength of the guidance by the class; 1 is none.
            generator: One for all images, or a list with one an image, as `image_generators` makes.
            batch_size: Images of a model without classes, or of one class.
            guided_channels: Channels that guidance changes; None for the authors' first three, or fewer.
            eta: Noise of DDIM, from 0 to 1.
            output_type: 'pil'; 'np', (B, H, W, C) in [0, 1]; 'pt', (B, C, H, W) in [0, 1]; 'latent', what the model
                draws.
            return_dict: Return an object with `images` instead of a tuple.

        Returns:
            The images.
        """
        check_choice('output_type', output_type, ('pil', 'np', 'pt', 'latent'))
        if not 0 <= eta <= 1:
            raise ValueError(f'eta is {eta}; it must be from 0 to 1.')
        if not math.isfinite(guidance_scale):
            raise ValueError(f'guidance_scale is {guidance_scale}; it must be finite.')
        net, device = self.transformer.net, self._execution_device
        labels = self._labels(class_labels, batch_size)
        if labels is None and guidance_scale != 1:
            raise ValueError(f'guidance_scale is {guidance_scale}, and an unconditional model cannot be guided by '
                             'classes; set 1.')
        if batch_size is not None and batch_size < 1:
            raise ValueError(f'batch_size is {batch_size}; it must be at least 1.')
        count = (batch_size or 1) if labels is None else len(labels)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f'{len(generator)} generators were given for {count} images; give one an image, or one.')
        x = randn_tensor((count, net.in_chans, net.img_size, net.img_size), generator, device, torch.float32)
        guided = guidance_scale != 1
        if labels is not None:
            labels = labels.to(device)
            labels = torch.cat([labels, torch.full_like(labels, net.null_class)]) if guided else labels
        if num_inference_steps is not None:
            _check_steps(num_inference_steps, self.scheduler.config.num_train_timesteps)
            self.scheduler.set_timesteps(num_inference_steps)
        elif getattr(self.scheduler, 'step_index', None) is not None:
            # a solver of several steps remembers the images of the last call
            self.scheduler.set_timesteps(self.scheduler.num_inference_steps)
        x = x * self.scheduler.init_noise_sigma
        extra = {'eta': eta} if isinstance(self.scheduler, DDIMScheduler) else {}
        for step in self.progress_bar(self.scheduler.timesteps.tolist()):
            noisy = x.to(net.pos_embed.dtype)
            t = torch.full((count,), step, device=device)
            if guided:
                output = net.forward_with_cfg(
                    torch.cat([noisy] * 2), torch.cat([t] * 2), labels, guidance_scale,
                    min(3, net.in_chans) if guided_channels is None else guided_channels)[:count]
            else:
                output = net(noisy, t, labels)
            x = self.scheduler.step(output.float(), step, x, generator=generator, **extra).prev_sample
        images = self._finish(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _finish(self, x: torch.Tensor, output_type: str) -> Any:
        if output_type == 'latent':
            return x
        if self.vae is not None:
            x = self.vae.decode((x / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == 'pt':
            return x
        array = x.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(array) if output_type == 'pil' else array
