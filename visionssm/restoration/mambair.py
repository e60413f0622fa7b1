"""MambaIR: image restoration with a four-way scan

Residual groups of state-space blocks with channel attention at the full resolution of the image, for super-resolution,
denoising and artefacts of JPEG; and a U-Net of the same blocks for the noise of real cameras.

Paper: `MambaIR: A Simple Baseline for Image Restoration with State-Space Model`
    - https://arxiv.org/abs/2402.15648
Code: https://github.com/csguoh/MambaIR (Apache-2.0)

Written anew from the published equations and checkpoints; the weights of the official repository load. What differs:
trunks keep channels-last maps; the U-Net mirrors images whose sides 8 does not divide and crops its result.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import nn

from visionssm.models._builder import build_task_model, filter_official, load_official_keys
from visionssm.models._hierarchy import reset_tree
from visionssm.models._official import Official, take_known
from visionssm.models._tasks import register_task_model

from .blocks import BlockSequence, RestorationBlock
from .heads import MapConv, check_image, make_skip_conv, pad_to_multiple
from .net import FRAME_KEYS, ResidualGroup, RestorationNet, head_options, infer_frame, restoration_cfg

__all__ = ['MambaIR', 'MambaIRUNet']


class MambaIR(RestorationNet):
    """MambaIR: images to better or larger ones."""

    official_class = 'MambaIR'

    def __init__(
            self,
            in_chans: int = 3,
            embed_dim: int = 180,
            depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
            d_state: int = 16,
            expand: float = 2.,
            upscale: int = 1,
            upsampler: str = 'residual',
            light: bool | None = None,
            img_range: float = 1.,
            resi_connection: str = '1conv',
            patch_norm: bool = True,
            drop_path_rate: float = 0.1,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the network.

        Args:
            in_chans: Channels of the images, 3 for RGB.
            embed_dim: Channels C of the trunk, at least 30.
            depths: Blocks of each group.
            d_state: State size of the scan.
            expand: Inner channels of the scan over C (`mlp_ratio` in the official code, which has no MLP here).
            upscale: How many times the image grows.
            upsampler: 'residual' (same size), 'pixelshuffle', 'pixelshuffledirect' or 'nearest+conv'.
            light: Light convolutions in the blocks; those of the upsampler 'pixelshuffledirect' when None.
            img_range: Factor of the values inside the network.
            resi_connection: '1conv' or '3conv' at the ends of groups and trunk.
            patch_norm: Normalise what the first convolution returns.
            drop_path_rate: Stochastic depth rate of the last block's scan, linear from 0.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        if not depths or min(depths) < 1:
            raise ValueError(f'depths are {list(depths)}; every group needs at least one block.')
        light = upsampler == 'pixelshuffledirect' if light is None else light
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        groups = [
            ResidualGroup(
                [RestorationBlock(embed_dim, d_state, expand, next(rates), light, **dd) for _ in range(depth)],
                make_skip_conv(resi_connection, embed_dim, **dd))
            for depth in depths]
        super().__init__(
            groups, in_chans, embed_dim, upscale, upsampler, img_range, resi_connection, patch_norm, **dd)
        self.init_weights(needs_reset=False)


class Rescale(nn.Module):
    """A convolution and a pixel shuffle: to half the resolution and twice the channels, or the other way round."""

    def __init__(self, dim: int, up: bool, **dd: Any) -> None:
        """Build the convolution for `dim` channels."""
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim if up else dim // 2, 3, padding=1, bias=False, **dd)
        self.shuffle = nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to (B, H / 2, W / 2, 2 C) or (B, 2 H, 2 W, C / 2)."""
        return self.shuffle(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class MambaIRUNet(nn.Module):
    """MambaIR for the noise of real cameras: a U-Net of four levels that computes a correction of the image."""

    official_class = 'MambaIRUNet'
    upscale = 1

    def __init__(
            self,
            in_chans: int = 3,
            out_chans: int = 3,
            dim: int = 48,
            depths: Sequence[int] = (4, 6, 6, 8),
            refinement: int = 4,
            d_state: int = 16,
            expand: float = 1.5,
            bias: bool = False,
            drop_path_rate: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the network.

        Args:
            in_chans: Channels of the images.
            out_chans: Channels of the result; as many as the images, or one more image's worth.
            dim: Channels of the finest level; each level has twice as many.
            depths: Blocks of each level, in the encoder and in the decoder.
            refinement: Blocks at full resolution behind the decoder.
            d_state: State size of the scan.
            expand: Inner channels of the scan over those of the level.
            bias: Biases of the convolutions that reduce, and of the last one.
            drop_path_rate: Stochastic depth rate, the same for all blocks.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if len(depths) < 2:
            raise ValueError(f'depths are {list(depths)}; a U-Net needs at least two levels.')

        def blocks(width: int, depth: int) -> BlockSequence:
            return BlockSequence(
                RestorationBlock(width, d_state, expand, drop_path_rate, **dd) for _ in range(depth))

        widths = [dim << i for i in range(len(depths))]
        self.in_chans = in_chans
        self.multiple = 1 << (len(depths) - 1)
        self.stem = MapConv(in_chans, dim, 3, padding=1, bias=False, **dd)
        self.encoders = nn.ModuleList([blocks(*level) for level in zip(widths, depths)])
        self.downs = nn.ModuleList([Rescale(width, False, **dd) for width in widths[:-1]])
        # from the coarsest level to the finest; the finest one keeps the channels of both maps that meet there
        self.ups = nn.ModuleList([Rescale(width, True, **dd) for width in widths[:0:-1]])
        self.reduces = nn.ModuleList([MapConv(2 * width, width, 1, bias=bias, **dd) for width in widths[-2:0:-1]])
        outs = [*widths[-2:0:-1], 2 * dim]
        self.decoders = nn.ModuleList([blocks(*level) for level in zip(outs, depths[-2::-1])])
        self.refinement = blocks(2 * dim, refinement)
        self.output = MapConv(2 * dim, out_chans, 3, padding=1, bias=bias, **dd)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights; see `MambaIR.init_weights`. PyTorch's own values are the official ones here."""
        if needs_reset:
            reset_tree(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        load_official_keys(state_dict, prefix, self, OFFICIAL)
        super()._load_from_state_dict(state_dict, prefix, *args)

    set_grad_checkpointing = RestorationNet.set_grad_checkpointing

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features (B, H, W, 2 dim) of images (B, in_chans, H, W) whose sides 8 divides."""
        y = self.stem(x.permute(0, 2, 3, 1))
        skips = []
        for encoder, down in zip(self.encoders, self.downs):
            y = encoder(y)
            skips.append(y)
            y = down(y)
        y = self.encoders[-1](y)
        for i, (up, decoder) in enumerate(zip(self.ups, self.decoders)):
            y = torch.cat([up(y), skips[-1 - i]], dim=-1)
            if i < len(self.reduces):
                y = self.reduces[i](y)
            y = decoder(y)
        return self.refinement(y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Denoise images.

        Args:
            x: Images, (B, in_chans, H, W), with values in [0, 1] and of any size.

        Returns:
            (B, out_chans, H, W), not clamped.
        """
        check_image(x, self.in_chans)
        padded = pad_to_multiple(x, self.multiple)
        y = self.output(self.forward_features(padded)).permute(0, 3, 1, 2) + padded
        return y[:, :, :x.shape[2], :x.shape[3]]


_BLOCK_KEYS = (
    ('skip_scale', 'scale1'),
    ('skip_scale2', 'scale2'),
    ('ln_1.{}', 'norm1.{}'),
    ('ln_2.{}', 'norm2.{}'),
    ('self_attention.x_proj_weight', 'mixer.ssm.x_proj'),
    ('self_attention.dt_projs_weight', 'mixer.ssm.dt_proj'),
    ('self_attention.dt_projs_bias', 'mixer.ssm.dt_bias'),
    ('self_attention.A_logs', 'mixer.ssm.A_log'),
    ('self_attention.Ds', 'mixer.ssm.D'),
    ('self_attention.conv2d.{}', 'mixer.conv.{}'),
    ('self_attention.{}.{}', 'mixer.{}.{}'),
    ('conv_blk.cab.{}.{}', 'cab.{}.{}'),
    ('conv_blk.cab.{}.attention.1.{}', 'cab.{}.fc1.{}'),
    ('conv_blk.cab.{}.attention.3.{}', 'cab.{}.fc2.{}'),
)
_UNET_LEVELS = (
    *((f'encoder_level{i + 1}', f'encoders.{i}') for i in range(3)), ('latent', 'encoders.3'),
    *((f'decoder_level{3 - i}', f'decoders.{i}') for i in range(3)), ('refinement', 'refinement'))


def _key_table(official_class: str) -> tuple[tuple[str, str], ...]:
    """Return the rows (official key, our key) of an official class."""
    if official_class == 'MambaIR':
        return (*((f'layers.{{}}.residual_group.blocks.{{}}.{theirs}', f'groups.{{}}.blocks.{{}}.{ours}')
                  for theirs, ours in _BLOCK_KEYS), *FRAME_KEYS)
    return (
        ('patch_embed.proj.{}', 'stem.{}'),
        *((f'{theirs}.{{}}.{key}', f'{ours}.{{}}.{own}')
          for theirs, ours in _UNET_LEVELS for key, own in _BLOCK_KEYS),
        *((f'down{i + 1}_{i + 2}.body.0.weight', f'downs.{i}.conv.weight') for i in range(3)),
        *((f'up{4 - i}_{3 - i}.body.0.weight', f'ups.{i}.conv.weight') for i in range(3)),
        *((f'reduce_chan_level{3 - i}.{{}}', f'reduces.{i}.{{}}') for i in range(2)),
    )


_DEFAULTS = {
    'in_chans': 3, 'embed_dim': 96, 'depths': (6, 6, 6, 6), 'd_state': 16, 'mlp_ratio': 2., 'drop_rate': 0.,
    'drop_path_rate': 0.1, 'patch_norm': True, 'upscale': 2, 'img_range': 1., 'upsampler': '',
    'resi_connection': '1conv'}
_NO_EFFECT = frozenset(('img_size', 'interval', 'norm_layer', 'num_heads', 'patch_size', 'use_checkpoint',
                        'window_size'))
_UNET_DEFAULTS = {
    'inp_channels': 3, 'out_channels': 3, 'dim': 48, 'num_blocks': (4, 6, 6, 8), 'mlp_ratio': 2.,
    'num_refinement_blocks': 4, 'drop_path_rate': 0., 'bias': False}


def _build_official(official_class: str, config: Mapping[str, Any]) -> nn.Module:
    """Build our model from the keyword arguments of an official constructor."""
    if official_class == 'MambaIRUNet':
        if config.get('dual_pixel_task'):
            raise ValueError('dual_pixel_task is True; the official forward pass of that option never ran.')
        o = take_known('MambaIR', config, _UNET_DEFAULTS, ('dual_pixel_task',))
        return MambaIRUNet(
            o['inp_channels'], o['out_channels'], o['dim'], o['num_blocks'], o['num_refinement_blocks'],
            expand=o['mlp_ratio'], bias=o['bias'], drop_path_rate=o['drop_path_rate'])
    o = take_known('MambaIR', config, _DEFAULTS, _NO_EFFECT)
    return MambaIR(
        o['in_chans'], o['embed_dim'], o['depths'], o['d_state'], o['mlp_ratio'], img_range=o['img_range'],
        resi_connection=o['resi_connection'], patch_norm=o['patch_norm'], drop_path_rate=o['drop_path_rate'],
        **head_options(o))


def _infer_official(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer official class and arguments from keys and shapes; the range of the values is 1."""
    sd = state_dict

    def ratio(block: str) -> float:
        # half a channel more: the official code rounds the product of ratio and width down
        width, dim = sd[f'{block}.self_attention.in_proj.weight'].shape
        return (width // 2 + 0.5) / dim

    if 'patch_embed.proj.weight' not in sd:
        first = 'layers.0.residual_group.blocks.0'
        return 'MambaIR', {
            **infer_frame(sd, 'blocks'), 'd_state': sd[f'{first}.self_attention.A_logs'].shape[1],
            'mlp_ratio': ratio(first)}

    def count(part: str) -> int:
        return len({key.split('.')[1] for key in sd if key.startswith(f'{part}.')})

    dim, inp_channels = sd['patch_embed.proj.weight'].shape[:2]
    return 'MambaIRUNet', {
        'inp_channels': inp_channels, 'out_channels': len(sd['output.weight']), 'dim': dim,
        'num_blocks': [count(theirs) for theirs, _ in _UNET_LEVELS[:4]], 'mlp_ratio': ratio('latent.0'),
        'num_refinement_blocks': count('refinement'), 'bias': 'output.bias' in sd}


OFFICIAL = Official(
    classes=('MambaIR', 'MambaIRUNet'),
    keys=_key_table,
    build=_build_official,
    infer=_infer_official,
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, or one of ours, into a state dict for `model`.

    Args:
        state_dict: A state dict or a training checkpoint around one.
        model: A `MambaIR` or a `MambaIRUNet`.

    Returns:
        Our keys.
    """
    return filter_official(state_dict, model, OFFICIAL)


def _by_hand(drive_id: str, **kwargs: Any) -> dict[str, Any]:
    return restoration_cfg(
        description=f'they are on Google Drive, https://drive.google.com/file/d/{drive_id}/view', **kwargs)


_GRAY = {'input_size': (1, 126, 126)}
default_cfgs = generate_default_cfgs({
    'mambair_sr_x2.df2k': _by_hand('11Kiy_0hmMyDjMvW7MmbUT6tO9n5JrDeB'),
    'mambair_sr_x3.df2k': _by_hand('1u0VcESEduHu-GBCC6vDGQt9qXSX2AKdn'),
    'mambair_sr_x4.df2k': _by_hand('1YXggWIsi-auCjmPQDvW9FjB1f9fZK0hN'),
    'mambair_realsr_x4.real': _by_hand('16BBSRz1HellkTgypu4wu3CHA20CLgpSY'),
    'mambair_light_sr_x2.div2k': _by_hand('1eWovtH7YvEn2Bm9wBK5REOhbIgapsLxM'),
    'mambair_light_sr_x3.div2k': _by_hand('1JoC3fwah5Xo0Z1s8DnmXQlsctKQjs1Hx'),
    'mambair_light_sr_x4.div2k': _by_hand('1jIz579k_16569HFVF-76KgqAbJaJoDgF'),
    'mambair_dn_color.sigma15': _by_hand('1w5Y502iKSkqhP-OpleppPmk6PAnvWPdr'),
    'mambair_dn_color.sigma25': _by_hand('1qSPy6B7Jvi7PDHM1fl8Q88kn7ckwtusK'),
    'mambair_dn_color.sigma50': _by_hand('1O2o9xPruX8MtUL4qmuxV4Vfsef8L_jLM'),
    'mambair_car_gray.q10': _by_hand('1kncutEIAq9MvD8w6If6VZD7hkRkRcXWr', **_GRAY),
    'mambair_car_gray.q30': _by_hand('1hIIJQR59XmizMapxLOWtihhF3R7prYu3', **_GRAY),
    'mambair_car_gray.q40': _by_hand('1XbuIsLuCtwV78cVMYLuWXm-hNQDsbn6M', **_GRAY),
    'mambair_unet_realdn.sidd': _by_hand('1iMcapgaT7VPfR2UFYy21KbX3rUHFJCU8'),
    'mambair_pico': restoration_cfg(description='A small model without weights, for tests.'),
})


def _create_mambair(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> MambaIR:
    return build_task_model(
        MambaIR, variant, default_cfgs, checkpoint_filter_fn, pretrained, **dict(model_args, **kwargs))


_CLASSIC = {'upsampler': 'pixelshuffle'}
_LIGHT = {'upsampler': 'pixelshuffledirect', 'embed_dim': 60, 'depths': (6,) * 4, 'd_state': 10, 'expand': 1.2}


@register_task_model('restoration')
def mambair_sr_x2(pretrained: bool = False, **kwargs: Any) -> MambaIR:
    """MambaIR for super-resolution, 2 times: 20.4M parameters; Urban100 PSNR 34.15 dB as stated."""
    return _create_mambair('mambair_sr_x2', pretrained, kwargs, **_CLASSIC, upscale=2)


@register_task_model('restoration')
def mambair_sr_x3(pretrained: bool = False, **kwargs: Any) -> MambaIR:
    """MambaIR for super-resolution, 3 times: 20.6M parameters; Urban100 PSNR 29.93 dB as stated."""
    return _create_mambair('mambair_sr_x3', pretrained, kwargs, **_CLASSIC, upscale=3)


@register_task_model('restoration')
def mambair_sr_x4(pretrained: bool = False, **kwargs: Any) -> MambaIR:
    """MambaIR for super-resolution, 4 times: 20.6M parameters; Urban100 PSNR 27.68 dB as stated."""
    return _create_mambair('mambair_sr_x4', pretrained, kwargs, **_CLASSIC, upscale=4)


@register_task_model('restoration')
def mambair_realsr_x4(pretrained: bool = False, **kwargs: Any) -> MambaIR:
    """MambaIR for photographs with unknown faults, 4 times: the network of `mambair_sr_x4`, trained as a GAN."""
    return _create_mambair('mambair_realsr_x4', pretrained, kwargs, **_CLASSIC, upscale=4)


@register_task_model('restoration')
def mambair_light_sr_x2(pretrained: bool = False, **kwargs: Any) -> MambaIR:
    """MambaIR's light network, 2 times: 905K parameters; Urban100 PSNR 32.85 dB as stated."""
    return _create_mambair('mambair_light_sr_x2', pretrained, kwargs, **_LIGHT, upscale=2)


@register_task_model('restoration')
def mambair_light_sr_x3(pretrained: bool = False, **kwargs: Any) -> MambaIR:
    """MambaIR's light network, 3 times: 913K parameters; Urban100 PSNR 28.70 dB as stated."""
    return _create_mambair('mambair_light_sr_x3', pretrained, kwargs, **_LIGHT, upscale=3)


@register_task_model('restoration')
def mambair_light_sr_x4(pretrained: bool = False, **kwargs: Any) -> MambaIR:
    """MambaIR's light network, 4 times: 924K parameters; Urban100 PSNR 26.52 dB as stated."""
    return _create_mambair('mambair_light_sr_x4', pretrained, kwargs, **_LIGHT, upscale=4)


@register_task_model('restoration')
def mambair_dn_color(pretrained: bool = False, **kwargs: Any) -> MambaIR:
    """MambaIR against Gaussian noise of one strength, the tag of the weights: 15.8M parameters."""
    return _create_mambair('mambair_dn_color', pretrained, kwargs, expand=1.2)


@register_task_model('restoration')
def mambair_car_gray(pretrained: bool = False, **kwargs: Any) -> MambaIR:
    """MambaIR against artefacts of JPEG in gray images, of one quality, the tag of the weights: 15.8M parameters."""
    return _create_mambair('mambair_car_gray', pretrained, kwargs, expand=1.2, in_chans=1)


@register_task_model('restoration')
def mambair_unet_realdn(pretrained: bool = False, **kwargs: Any) -> MambaIRUNet:
    """MambaIR against the noise of real cameras: 26.8M parameters; SIDD PSNR 39.89 dB as stated."""
    return build_task_model(
        MambaIRUNet, 'mambair_unet_realdn', default_cfgs, checkpoint_filter_fn, pretrained, **kwargs)


@register_task_model('restoration')
def mambair_pico(pretrained: bool = False, **kwargs: Any) -> MambaIR:
    """A weightless light network for tests, quick on a CPU: 2 times unless `upscale` says otherwise."""
    return _create_mambair('mambair_pico', pretrained, kwargs, **{
        **_LIGHT, 'embed_dim': 32, 'depths': (2, 2), 'd_state': 4, 'upscale': 2})
