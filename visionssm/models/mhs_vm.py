"""MHS-VM (Multi-Head Scan Vision Mamba)

A hierarchical backbone whose blocks cut the channels into sub-spaces, read each along paths of its own (snakes,
zigzags, spirals, lines) and weigh what the paths give by how much they disagree.

Paper: `MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba`
    - https://arxiv.org/abs/2406.05992
Code: https://github.com/PixDeep/MHS-VM (Apache-2.0)

Written anew from the published equations and checkpoints. The official network is a U-Net for medical images and
stands in `visionssm.segmentation.mhs_unet`, with its weights. The classifiers here are ours: its encoder with a norm, a
pool and a linear layer behind it. There are no official weights for them; an encoder of the U-Net fits by its keys.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn

from visionssm.checkpoints.load import unwrap
from visionssm.layers import ConvStem, GatedMultiHeadScan, PatchMerging, default_norm

from ._builder import build_model
from ._hierarchy import Hierarchy, Stage, stage_drop_path_rates

__all__ = ['MHSVM']


class MHSBlock(nn.Module):
    """A norm and a mixer, in MHS-VM a gated multi-head scan, around a residual connection; no MLP."""

    def __init__(
            self,
            dim: int,
            mixer: nn.Module,
            drop_path: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Assemble the block.

        Args:
            dim: Channels C.
            mixer: Maps (B, H, W, C) to itself.
            drop_path: Rate at which the branch is dropped.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.norm = default_norm(dim, device=device, dtype=dtype)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        return x + self.drop_path(self.mixer(self.norm(x)))


def make_stages(
        dims: Sequence[int],
        depths: Sequence[int],
        drop_path_rate: float,
        pad: str,
        mixer: Callable[..., nn.Module],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
) -> list[Stage]:
    """Build the stages of the encoder; all but the first one halve the map first.

    Args:
        dims: Channels of each stage.
        depths: Blocks of each stage.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        pad: What becomes of odd maps, see `PatchMerging`.
        mixer: Makes the mixer of a block from (channels, device=, dtype=).
        device: Where the parameters are created.
        dtype: Type of the parameters.

    Returns:
        Modules that map (B, H, W, C) to (B, H', W', C').
    """
    if not dims or len(dims) != len(depths):
        raise ValueError(f'dims are {tuple(dims)} and depths {tuple(depths)}; one of each is needed for every stage.')
    dd: dict[str, Any] = {'device': device, 'dtype': dtype}
    rates = stage_drop_path_rates(drop_path_rate, depths)
    return [
        Stage(
            PatchMerging(dims[i - 1], dim, pad, **dd) if i else nn.Identity(),
            [MHSBlock(dim, mixer(dim, **dd), rate, **dd) for rate in rates[i]])
        for i, dim in enumerate(dims)]


class MHSVM(Hierarchy):
    """MHS-VM as a classifier: the encoder of the official U-Net, norm, pool, linear layer."""

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            depths: Sequence[int] = (2, 2, 2, 2),
            dims: Sequence[int] = (96, 192, 384, 768),
            d_state: int = 16,
            num_heads: int = 4,
            project_out: bool = True,
            threshold: float = 0.4,
            drop_rate: float = 0.,
            mixer_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model.

        Args:
            in_chans: Channels of the images.
            num_classes: Classes; 0 for no classifier.
            global_pool: Pooling in front of the classifier.
            depths: Blocks of each stage.
            dims: Channels of each stage.
            d_state: State size N.
            num_heads: Heads of the scan: 3, or 4 for plain lines too.
            project_out: Normalise and project the joined heads; without, `num_heads` must divide `dims`.
            threshold: Routes of a pixel whose coefficient of variation is below are left out.
            drop_rate: Dropout in front of the classifier.
            mixer_drop_rate: Dropout behind the gate of each mixer.
            drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        # Odd maps are padded, not cropped as in the U-Net, so that small images keep at least one pixel.
        mixer = partial(
            GatedMultiHeadScan, d_state=d_state, num_heads=num_heads, project_out=project_out, threshold=threshold,
            drop=mixer_drop_rate)
        stages = make_stages(dims, depths, drop_path_rate, 'pad', mixer, **dd)
        super().__init__(
            stem=ConvStem(in_chans, dims[0], 4, **dd), stages=stages, dims=dims, in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate, norm=default_norm(dims[-1], **dd),
            **dd)
        self.init_weights(needs_reset=False)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a checkpoint of ours as it is: there is no official classifier.

    Args:
        state_dict: A state dict or a training checkpoint around one.
        model: An `MHSVM`.

    Returns:
        The state dict.
    """
    return unwrap(state_dict)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1',
        'classifier': 'head.fc',
        'license': 'apache-2.0',
        'origin_url': 'https://github.com/PixDeep/MHS-VM',
        'paper_name': 'MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba',
        'paper_ids': 'arXiv:2406.05992',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'mhs_vm_tiny': _cfg(
        description='The encoder of the official U-Net as a classifier; there are no official weights of it.'),
    'mhs_vm_pico': _cfg(
        input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0,
        description='A small model without weights, for tests.'),
})


def _create_mhs_vm(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> MHSVM:
    return build_model(MHSVM, variant, pretrained, checkpoint_filter_fn, **dict(model_args, **kwargs))


@register_model
def mhs_vm_tiny(pretrained: bool = False, **kwargs: Any) -> MHSVM:
    """The encoder of the official U-Net with 4 heads as a classifier: no official weights exist."""
    return _create_mhs_vm('mhs_vm_tiny', pretrained, kwargs)


@register_model
def mhs_vm_pico(pretrained: bool = False, **kwargs: Any) -> MHSVM:
    """A weightless MHS-VM for tests and demonstrations: 32 x 32 images, quick on a CPU."""
    return _create_mhs_vm('mhs_vm_pico', pretrained, kwargs, depths=(1, 1, 1, 1), dims=(16, 32, 64, 128), d_state=4)
