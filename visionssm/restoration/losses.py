"""Losses of image restoration; images have values in [0, 1]."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torchvision.models import VGG19_Weights
from torchvision.models.vgg import cfgs, make_layers

from visionssm.checkpoints import CheckpointError, check_fit, load_state_dict
from visionssm.utils.suggest import check_choice

from .sharpen import unsharp_mask

__all__ = ['CharbonnierLoss', 'GANLoss', 'PerceptualLoss', 'PixelLoss', 'VGG_LAYERS']

# the convolutions of VGG19 by their place in torchvision's list: each has a ReLU behind it, each block a pooling
VGG_LAYERS = {f'conv{block + 1}_{conv + 1}': 2 * (sum((2, 2, 4, 4)[:block]) + conv) + block
              for block, convs in enumerate((2, 2, 4, 4, 4)) for conv in range(convs)}
# what Real-ESRGAN compares
REAL_ESRGAN_LAYERS = {'conv1_2': 0.1, 'conv2_2': 0.1, 'conv3_4': 1., 'conv4_4': 1., 'conv5_4': 1.}


def _check_pair(restored: torch.Tensor, target: torch.Tensor) -> None:
    if restored.shape != target.shape:
        raise ValueError(f'The restored images are {tuple(restored.shape)} and the true ones '
                         f'{tuple(target.shape)}; does the scale of the model fit the data?')


class PixelLoss(nn.Module):
    """Mean absolute or squared difference, of all pixels alike or weighted."""

    def __init__(self, kind: str = 'l1', weight: float = 1., sharpen: bool = False) -> None:
        """Choose the difference.

        Args:
            kind: 'l1' or 'mse'.
            weight: Factor of the loss.
            sharpen: Compare with the true images after `unsharp_mask`, as Real-ESRGAN does.
        """
        super().__init__()
        check_choice('kind', kind, ('l1', 'mse'))
        self.kind = kind
        self.weight = weight
        self.sharpen = sharpen

    def difference(self, restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the difference of every value, in float32 at least."""
        gap = restored.to(target.dtype) - target
        return gap.abs() if self.kind == 'l1' else gap.square()

    def forward(
            self,
            restored: torch.Tensor,
            target: torch.Tensor,
            mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compare images.

        Args:
            restored: (B, C, H, W).
            target: (B, C, H, W).
            mask: Factors of the pixels, to be broadcast; ones when None.

        Returns:
            A scalar.
        """
        _check_pair(restored, target)
        target = unsharp_mask(target) if self.sharpen else target
        gap = self.difference(restored, target.float() if target.dtype != torch.float64 else target)
        return self.weight * (gap if mask is None else gap * mask).mean()


class CharbonnierLoss(PixelLoss):
    """Mean of sqrt(d^2 + eps), a smooth absolute difference; the official recipes take eps = 1e-3."""

    def __init__(self, eps: float = 1e-3, weight: float = 1.) -> None:
        """Set the width of the smooth part.

        Args:
            eps: Added to the squared difference.
            weight: Factor of the loss.
        """
        super().__init__('mse', weight)
        if not eps > 0:
            raise ValueError(f'eps is {eps}; it must be above 0.')
        self.eps = eps

    def difference(self, restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the smooth difference of every value."""
        return (super().difference(restored, target) + self.eps).sqrt()


class GANLoss(nn.Module):
    """Loss of a discriminator's logits, and of the generator that wants them high."""

    def __init__(self, kind: str = 'vanilla', weight: float = 1.) -> None:
        """Choose the loss.

        Args:
            kind: 'vanilla' (cross-entropy), 'lsgan' (squared distance to 0 and 1) or 'hinge'.
            weight: Factor of the generator's loss; the discriminator's has none.
        """
        super().__init__()
        check_choice('kind', kind, ('vanilla', 'lsgan', 'hinge'))
        self.kind = kind
        self.weight = weight

    def forward(self, logits: torch.Tensor, real: bool, discriminator: bool = False) -> torch.Tensor:
        """Judge logits.

        Args:
            logits: Of the discriminator, any shape.
            real: Whether they should say that the images are real.
            discriminator: Whether the discriminator learns, rather than the generator.

        Returns:
            A scalar.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.kind == 'hinge':
            sign = 1. if real else -1.
            loss = (1 - sign * logits).relu().mean() if discriminator else -sign * logits.mean()
        elif self.kind == 'lsgan':
            loss = (logits - float(real)).square().mean()
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))
        return loss if discriminator else self.weight * loss


def _vgg19_state(weights: str | os.PathLike) -> Mapping[str, torch.Tensor]:
    """Read the weights of VGG19's convolutions, as 'NUMBER.weight' and 'NUMBER.bias'."""
    official = VGG19_Weights.IMAGENET1K_V1
    name = official.url.rpartition('/')[2]
    if weights == 'imagenet':
        try:
            state = official.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"The perceptual loss needs torchvision's VGG19 with weights of ImageNet, the file {name}, which could "
                f'not be fetched: {error}. Fetch {official.url} where there is a network, and set weights=PATH of the '
                f'loss or put the file into {Path(torch.hub.get_dir(), "checkpoints")}.') from error
    elif weights is None or not Path(weights).is_file():
        raise FileNotFoundError(f'The perceptual loss has weights={weights!r}, which is no file. It takes the path of '
                                f"torchvision's {name}, also as .safetensors, 'imagenet' to fetch it, or 'random' for "
                                'tests.')
    else:
        state = load_state_dict(weights)
    return {key.removeprefix('features.'): value for key, value in state.items() if not key.startswith('classifier.')}


class PerceptualLoss(nn.Module):
    """Mean difference of the feature maps of a trained VGG19 before activation, in float32 whatever autocast says.

    "Perceptual losses for real-time style transfer and super-resolution", https://arxiv.org/abs/1603.08155; layers and
    factors of Real-ESRGAN, https://arxiv.org/abs/2107.10833. The network is not trained.
    """

    def __init__(
            self,
            weights: str | os.PathLike = 'imagenet',
            layers: Mapping[str, float] | None = None,
            kind: str = 'l1',
            weight: float = 1.,
            sharpen: bool = False,
    ) -> None:
        """Read the network.

        Args:
            weights: Of VGG19: 'imagenet' fetches torchvision's; a path reads them from a file, running no code of it;
                'random' draws them, which is of use to tests alone.
            layers: Name, as 'conv5_4', to factor; those of Real-ESRGAN when None.
            kind: 'l1' or 'mse'.
            weight: Factor of the loss.
            sharpen: Compare with the true images after `unsharp_mask`.
        """
        super().__init__()
        check_choice('kind', kind, ('l1', 'mse'))
        layers = REAL_ESRGAN_LAYERS if layers is None else layers
        for name in layers:
            check_choice('a layer', name, tuple(VGG_LAYERS))
        if not layers:
            raise ValueError("layers is empty; name one, as in layers={'conv5_4': 1.}.")
        self.factors = {VGG_LAYERS[name]: factor for name, factor in layers.items()}
        self.weight = weight
        self.sharpen = sharpen
        net = make_layers(cfgs['E'], batch_norm=False)[:max(self.factors) + 1]
        for module in net:
            if isinstance(module, nn.ReLU):
                # the maps in front of it are compared, so it must not write over them
                module.inplace = False
        if weights != 'random':
            own = net.state_dict()
            state = {key: value for key, value in _vgg19_state(weights).items()
                     if key in own or not key.partition('.')[0].isdigit()}
            try:
                check_fit(net, state, f'the weights {str(weights)!r}')
            except CheckpointError as error:
                raise CheckpointError(f'The perceptual loss takes weights of VGG19. {error}') from error
            net.load_state_dict(state)
        self.net = net.eval().requires_grad_(False)
        self.criterion = nn.L1Loss() if kind == 'l1' else nn.MSELoss()
        self.register_buffer('mean', torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)

    def features(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the maps that are compared, by the place of their layer in the network.

        Args:
            x: Images, (B, C, H, W), RGB or gray.
        """
        if x.shape[1] not in (1, 3):
            raise ValueError(f'The images have {x.shape[1]} channels; the perceptual loss compares RGB or gray ones.')
        x = (x.to(self.mean.dtype) - self.mean) / self.std
        maps = {}
        for place, layer in enumerate(self.net):
            x = layer(x)
            if place in self.factors:
                maps[place] = x
        return maps

    def forward(self, restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare images.

        Args:
            restored: (B, C, H, W), RGB or gray, with sides of at least 16 for the deepest layers.
            target: (B, C, H, W); no gradient flows to it.

        Returns:
            A scalar.
        """
        _check_pair(restored, target)
        with torch.autocast(restored.device.type, enabled=False):
            target = unsharp_mask(target) if self.sharpen else target
            with torch.no_grad():
                wanted = self.features(target)
            found = self.features(restored)
            gaps = [factor * self.criterion(found[place], wanted[place]) for place, factor in self.factors.items()]
            return self.weight * torch.stack(gaps).sum()
