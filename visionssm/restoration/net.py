"""What MambaIR and its second version share: a network around residual groups, and its official names."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import nn

from visionssm.layers import default_norm
from visionssm.models._builder import load_official_keys
from visionssm.models._hierarchy import reset_tree

from .blocks import BlockSequence
from .heads import ImageFrame, MapConv, check_image, make_head, make_skip_conv

__all__ = ['FRAME_KEYS', 'ResidualGroup', 'RestorationNet', 'head_options', 'infer_frame', 'restoration_cfg']


class ResidualGroup(nn.Module):
    """out = conv(blocks(x)) + x, on maps (B, H, W, C)."""

    def __init__(self, blocks: Sequence[nn.Module], conv: nn.Module) -> None:
        """Assemble the group."""
        super().__init__()
        self.blocks = BlockSequence(blocks)
        self.conv = conv

    def forward(self, x: torch.Tensor, noise: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Map (B, H, W, C) to itself; `noise` as in `BlockSequence`."""
        return self.conv(self.blocks(x, noise)) + x


class RestorationNet(nn.Module):
    """What MambaIR and its second version share: a frame, residual groups at full resolution, and a head."""

    official_class = ''

    def __init__(
            self,
            groups: Sequence[nn.Module],
            in_chans: int,
            embed_dim: int,
            upscale: int,
            upsampler: str,
            img_range: float,
            resi_connection: str,
            patch_norm: bool,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Assemble the network; arguments as for `MambaIR`."""
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.in_chans = in_chans
        self.upscale = upscale
        self.frame = ImageFrame(in_chans, img_range, device)
        self.conv_first = MapConv(in_chans, embed_dim, 3, padding=1, **dd)
        self.patch_norm = default_norm(embed_dim, **dd) if patch_norm else nn.Identity()
        self.groups = nn.ModuleList(groups)
        self.norm = default_norm(embed_dim, **dd)
        self.conv_after_body = make_skip_conv(resi_connection, embed_dim, **dd)
        self.head = make_head(upsampler, embed_dim, in_chans, upscale, **dd)

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
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        load_official_keys(state_dict, prefix, self, sys.modules[type(self).__module__].OFFICIAL)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing what they compute."""
        for module in self.modules():
            if isinstance(module, BlockSequence):
                module.grad_checkpointing = enable

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the groups read of the shallow features, (B, H, W, C)."""
        return self.patch_norm(x)

    def forward_features(self, x: torch.Tensor, noise: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Return the features (B, H, W, C) of normalised images (B, in_chans, H, W)."""
        shallow = self.conv_first(x.permute(0, 2, 3, 1))
        y = self.embed(shallow)
        done = 0
        for group in self.groups:
            y = group(y, noise[done:done + len(group.blocks)])
            done += len(group.blocks)
        return self.conv_after_body(self.norm(y)) + shallow

    def forward(self, x: torch.Tensor, noise: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Restore images.

        Args:
            x: Images, (B, in_chans, H, W), with values in [0, 1].
            noise: What the blocks take besides the map, one tensor a block; nothing when empty.

        Returns:
            (B, in_chans, s H, s W), not clamped.
        """
        check_image(x, self.in_chans)
        x = self.frame.enter(x)
        return self.frame.leave(self.head(self.forward_features(x, noise).permute(0, 3, 1, 2), x))


FRAME_KEYS = (
    ('patch_embed.norm.{}', 'patch_norm.{}'),
    ('layers.{}.conv.{}', 'groups.{}.conv.{}'),
    ('layers.{}.conv.{}.{}', 'groups.{}.conv.{}.{}'),
    ('conv_before_upsample.0.{}', 'head.conv_before.0.{}'),
    ('upsample.{}.{}', 'head.upsample.{}.{}'),
    *((f'{name}.{{}}', f'head.{name}.{{}}') for name in ('conv_up1', 'conv_up2', 'conv_hr', 'conv_last')),
)
"""Rows (official key, our key) of what both versions have outside their blocks."""


def head_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return our names of the official options of the head: any unknown upsampler means a correction of the input."""
    upsampler = options['upsampler']
    grows = upsampler in ('pixelshuffle', 'pixelshuffledirect', 'nearest+conv')
    return {'upsampler': upsampler if grows else 'residual', 'upscale': options['upscale'] if grows else 1}


def infer_frame(state_dict: Mapping[str, torch.Tensor], blocks: str) -> dict[str, Any]:
    """Infer the official arguments that both versions share.

    Args:
        state_dict: Official state dict.
        blocks: Name of the list of blocks in a group.
    """
    sd = state_dict
    if 'conv_first.weight' not in sd:
        raise ValueError('These are not the keys of an official MambaIR state dict (no conv_first.weight); the first '
                         f'ones are {sorted(sd)[:5]}.')
    embed_dim, in_chans = sd['conv_first.weight'].shape[:2]
    numbers = {tuple(key.split('.')[1:5:3]) for key in sd if f'.residual_group.{blocks}.' in key}
    depths = [sum(int(group) == i for group, _ in numbers) for i in range(1 + max(int(group) for group, _ in numbers))]
    growth = [len(value) for key, value in sd.items() if key.startswith('upsample.') and key.endswith('.weight')]
    upsampler, upscale = '', 1
    if 'conv_up1.weight' in sd:
        upsampler, upscale = 'nearest+conv', 4
    elif 'conv_before_upsample.0.weight' in sd:
        by_three = growth[0] == 9 * sd['upsample.0.weight'].shape[1]
        upsampler, upscale = 'pixelshuffle', 3 if by_three else 2 ** len(growth)
    elif growth:
        upsampler, upscale = 'pixelshuffledirect', round((growth[0] / in_chans) ** 0.5)
    return {
        'in_chans': in_chans, 'embed_dim': embed_dim, 'depths': depths, 'upsampler': upsampler, 'upscale': upscale,
        'patch_norm': 'patch_embed.norm.weight' in sd,
        'resi_connection': '3conv' if 'conv_after_body.0.weight' in sd else '1conv'}


def restoration_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return what the configurations of MambaIR's weights have in common."""
    return {
        'num_classes': -1,  # timm then hands none to the network
        'input_size': (3, 64, 64),
        'mean': (0., 0., 0.),
        'std': (1., 1., 1.),
        'first_conv': None,
        'classifier': None,
        'license': 'apache-2.0',
        'origin_url': 'https://github.com/csguoh/MambaIR',
        'paper_name': 'MambaIR: A Simple Baseline for Image Restoration with State-Space Model',
        'paper_ids': 'arXiv:2402.15648',
        **kwargs,
    }
