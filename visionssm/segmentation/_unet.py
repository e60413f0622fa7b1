"""The U-Net of MHS-VM and VM-UNet, whatever mixes the pixels in its blocks

Strides 4 to 32 on the way down, the same on the way up, where the maps of the encoder are added; the last layers go
from a quarter of the resolution to the size of the image.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, List, Tuple

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, register_notrace_function, trunc_normal_
from timm.models import checkpoint
from torch import nn

from visionssm.layers import ConvStem, default_norm
from visionssm.models._hierarchy import reset_tree
from visionssm.models.mhs_vm import MHSBlock, make_stages

__all__ = ['PatchExpand', 'UNet', 'UpStage', 'fit_image', 'medical_cfg']


@register_notrace_function
def fit_image(x: torch.Tensor, in_chans: int, multiple: int) -> torch.Tensor:
    """Return images with all channels and with sides that are multiples of `multiple`.

    Args:
        x: Images, (B, in_chans, H, W), or gray ones (B, 1, H, W) where three channels are expected.
        in_chans: Channels of the model.
        multiple: Stride of the deepest map.

    Returns:
        (B, in_chans, H', W'): the gray channel three times, the last row and column repeated.
    """
    if x.dim() == 4 and x.shape[1] == 1 and in_chans == 3:
        x = x.expand(-1, 3, -1, -1)
    if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f'Expected images of shape (B, {in_chans}, H, W), got {x.dim()} dimensions: {x.shape}.')
    bottom, right = -x.shape[2] % multiple, -x.shape[3] % multiple
    if bottom > 0 or right > 0:
        x = F.pad(x, (0, right, 0, bottom), mode='replicate')
    return x


class PatchExpand(nn.Module):
    """Turn each pixel into a square of pixels: (B, H, W, C) to (B, s H, s W, C')."""

    def __init__(
            self,
            dim: int,
            out_dim: int,
            scale: int = 2,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the projection and the norm.

        Args:
            dim: Channels C.
            out_dim: Channels C' of the result.
            scale: Side s of the square.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.scale = scale
        self.out_dim = out_dim
        self.expand = nn.Linear(dim, scale ** 2 * out_dim, bias=False, device=device, dtype=dtype)
        self.norm = default_norm(out_dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge a map.

        Args:
            x: Map, (B, H, W, C).

        Returns:
            (B, s H, s W, C').
        """
        x = self.expand(x).unflatten(3, (self.scale, self.scale, self.out_dim))
        x = x.permute(0, 1, 3, 2, 4, 5)  # (B, H, s, W, s, C')
        return self.norm(x.flatten(3, 4).flatten(1, 2))


class UpStage(nn.Module):
    """A doubling of the resolution and blocks: (B, H, W, C_in) to (B, H', W', C)."""

    def __init__(self, upsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Assemble the stage.

        Args:
            upsample: Enlarges the map; an identity in the deepest stage.
            blocks: Each maps (B, H, W, C) to itself.
        """
        super().__init__()
        self.upsample = upsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C_in) to (B, H', W', C)."""
        x = self.upsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


class UNet(nn.Module):
    """A U-Net of mixers: images to one map of logits a class, or to one map of probabilities."""

    def __init__(
            self,
            mixer: Callable[..., nn.Module],
            in_chans: int,
            num_classes: int,
            depths: Sequence[int],
            depths_decoder: Sequence[int],
            dims: Sequence[int],
            probabilities: bool,
            drop_rate: float,
            drop_path_rate: float,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model.

        Args:
            mixer: Makes from (channels, device=, dtype=) what maps (B, H, W, C) to itself in a block.
            in_chans: Channels of the images; a model of 3 takes gray images too.
            num_classes: Classes.
            depths: Blocks of each stage of the encoder.
            depths_decoder: Blocks of each stage of the decoder, the deepest one first.
            dims: Channels of each stage of the encoder; the decoder has them in reverse.
            probabilities: Return probabilities where there is one class only; else, and for more classes, logits.
            drop_rate: Dropout behind the stem.
            drop_path_rate: Stochastic depth: it rises from 0 through the encoder and falls through the decoder.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        if len(depths_decoder) != len(depths):
            raise ValueError(f'depths_decoder are {tuple(depths_decoder)}; each of the {len(depths)} stages of the '
                             f'encoder needs one of the decoder.')
        if not dims or dims[0] % 4:
            raise ValueError(f'dims are {tuple(dims)}; the last layers need a multiple of 4 in the first stage.')
        if num_classes < 1:
            raise ValueError(f'num_classes is {num_classes}; at least 1 is needed.')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.probabilities = probabilities and num_classes == 1
        self.multiple = 4 << (len(depths) - 1)
        self.stem = ConvStem(in_chans, dims[0], 4, **dd)
        self.pos_drop = nn.Dropout(drop_rate)
        self.stages = nn.ModuleList(make_stages(dims, depths, drop_path_rate, 'crop', mixer, **dd))
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths_decoder))[::-1])
        up_dims = list(dims)[::-1]
        expands = [nn.Identity(), *(PatchExpand(dim, half, **dd) for dim, half in pairwise(up_dims))]
        self.up_stages = nn.ModuleList([
            UpStage(expand, [MHSBlock(dim, mixer(dim, **dd), next(rates), **dd) for _ in range(depth)])
            for expand, dim, depth in zip(expands, up_dims, depths_decoder, strict=True)])
        self.final_up = PatchExpand(dims[0], dims[0] // 4, 4, **dd)
        self.final_conv = nn.Conv2d(dims[0] // 4, num_classes, 1, **dd)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights.

        Args:
            needs_reset: Draw also what the sub-modules drew when they were built; needed after `to_empty()`.
        """
        if needs_reset:
            reset_tree(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=.02)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing what they compute."""
        for stage in [*self.stages, *self.up_stages]:
            stage.grad_checkpointing = enable

    def encode(self, x: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Run the encoder.

        Args:
            x: Images, (B, in_chans, H, W), sides multiples of the deepest stride.

        Returns:
            The deepest map (B, H', W', C'), and what the blocks of each stage read, the finest map first.
        """
        x = self.pos_drop(self.stem(x))
        skips: List[torch.Tensor] = []
        for stage in self.stages:
            x = stage.downsample(x)
            skips.append(x)
            for block in stage.blocks:
                if stage.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x)
                else:
                    x = block(x)
        return x, skips

    def forward_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, num_classes, H, W) of images (B, in_chans, H, W)."""
        height, width = x.shape[-2], x.shape[-1]
        x, skips = self.encode(fit_image(x, self.in_chans, self.multiple))
        for i, stage in enumerate(self.up_stages):
            if i > 0:
                x = x + skips[len(skips) - i]  # so the finest map is never used
            x = stage(x)
        x = self.final_conv(self.final_up(x).permute(0, 3, 1, 2))
        return x[:, :, :height, :width]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify every pixel.

        Args:
            x: Images, (B, in_chans, H, W).

        Returns:
            (B, num_classes, H, W): logits, or the probabilities of one class.
        """
        x = self.forward_logits(x)
        return x.sigmoid() if self.probabilities else x


def medical_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return the configuration that timm keeps beside a model, for U-Nets of medical images.

    Args:
        **kwargs: What is special to the weights.
    """
    return {
        'num_classes': 1,
        'input_size': (3, 256, 256),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        # images are stretched to 0..255 one by one, by their own darkest and brightest value
        'mean': (0., 0., 0.),
        'std': (1 / 255, 1 / 255, 1 / 255),
        'first_conv': 'stem.conv1',
        'classifier': 'final_conv',
        'license': 'apache-2.0',
        **kwargs,
    }
