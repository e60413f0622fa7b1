"""MambaIRv2: image restoration with an attentive scan

Every layer has shifted-window attention and a scan along one route that visits pixels of like content one after the
other, and whose output matrix learns a prompt for each kind of content.

Paper: `MambaIRv2: Attentive State Space Restoration`
    - https://arxiv.org/abs/2411.15269
Code: https://github.com/csguoh/MambaIR (Apache-2.0)

Written anew from the published equations and checkpoints; the weights of the official repository load. What differs:
the official code adds random noise to the choice of a pixel's kind also in evaluation, here it does so in training
only (`route_noise`); kinds are sorted stably; images of any size are mirrored until the windows fit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs
from torch import nn

from visionssm.models._builder import build_task_model, filter_official
from visionssm.models._official import Official, take_known
from visionssm.models._tasks import register_task_model

from .attentive import AttentiveLayer
from .heads import check_image, make_skip_conv, pad_to_multiple
from .net import FRAME_KEYS, ResidualGroup, RestorationNet, head_options, infer_frame, restoration_cfg

__all__ = ['MambaIRv2']

class MambaIRv2(RestorationNet):
    """MambaIRv2: images to better or larger ones."""

    official_class = 'MambaIRv2'

    def __init__(
            self,
            in_chans: int = 3,
            embed_dim: int = 174,
            depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
            num_heads: int | Sequence[int] = 6,
            window_size: int = 16,
            d_state: int = 16,
            mlp_ratio: float = 2.,
            inner_rank: int = 64,
            num_tokens: int = 128,
            kernel_size: int | None = 5,
            qkv_bias: bool = True,
            upscale: int = 1,
            upsampler: str = 'residual',
            img_range: float = 1.,
            resi_connection: str = '1conv',
            patch_norm: bool = True,
            pos_embed_size: int | None = None,
            route_noise: str = 'train',
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the network.

        Args:
            in_chans: Channels of the images, 3 for RGB.
            embed_dim: Channels C of the trunk.
            depths: Layers of each group.
            num_heads: Heads of the window attention, one number or one a group.
            window_size: Side of the windows, even.
            d_state: State size of the scan.
            mlp_ratio: Inner channels of the scan and hidden channels of the FFNs over C.
            inner_rank: Rank of the tables of prompts.
            num_tokens: Kinds of pixels.
            kernel_size: Side of the FFNs' convolutions, odd; gated FFNs (the light network's) when None.
            qkv_bias: Bias of the attention's first projection.
            upscale: How many times the image grows.
            upsampler: 'residual' (same size), 'pixelshuffle', 'pixelshuffledirect' or 'nearest+conv'.
            img_range: Factor of the values inside the network.
            resi_connection: '1conv' or '3conv' at the ends of groups and trunk.
            patch_norm: Normalise what the first convolution returns.
            pos_embed_size: Side of the images for a position embedding, which then allows no other number of pixels;
                none when None.
            route_noise: When the kind of a pixel is drawn rather than chosen: 'never', in 'train'ing (as the official
                recipes), or 'always' (as the official code, so that results differ from call to call).
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        if window_size < 2 or window_size % 2:
            raise ValueError(f'window_size is {window_size}; an even number is needed, for windows shift by half.')
        heads = [num_heads] * len(depths) if isinstance(num_heads, int) else list(num_heads)
        if len(heads) != len(depths):
            raise ValueError(f'num_heads has {len(heads)} entries and depths {len(depths)}; give one a group.')
        groups = [
            ResidualGroup(
                [AttentiveLayer(
                    embed_dim, count, window_size, window_size // 2 * (i % 2), d_state, mlp_ratio, kernel_size,
                    num_tokens, inner_rank, qkv_bias, route_noise, **dd) for i in range(depth)],
                make_skip_conv(resi_connection, embed_dim, **dd))
            for depth, count in zip(depths, heads)]
        super().__init__(
            groups, in_chans, embed_dim, upscale, upsampler, img_range, resi_connection, patch_norm, **dd)
        self.window_size = window_size
        if kernel_size is None:
            self.official_class = 'MambaIRv2Light'
        self.pos_embed = None if pos_embed_size is None else nn.Parameter(
            torch.empty(1, pos_embed_size ** 2, embed_dim, **dd))
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights; see `MambaIR.init_weights`."""
        super().init_weights(needs_reset)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=.02)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the shallow features (B, H, W, C) and add the position embedding."""
        x = super().embed(x)
        if self.pos_embed is None:
            return x
        if x.shape[1] * x.shape[2] != self.pos_embed.shape[1]:
            raise ValueError(f'The position embedding is made for {self.pos_embed.shape[1]} pixels and the image has '
                             f'{x.shape[1]} x {x.shape[2]} after padding; a model without pos_embed_size takes any.')
        return x + self.pos_embed.unflatten(1, x.shape[1:3])

    def forward(self, x: torch.Tensor, noise: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Restore images.

        Args:
            x: Images, (B, in_chans, H, W), with values in [0, 1] and of any size.
            noise: Gumbel noise (B, H' W', num_tokens) for the routers, one tensor a layer, H' and W' being the sides
                after padding; as `route_noise` says when empty.

        Returns:
            (B, in_chans, s H, s W), not clamped.
        """
        check_image(x, self.in_chans)
        y = super().forward(pad_to_multiple(x, self.window_size), noise)
        return y[:, :, :x.shape[2] * self.upscale, :x.shape[3] * self.upscale]


_LAYER_KEYS = (
    ('wqkv.{}', 'attn.qkv.{}'),
    ('win_mhsa.{}', 'attn.{}'),
    ('win_mhsa.{}.{}', 'attn.{}.{}'),
    *((f'assm.selectiveScan.{theirs}', f'mixer.ssm.{ours}') for theirs, ours in (
        ('x_proj_weight', 'x_proj'), ('dt_projs_weight', 'dt_proj'), ('dt_projs_bias', 'dt_bias'),
        ('A_logs', 'A_log'), ('Ds', 'D'))),
    ('assm.in_proj.0.{}', 'mixer.in_proj.{}'),
    ('assm.CPE.0.{}', 'mixer.cpe.{}'),
    ('assm.embeddingB.weight', 'mixer.kinds'),
    ('embeddingA.weight', 'mixer.prompts'),
    ('assm.route.{}.{}', 'mixer.route.{}.{}'),
    ('assm.{}.{}', 'mixer.{}.{}'),
    *(row for i in (1, 2) for row in (
        (f'convffn{i}.sg.norm.{{}}', f'ffn{i}.norm.{{}}'),
        (f'convffn{i}.sg.conv.{{}}', f'ffn{i}.dwconv.{{}}'),
        (f'convffn{i}.dwconv.depthwise_conv.0.{{}}', f'ffn{i}.dwconv.{{}}'),
        (f'convffn{i}.fc1.{{}}', f'ffn{i}.fc1.{{}}'),
        (f'convffn{i}.fc2.{{}}', f'ffn{i}.fc2.{{}}'))),
    ('{}', '{}'),
    ('{}.{}', '{}.{}'),
)


def _key_table(official_class: str) -> tuple[tuple[str, str], ...]:
    """Return the rows (official key, our key) of an official class."""
    convolution = 'sg.conv' if official_class == 'MambaIRv2Light' else 'depthwise_conv'
    rows = [row for row in _LAYER_KEYS if not row[1].endswith('dwconv.{}') or convolution in row[0]]
    return (
        *((f'layers.{{}}.residual_group.layers.{{}}.{theirs}', f'groups.{{}}.blocks.{{}}.{ours}')
          for theirs, ours in rows),
        ('absolute_pos_embed', 'pos_embed'), *FRAME_KEYS)


_DEFAULTS = {
    'in_chans': 3, 'img_size': 64, 'embed_dim': 48, 'd_state': 8, 'depths': (6, 6, 6, 6), 'num_heads': (4, 4, 4, 4),
    'window_size': 16, 'inner_rank': 32, 'num_tokens': 64, 'convffn_kernel_size': 5, 'mlp_ratio': 2., 'qkv_bias': True,
    'ape': False, 'patch_norm': True, 'upscale': 2, 'img_range': 1., 'upsampler': '', 'resi_connection': '1conv'}
_NO_EFFECT = frozenset(('norm_layer', 'patch_size', 'use_checkpoint'))


def _build_official(official_class: str, config: Mapping[str, Any]) -> MambaIRv2:
    """Build our model from the keyword arguments of an official constructor."""
    o = take_known('MambaIRv2', config, _DEFAULTS, _NO_EFFECT)
    return MambaIRv2(
        o['in_chans'], o['embed_dim'], o['depths'], o['num_heads'], o['window_size'], o['d_state'], o['mlp_ratio'],
        o['inner_rank'], o['num_tokens'],
        None if official_class == 'MambaIRv2Light' else o['convffn_kernel_size'], o['qkv_bias'],
        img_range=o['img_range'], resi_connection=o['resi_connection'], patch_norm=o['patch_norm'],
        pos_embed_size=o['img_size'] if o['ape'] else None, **head_options(o))


def _infer_official(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer official class and arguments from keys and shapes; the range of the values is 1."""
    sd = state_dict
    frame = infer_frame(sd, 'layers')
    first = 'layers.0.residual_group.layers.0'
    light = f'{first}.convffn1.sg.norm.weight' in sd
    tables = [sd[f'layers.{i}.residual_group.layers.0.win_mhsa.relative_position_bias_table']
              for i in range(len(frame['depths']))]
    positions = sd.get('absolute_pos_embed')
    return 'MambaIRv2Light' if light else 'MambaIRv2', {
        **frame,
        'img_size': 64 if positions is None else round(positions.shape[1] ** 0.5),
        'ape': positions is not None,
        'd_state': sd[f'{first}.assm.selectiveScan.A_logs'].shape[1],
        'num_heads': [table.shape[1] for table in tables],
        'window_size': (round(len(tables[0]) ** 0.5) + 1) // 2,
        'inner_rank': len(sd[f'{first}.embeddingA.weight']),
        'num_tokens': len(sd[f'{first}.assm.embeddingB.weight']),
        'convffn_kernel_size': 5 if light else sd[f'{first}.convffn1.dwconv.depthwise_conv.0.weight'].shape[-1],
        # half a channel more: the official code rounds the product of ratio and width down
        'mlp_ratio': (len(sd[f'{first}.convffn1.fc1.weight']) + 0.5) / frame['embed_dim'],
        'qkv_bias': f'{first}.wqkv.bias' in sd}


def _derived(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the table that official files store though the size of the windows gives it."""
    return {'relative_position_index_SA': model.groups[0].blocks[0].attn.relative_position_index}


OFFICIAL = Official(
    classes=('MambaIRv2', 'MambaIRv2Light'),
    keys=_key_table,
    build=_build_official,
    infer=_infer_official,
    derived=_derived,
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, or one of ours, into a state dict for `model`.

    Args:
        state_dict: A state dict or a training checkpoint around one.
        model: A `MambaIRv2`.

    Returns:
        Our keys.
    """
    return filter_official(state_dict, model, OFFICIAL)


def _cfg(file: str = '', **kwargs: Any) -> dict[str, Any]:
    if file:
        kwargs['url'] = f'https://github.com/csguoh/MambaIR/releases/download/v1.0/{file}.pth'
    return restoration_cfg(
        paper_name='MambaIRv2: Attentive State Space Restoration', paper_ids='arXiv:2411.15269', **kwargs)


_SIZES = {'small': 'classicSR_Small', 'base': 'classicSR_Base', 'large': 'classicSR_Large', 'light': 'lightSR'}
default_cfgs = generate_default_cfgs({
    **{f'mambairv2_{size}_sr_x{scale}.{"div2k" if size == "light" else "df2k"}': _cfg(f'mambairv2_{file}_x{scale}')
       for size, file in _SIZES.items() for scale in (2, 3, 4)},
    'mambairv2_dn_color.sigma15': _cfg('mambairv2_ColorDN_15'),
    **{f'mambairv2_car_gray.q{q}': _cfg(f'mambairv2_jpeg_q{q}', input_size=(1, 126, 126)) for q in (10, 30, 40)},
    'mambairv2_pico': _cfg(description='A small model without weights, for tests.'),
})


def _create_mambairv2(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> MambaIRv2:
    return build_task_model(
        MambaIRv2, variant, default_cfgs, checkpoint_filter_fn, pretrained, **dict(model_args, **kwargs))


_SMALL = {'upsampler': 'pixelshuffle', 'embed_dim': 132, 'depths': (4,) * 6, 'num_heads': 4}
_BASE = {'upsampler': 'pixelshuffle'}
_LARGE = {'upsampler': 'pixelshuffle', 'depths': (6,) * 9}
_LIGHT = {
    'upsampler': 'pixelshuffledirect', 'embed_dim': 48, 'depths': (5,) * 4, 'num_heads': 4, 'd_state': 8,
    'mlp_ratio': 1., 'inner_rank': 32, 'num_tokens': 64, 'kernel_size': None}


@register_task_model('restoration')
def mambairv2_small_sr_x2(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 small, 2 times: about 9.6M parameters; Urban100 PSNR 34.24 dB as stated."""
    return _create_mambairv2('mambairv2_small_sr_x2', pretrained, kwargs, **_SMALL, upscale=2)


@register_task_model('restoration')
def mambairv2_small_sr_x3(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 small, 3 times: about 9.6M parameters; Urban100 PSNR 30.08 dB as stated."""
    return _create_mambairv2('mambairv2_small_sr_x3', pretrained, kwargs, **_SMALL, upscale=3)


@register_task_model('restoration')
def mambairv2_small_sr_x4(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 small, 4 times: about 9.6M parameters; Urban100 PSNR 27.73 dB as stated."""
    return _create_mambairv2('mambairv2_small_sr_x4', pretrained, kwargs, **_SMALL, upscale=4)


@register_task_model('restoration')
def mambairv2_base_sr_x2(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 base, 2 times: about 22.9M parameters; Urban100 PSNR 34.49 dB as stated."""
    return _create_mambairv2('mambairv2_base_sr_x2', pretrained, kwargs, **_BASE, upscale=2)


@register_task_model('restoration')
def mambairv2_base_sr_x3(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 base, 3 times: about 22.9M parameters; Urban100 PSNR 30.28 dB as stated."""
    return _create_mambairv2('mambairv2_base_sr_x3', pretrained, kwargs, **_BASE, upscale=3)


@register_task_model('restoration')
def mambairv2_base_sr_x4(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 base, 4 times: about 22.9M parameters; Urban100 PSNR 27.89 dB as stated."""
    return _create_mambairv2('mambairv2_base_sr_x4', pretrained, kwargs, **_BASE, upscale=4)


@register_task_model('restoration')
def mambairv2_large_sr_x2(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 large, 2 times: about 34.1M parameters; Urban100 PSNR 34.60 dB as stated."""
    return _create_mambairv2('mambairv2_large_sr_x2', pretrained, kwargs, **_LARGE, upscale=2)


@register_task_model('restoration')
def mambairv2_large_sr_x3(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 large, 3 times: about 34.1M parameters; Urban100 PSNR 30.34 dB as stated."""
    return _create_mambairv2('mambairv2_large_sr_x3', pretrained, kwargs, **_LARGE, upscale=3)


@register_task_model('restoration')
def mambairv2_large_sr_x4(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 large, 4 times: about 34.1M parameters; Urban100 PSNR 28.07 dB as stated."""
    return _create_mambairv2('mambairv2_large_sr_x4', pretrained, kwargs, **_LARGE, upscale=4)


@register_task_model('restoration')
def mambairv2_light_sr_x2(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 light, 2 times: about 0.8M parameters; Urban100 PSNR 33.26 dB as stated."""
    return _create_mambairv2('mambairv2_light_sr_x2', pretrained, kwargs, **_LIGHT, upscale=2)


@register_task_model('restoration')
def mambairv2_light_sr_x3(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 light, 3 times: about 0.8M parameters; Urban100 PSNR 29.01 dB as stated."""
    return _create_mambairv2('mambairv2_light_sr_x3', pretrained, kwargs, **_LIGHT, upscale=3)


@register_task_model('restoration')
def mambairv2_light_sr_x4(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 light, 4 times: about 0.8M parameters; Urban100 PSNR 26.82 dB as stated."""
    return _create_mambairv2('mambairv2_light_sr_x4', pretrained, kwargs, **_LIGHT, upscale=4)


@register_task_model('restoration')
def mambairv2_dn_color(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 against Gaussian noise of one strength, the tag of the weights: 22.7M parameters."""
    return _create_mambairv2('mambairv2_dn_color', pretrained, kwargs)


@register_task_model('restoration')
def mambairv2_car_gray(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """MambaIRv2 against artefacts of JPEG in gray images, of one quality, the tag of the weights: 22.7M parameters."""
    return _create_mambairv2('mambairv2_car_gray', pretrained, kwargs, in_chans=1)


@register_task_model('restoration')
def mambairv2_pico(pretrained: bool = False, **kwargs: Any) -> MambaIRv2:
    """A weightless light network for tests, quick on a CPU: 2 times unless `upscale` says otherwise."""
    return _create_mambairv2('mambairv2_pico', pretrained, kwargs, **{
        **_LIGHT, 'embed_dim': 16, 'depths': (2, 2), 'num_heads': 2, 'd_state': 4, 'window_size': 8, 'inner_rank': 4,
        'num_tokens': 8, 'upscale': 2})
