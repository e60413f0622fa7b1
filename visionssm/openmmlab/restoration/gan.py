"""Training of a restoration network against a discriminator, for photographs whose faults are unknown."""
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from mmengine.dist import all_reduce_params, get_world_size
from mmengine.logging import MessageHub
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from ...registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from ...restoration.discriminator import UNetDiscriminator
from ...restoration.losses import GANLoss, PerceptualLoss
from .restorer import ImageRestorer

__all__ = ['GANOptimConstructor', 'GANOptimWrapper', 'GANRestorer']

for _part in (GANLoss, PerceptualLoss, UNetDiscriminator):
    MODELS.register_module(module=_part)

PLAYERS = ('generator', 'discriminator')


class GANOptimWrapper(OptimWrapperDict):
    """The optimizers of generator and discriminator; what asks for one precision is given the generator's."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The generator's context, in which a batch is looked at again after a failure."""
        with self.optim_wrappers['generator'].optim_context(model):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GANOptimConstructor:
    """Builds the optimizers of a :class:`GANRestorer`.

    Args:
        optim_wrapper_cfg: `generator` and `discriminator`, each what `optim_wrapper` is elsewhere, with a constructor
            of its own if it names one.
        paramwise_cfg: Not taken: it belongs into one of the two.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if paramwise_cfg or set(optim_wrapper_cfg) - {'type'} != set(PLAYERS):
            raise ValueError('optim_wrapper of a GAN takes constructor, generator=dict(optimizer=...) and '
                             f'discriminator=dict(optimizer=...), got {sorted(optim_wrapper_cfg)} and '
                             f'paramwise_cfg={paramwise_cfg}')
        self.parts = {name: dict(optim_wrapper_cfg[name]) for name in PLAYERS}
        for name, part in self.parts.items():
            if part.get('accumulative_counts', 1) != 1:
                raise ValueError(f'optim_wrapper.{name}.accumulative_counts is {part["accumulative_counts"]}; the two '
                                 'networks take turns at every step, so gradients cannot accumulate: set it to 1 and '
                                 'the batch size of train_dataloader to what fits')

    def __call__(self, model: nn.Module) -> GANOptimWrapper:
        """Build both.

        Args:
            model: The model.

        Returns:
            The optimizer wrappers, as `generator` and `discriminator`.
        """
        model = model.module if is_model_wrapper(model) else model
        if not isinstance(model, GANRestorer):
            raise ValueError(f'GANOptimConstructor is for a GANRestorer, and the model is {type(model).__name__}')
        found = {name: build_optim_wrapper(model.players[name], part) for name, part in self.parts.items()}
        for name, wrapper in found.items():
            if hasattr(wrapper, 'grad_name'):
                wrapper.grad_name = f'{name}_{wrapper.grad_name}'
        return GANOptimWrapper(**found)


@MODELS.register_module()
class GANRestorer(ImageRestorer):
    """A restoration model that learns from a pixel loss, a perceptual loss and a discriminator, as Real-ESRGAN does.

    Each step first updates the generator, the discriminator standing still, then the discriminator with what the
    generator made before. Logged are the generator's `loss` and its parts, the discriminator's `loss_d` and its parts,
    and the mean logits of real and of made pictures, `d_real` and `d_fake`. The losses and the discriminator compute in
    float32 whatever the precision of the generator. Evaluation, export and starts from weights know the generator
    alone; a checkpoint holds both, and a resumed run is the uninterrupted one.

    With several processes the model averages its gradients itself and needs no wrapper.

    Args:
        model: The generator, as for :class:`ImageRestorer`.
        loss: The pixel loss; its weight is `loss.weight`.
        perceptual: The perceptual loss, read when a training starts; None leaves it out.
        gan: A `GANLoss`; its weight counts for the generator.
        discriminator: A registered discriminator; by default a `UNetDiscriminator`.
        net_d_iters: Steps of the discriminator to one of the generator.
        net_d_init_iters: Steps of the discriminator before the generator begins to learn.
        **kwargs: What :class:`ImageRestorer` takes beside, except `mixup`.
    """

    # what evaluation does without
    training_only = ('discriminator',)
    averages_gradients = True

    def __init__(
            self,
            model: dict,
            loss: dict | None = None,
            perceptual: dict | None = None,
            gan: dict | None = None,
            discriminator: dict | None = None,
            net_d_iters: int = 1,
            net_d_init_iters: int = 0,
            **kwargs: Any,
    ) -> None:
        if kwargs.get('mixup') is not None:
            raise ValueError(f'mixup is {kwargs["mixup"]}; a GAN is trained on pictures that are not mixed: set it to '
                             'None')
        if net_d_iters < 1 or net_d_init_iters < 0:
            raise ValueError(f'net_d_iters is {net_d_iters} and net_d_init_iters {net_d_init_iters}; they must be at '
                             'least 1 and 0')
        super().__init__(model, loss, **kwargs)
        self.net_d_iters, self.net_d_init_iters = net_d_iters, net_d_init_iters
        # a list keeps its network out of checkpoints and averages
        self.perceptual_cfg, self.perceptual = perceptual, list[nn.Module]()
        with DefaultScope.overwrite_default_scope('visionssm'):
            self.gan_loss = MODELS.build({'type': 'GANLoss', 'weight': 0.1, **(gan or {})})
            self.discriminator = MODELS.build({'type': 'UNetDiscriminator', 'in_chans': self.model.in_chans,
                                               **(discriminator or {})})

    @property
    def players(self) -> dict[str, nn.Module]:
        """The networks by the names of their optimizers."""
        return {'generator': self.model, 'discriminator': self.discriminator}

    def init_weights(self) -> None:
        """Read the weights that a training needs: `init_from`, and those of the perceptual loss."""
        super().init_weights()
        self._read_perceptual()

    def _read_perceptual(self) -> None:
        if self.perceptual_cfg is None or self.perceptual:
            return
        with DefaultScope.overwrite_default_scope('visionssm'):
            loss = MODELS.build({'type': 'PerceptualLoss', **self.perceptual_cfg})
        self.perceptual.append(loss.to(next(self.model.parameters()).device))

    def forward(
            self,
            inputs: torch.Tensor,
            targets: torch.Tensor | None = None,
            paths: Sequence[str] | None = None,
            indices: Sequence[int] | None = None,
            names: Sequence[str] | None = None,
            mode: Literal['tensor', 'loss', 'predict', 'discriminate'] = 'tensor',
    ) -> Any:
        """As :class:`ImageRestorer`'s, with other losses.

        Args:
            inputs: Bad pictures, (B, C, H, W); in the mode `discriminate` what the generator made of them.
            targets: Good ones, (B, C, s H, s W).
            paths: Where they come from.
            indices: Their places in the data set.
            names: The data sets that they are from.
            mode: `loss` for the generator's losses with `restored`, what it made; `discriminate` for the losses and
                mean logits of the discriminator; or one of :class:`ImageRestorer`.

        Returns:
            What `mode` asks for.
        """
        if mode == 'loss':
            restored = self.model(inputs).float()
            return {**self._judge(restored, targets), 'restored': restored}
        if mode == 'discriminate':
            real, fake = self.discriminator(targets), self.discriminator(inputs)
            return {'loss_d_real': self.gan_loss(real, real=True, discriminator=True),
                    'loss_d_fake': self.gan_loss(fake, real=False, discriminator=True),
                    'd_real': real.detach().mean(), 'd_fake': fake.detach().mean()}
        return super().forward(inputs, targets, paths, indices, names, mode)

    def _judge(self, restored: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        losses = {'loss_pixel': self.loss(restored, targets)}
        self._read_perceptual()
        for loss in self.perceptual:
            losses['loss_perceptual'] = loss(restored, targets)
        losses['loss_gan'] = self.gan_loss(self.discriminator(restored), real=True)
        return losses

    def train_step(self, data: Any, optim_wrapper: Mapping[str, OptimWrapper]) -> dict[str, torch.Tensor]:
        """Update the generator, where it is its turn, then the discriminator.

        Args:
            data: A batch.
            optim_wrapper: What `GANOptimConstructor` built.

        Returns:
            What is logged.
        """
        if not isinstance(optim_wrapper, OptimWrapperDict):
            raise ValueError("GANRestorer needs two optimizers: optim_wrapper=dict(constructor='GANOptimConstructor', "
                             'generator=dict(optimizer=...), discriminator=dict(optimizer=...))')
        data = self.data_preprocessor(data, True)
        step = int(MessageHub.get_current_instance().get_info('iter', 0)) + 1
        logs: dict[str, torch.Tensor] = {}
        wrapper = optim_wrapper['generator']
        with wrapper.optim_context(self):
            if step % self.net_d_iters or step <= self.net_d_init_iters:
                with torch.no_grad():
                    restored = self.model(data['inputs']).float()
            else:
                self.discriminator.requires_grad_(False)
                losses = self(**data, mode='loss')
                restored = losses.pop('restored').detach()
                total, logs = self.parse_losses(losses)
        if logs:
            self._update(wrapper, self.model, total)
        self.discriminator.requires_grad_(True)
        wrapper = optim_wrapper['discriminator']
        with wrapper.optim_context(self):
            losses = self(restored, data['targets'], mode='discriminate')
        total, theirs = self.parse_losses(losses)
        self._update(wrapper, self.discriminator, total)
        return {**logs, 'loss_d': theirs.pop('loss'), **theirs}

    @staticmethod
    def _update(wrapper: OptimWrapper, network: nn.Module, loss: torch.Tensor) -> None:
        wrapper.backward(loss)
        if get_world_size() > 1:
            all_reduce_params([param.grad for param in network.parameters() if param.grad is not None], op='mean')
        wrapper.step()
        wrapper.zero_grad()
