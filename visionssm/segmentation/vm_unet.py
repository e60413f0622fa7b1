"""VM-UNet, the baseline of MHS-VM: the same U-Net with VMamba's mixer (SS2D) in its blocks

Paper: `VM-UNet: Vision Mamba UNet for Medical Image Segmentation`
    - https://arxiv.org/abs/2402.02491
Code: https://github.com/JCruan519/VM-UNet (Apache-2.0)

Written anew from what is known of it: the network that MHS-VM took over, with blocks of VMamba's first version (four
scans along rows and columns, twice the channels inside, a gate, a projection behind it). The depths are those of
MHS-VM's configuration, so that both differ in the mixer alone. No weights of the authors load: their names of the
parameters could not be checked. They start from an ImageNet model of VMamba; `load_vmamba` does this.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import nn

from visionssm.checkpoints.load import CheckpointError, check_fit, unwrap
from visionssm.layers import SS2D
from visionssm.models._builder import build_task_model
from visionssm.models._tasks import register_task_model
from visionssm.utils.suggest import list_names

from ._unet import UNet, medical_cfg

__all__ = ['VMUNet']


class VMUNet(UNet):
    """VM-UNet: images to one map of logits a class, or to one map of probabilities."""

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1,
            depths: Sequence[int] = (2, 2, 2, 2),
            depths_decoder: Sequence[int] = (2, 2, 2, 1),
            dims: Sequence[int] = (96, 192, 384, 768),
            d_state: int = 16,
            expand: float = 2.,
            probabilities: bool = True,
            drop_rate: float = 0.,
            mixer_drop_rate: float = 0.,
            drop_path_rate: float = 0.2,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model.

        Args:
            in_chans: Channels of the images; a model of 3 takes gray images too.
            num_classes: Classes.
            depths: Blocks of each stage of the encoder.
            depths_decoder: Blocks of each stage of the decoder, the deepest one first.
            dims: Channels of each stage of the encoder; the decoder has them in reverse.
            d_state: State size N.
            expand: Inner channels of the mixer over its channels.
            probabilities: Return probabilities where there is one class only; else, and for more classes, logits.
            drop_rate: Dropout behind the stem.
            mixer_drop_rate: Dropout behind each mixer.
            drop_path_rate: Stochastic depth: it rises from 0 through the encoder and falls through the decoder.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        mixer = partial(SS2D, d_state=d_state, expand=expand, gate='act', drop=mixer_drop_rate)
        super().__init__(
            mixer, in_chans, num_classes, depths, depths_decoder, dims, probabilities, drop_rate, drop_path_rate,
            device, dtype)

    def load_vmamba(self, state_dict: Mapping[str, Any]) -> None:
        """Start from a VMamba of the first version, such as `vmamba_tiny_v0`.

        Stem, downsampling and blocks of the encoder are taken over, as many blocks of a stage as there are here; each
        stage of the decoder starts with the same blocks as the stage of the encoder that has its channels. What
        enlarges the maps, and the last layers, keep their values.

        Args:
            state_dict: Weights of the `VMamba`, in our names.

        Raises:
            CheckpointError: The weights are of another model or size.
        """
        source, own = unwrap(state_dict), self.state_dict()
        wanted = {key: _vmamba_key(key, len(self.stages) - 1) for key in own}
        taken = {key: source[theirs] for key, theirs in wanted.items() if theirs in source}
        missing = [wanted[key] for key in own if key.startswith(('stem.', 'stages.')) and key not in taken]
        if missing:
            raise CheckpointError(
                f'These are not the weights of a VMamba of the first version with at least as many blocks as the '
                f'encoder: {len(missing)} entries are missing: {list_names(missing)}. Give those of vmamba_tiny_v0, '
                f'vmamba_small_v0 or vmamba_base_v0.')
        check_fit(self, {**own, **taken}, 'The VMamba')
        self.load_state_dict({**own, **taken})


def _vmamba_key(key: str, last: int) -> str:
    """Return what VMamba calls a parameter of the U-Net, '' where it has none of its kind.

    Args:
        key: Our key.
        last: Number of the deepest stage, which the decoder starts with.
    """
    part, _, rest = key.partition('.')
    if part == 'up_stages':
        stage, _, rest = rest.partition('.')
        part, key = ('stages', f'stages.{last - int(stage)}.{rest}') if rest.startswith('blocks.') else ('', '')
    if part == 'stages' and '.blocks.' in key:
        return key.replace('.norm.', '.norm1.', 1)
    return key if part in ('stem', 'stages') else ''


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a checkpoint of ours as it is: the authors' names are not known here.

    Args:
        state_dict: A state dict or a training checkpoint around one.
        model: A `VMUNet`.

    Returns:
        The state dict.
    """
    return unwrap(state_dict)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return medical_cfg(
        origin_url='https://github.com/JCruan519/VM-UNet',
        paper_name='VM-UNet: Vision Mamba UNet for Medical Image Segmentation',
        paper_ids='arXiv:2402.02491',
        **kwargs)


default_cfgs = generate_default_cfgs({
    'vm_unet': _cfg(description='The baseline of MHS-VM; no weights are known here.'),
    'vm_unet_pico': _cfg(input_size=(3, 32, 32), description='A small model without weights, for tests.'),
})


def _create_vm_unet(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> VMUNet:
    return build_task_model(
        VMUNet, variant, default_cfgs, checkpoint_filter_fn, pretrained, **dict(model_args, **kwargs))


@register_task_model('segmentation')
def vm_unet(pretrained: bool = False, **kwargs: Any) -> VMUNet:
    """VM-UNet with the depths of MHS-VM's configuration: 27.4M parameters."""
    return _create_vm_unet('vm_unet', pretrained, kwargs)


@register_task_model('segmentation')
def vm_unet_pico(pretrained: bool = False, **kwargs: Any) -> VMUNet:
    """A weightless VM-UNet for tests: 32 x 32 images, quick on a CPU."""
    return _create_vm_unet(
        'vm_unet_pico', pretrained, kwargs, depths=(1, 1, 1), depths_decoder=(1, 1, 1), dims=(16, 32, 64), d_state=4)
