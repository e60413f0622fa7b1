"""Spatial-Mamba

A hierarchical backbone: strides 4 to 32, and in every block a selective state-space scan that reads the map once, line
by line; the neighbours across lines and behind a pixel come in by a sum of the states around it, at three distances.

Paper: `Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion`
    - https://arxiv.org/abs/2410.15091
Code: https://github.com/EdwardChasel/Spatial-Mamba (Apache-2.0)

Written anew from the published equations and checkpoints; the weights of the official repository load. What differs:
the fusion of states follows the weights at all times and has gradients in evaluation too, where the official code keeps
the kernel of its first evaluation for good.

Options of the official class that are not ported: states of more than one number (`d_state`), which the official scan
cannot return, and `norm_layer` other than LayerNorm, which the official code cannot run.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from torch import nn

import visionssm_kernels  # noqa: F401  (registers the operators of torch.ops.visionssm)
from visionssm.layers import (
    ConvPosBlock,
    InvertedDownsample,
    Mlp,
    ResidualStem,
    StateFusion,
    default_norm,
    init_A_log_,
    init_state_,
    negative_exp,
)
from visionssm.layers.precision import WideLayerNorm, widen
from visionssm.utils.suggest import check_choice

from ._builder import build_model, filter_official
from ._hierarchy import Hierarchy, Stage, stage_drop_path_rates
from ._official import Official, count_blocks, dense_keys, find_taps, take_known

__all__ = ['SpatialMamba']

# How the steps are drawn -> the style of `init_state_` that draws them so.
_DT_INITS = {'random': 'v0', 'simple': 'v1', 'zero': 'v2'}


class FusedStateSSM(nn.Module):
    """A scan over the pixels of a map, line by line, whose states are fused with those around them.

    [dt, B, C] = x_proj u; delta = softplus(dt_proj dt + dt_bias); A = -exp(A_log);
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t; y = fusion(h) C + D u, with one state a channel.
    """

    dt_rank: Final[int]

    def __init__(
            self,
            dim: int,
            dt_rank: int,
            dt_init: str = 'random',
            merged: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the projections and state parameters.

        Args:
            dim: Inner channels D.
            dt_rank: Rank R of the step projection.
            dt_init: How the step parameters are drawn: 'random', steps log-uniform in [0.001, 0.1]; 'simple', normal;
                'zero', uniform in [0, 0.1].
            merged: Fuse with one merged kernel in evaluation mode, see `StateFusion`.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        check_choice('dt_init', dt_init, _DT_INITS)
        self.dt_rank = dt_rank
        self.dt_init = dt_init
        self.x_proj = nn.Parameter(torch.empty(dt_rank + 2, dim, **dd))
        self.dt_proj = nn.Parameter(torch.empty(dim, dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(dim, **dd))
        self.A_log = nn.Parameter(torch.empty(dim, 1, **dd))
        self.D = nn.Parameter(torch.empty(dim, **dd))
        self.fusion = StateFusion(dim, merged=merged, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections and state parameters anew; the fusion resets itself as a module."""
        bound = self.x_proj.shape[-1] ** -0.5  # what nn.Linear draws
        nn.init.uniform_(self.x_proj, -bound, bound)
        init_state_(_DT_INITS[self.dt_init], self.A_log, self.dt_bias, self.dt_proj)
        init_A_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Mix over the map.

        Args:
            u: Inner features, (B, D, H, W).

        Returns:
            (B, H, W, D), in at least float32.
        """
        batch, dim, height, width = u.shape
        u = u.permute(0, 2, 3, 1)
        pixels = u.reshape(-1, dim)  # channels innermost from here on: no copy where the convolution left them so
        # Products of few rows by many pixels are quicker than those of many pixels by few columns.
        dt, B, C = torch.mm(self.x_proj, pixels.t()).split([self.dt_rank, 1, 1])
        delta = torch.mm(dt.t(), self.dt_proj.t()).view(batch, height * width, dim)
        A = negative_exp(self.A_log)
        # Read out by ones, the scan returns its states.
        h = torch.ops.visionssm.selective_scan(
            widen(pixels).view(delta.shape).transpose(1, 2), delta.transpose(1, 2), A,
            B.view(batch, 1, height * width), torch.ones_like(A), None, None, self.dt_bias, True)
        h = h.transpose(1, 2).unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, D, L) -> (B, D, H, W)
        h = self.fusion(h).permute(0, 2, 3, 1)  # (B, H, W, D)
        return (h * C.view(batch, height, width, 1)).addcmul_(self.D.to(h.dtype), u)


class StructureAwareMixer(nn.Module):
    """Projection, depthwise convolution, scan with fused states, normalisation, gate, projection.

    [u, z] = in_proj(x); u = silu(conv(u)); out = out_proj(out_norm(ssm(u)) silu(z)).
    """

    def __init__(
            self,
            dim: int,
            expand: float = 2.,
            d_conv: int = 3,
            dt_init: str = 'random',
            merged: bool = False,
            drop: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the mixer.

        Args:
            dim: Channels C.
            expand: Inner channels D over C.
            d_conv: Side of the depthwise convolution, odd.
            dt_init: How the step parameters are drawn, see `FusedStateSSM`.
            merged: Fuse with one merged kernel in evaluation mode.
            drop: Dropout behind the last projection.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if d_conv % 2 == 0:
            raise ValueError(f'd_conv is {d_conv}; an odd side keeps the size of the map.')
        inner = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, **dd)
        self.ssm = FusedStateSSM(inner, math.ceil(dim / 16), dt_init, merged, **dd)
        self.out_norm = WideLayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix a map.

        Args:
            x: Map, (B, H, W, C).

        Returns:
            (B, H, W, C).
        """
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.conv(u.permute(0, 3, 1, 2)))
        y = self.out_norm(self.ssm(u)).to(z.dtype)
        return self.drop(self.out_proj(y * F.silu(z)))


class SpatialMamba(Hierarchy):
    """Spatial-Mamba: stages of blocks that scan their map once and fuse the states of neighbouring pixels."""

    official_class = 'SpatialMamba'
    dense_class = 'Backbone_SpatialMamba'

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            depths: Sequence[int] = (2, 4, 8, 4),
            dims: int | Sequence[int] = 64,
            expand: float = 2.,
            d_conv: int = 3,
            dt_init: str = 'random',
            merged_fusion: bool = False,
            mixer_drop_rate: float = 0.,
            mlp_ratio: float = 4.,
            mlp_drop_rate: float = 0.,
            stem_drop_rate: float = 0.,
            drop_rate: float = 0.,
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
            dims: Channels C of each stage, or of the first one, after which they double.
            expand: Inner channels of the mixer over C.
            d_conv: Side of the mixer's depthwise convolution, odd.
            dt_init: How the step parameters are drawn: 'random', steps log-uniform in [0.001, 0.1]; 'simple', normal;
                'zero', uniform in [0, 0.1].
            merged_fusion: Fuse with one merged kernel in evaluation mode, see `StateFusion`.
            mixer_drop_rate: Dropout behind the mixer.
            mlp_ratio: Hidden channels of the MLP over C.
            mlp_drop_rate: Dropout in the MLP.
            stem_drop_rate: Dropout behind the stem.
            drop_rate: Dropout in front of the classifier.
            drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        dims = [dims * 2 ** i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(dims) != len(depths):
            raise ValueError(f'dims are {dims} and depths {list(depths)}: give as many of one as of the other.')
        stages = []
        for i, (dim, rates) in enumerate(zip(dims, stage_drop_path_rates(drop_path_rate, depths), strict=True)):
            mixer = partial(
                StructureAwareMixer, dim, expand, d_conv, dt_init, merged_fusion, mixer_drop_rate, **dd)
            mlp = partial(Mlp, dim, int(dim * mlp_ratio), drop=mlp_drop_rate, **dd)
            stages.append(Stage(
                InvertedDownsample(dims[i - 1], dim, **dd) if i else nn.Dropout(stem_drop_rate),
                [ConvPosBlock(dim, mixer(), mlp(), rate, **dd) for rate in rates]))
        super().__init__(
            stem=ResidualStem(in_chans, dims[0], **dd), stages=stages, dims=dims, in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate, norm=default_norm(dims[-1], **dd),
            **dd)
        self.init_weights(needs_reset=False)


_MOST_STAGES = 8
_DENSE_CLASSES = ('Backbone_SpatialMamba', 'MM_SpatialMamba')
# Rows of (official, ours); the official code leads out of a stage by what leads into the next one here.
_KEYS = (
    *((f'patch_embed.{part}.{theirs}.{{}}', f'stem.{part}.{ours}.{{}}')
      for part in ('conv1', 'conv2.{}', 'conv3.{}') for theirs, ours in (('conv', 'conv'), ('norm', 'bn'))),
    *((f'layers.{{}}.blocks.{{}}.{theirs}', f'stages.{{}}.blocks.{{}}.{ours}') for theirs, ours in (
        ('cpe1.{}', 'cpe1.conv.{}'),
        ('cpe2.{}', 'cpe2.conv.{}'),
        ('ln_1.{}', 'norm1.{}'),
        ('ln_2.{}', 'norm2.{}'),
        ('mlp.{}.{}', 'mlp.{}.{}'),
        ('self_attention.x_proj_weight', 'mixer.ssm.x_proj'),
        ('self_attention.dt_projs_weight', 'mixer.ssm.dt_proj'),
        ('self_attention.dt_projs_bias', 'mixer.ssm.dt_bias'),
        ('self_attention.A_logs', 'mixer.ssm.A_log'),
        ('self_attention.Ds', 'mixer.ssm.D'),
        ('self_attention.state_fusion.kernel_3', 'mixer.ssm.fusion.kernels.0'),
        ('self_attention.state_fusion.kernel_3_1', 'mixer.ssm.fusion.kernels.1'),
        ('self_attention.state_fusion.kernel_3_2', 'mixer.ssm.fusion.kernels.2'),
        ('self_attention.state_fusion.alpha', 'mixer.ssm.fusion.alpha'),
        ('self_attention.in_proj.{}', 'mixer.in_proj.{}'),
        ('self_attention.conv2d.{}', 'mixer.conv.{}'),
        ('self_attention.out_norm.{}', 'mixer.out_norm.{}'),
        ('self_attention.out_proj.{}', 'mixer.out_proj.{}'))),
    *((f'layers.{i}.downsample.conv.{theirs}.{{}}', f'stages.{i + 1}.downsample.{ours}.{{}}')
      for i in range(_MOST_STAGES) for theirs, ours in (
          ('0.conv', 'expand'), ('1.conv', 'conv'), ('2.conv', 'reduce.conv'), ('2.norm', 'reduce.bn'))),
    ('norm.{}', 'norm.{}'),
    ('head.{}', 'head.fc.{}'),
)


def _key_table(official_class: str) -> tuple[tuple[str, str], ...]:
    if official_class not in _DENSE_CLASSES:
        return _KEYS
    return dense_keys(_KEYS)


# What the official constructors take where the caller says nothing; the names on the right are ours.
_DEFAULTS = {
    'in_chans': 3, 'num_classes': 1000, 'depths': (2, 4, 8, 4), 'dims': 64, 'dt_init': 'random', 'mlp_ratio': 4.,
    'drop_rate': 0., 'attn_drop_rate': 0., 'drop_path_rate': 0.1}
_OUR_NAMES = {'drop_rate': 'stem_drop_rate', 'attn_drop_rate': 'mixer_drop_rate'}
_NO_EFFECT = frozenset((
    'A_log_init', 'D_init', 'ape', 'd_state', 'img_size', 'init_cfg', 'norm_layer', 'num_heads', 'out_indices',
    'patch_norm', 'patch_size', 'pretrained', 'type', 'use_checkpoint'))


def _build_official(official_class: str, config: Mapping[str, Any]) -> nn.Module:
    """Build our model from the keyword arguments of an official constructor."""
    o = take_known('Spatial-Mamba', config, _DEFAULTS, _NO_EFFECT)
    if config.get('d_state', 1) != 1:
        raise ValueError(f"d_state is {config['d_state']}; the fusion is of one state a channel, so it must be 1.")
    dense = official_class in _DENSE_CLASSES
    norm_layer = config.get('norm_layer', 'ln')
    if dense and str(norm_layer).lower() != 'ln':
        raise ValueError(f"norm_layer is {norm_layer!r}; the official dense class runs with 'ln' only.")
    options = {_OUR_NAMES.get(name, name): value for name, value in o.items()}
    dims = options['dims']
    if not isinstance(dims, int) and any(wide != 2 * narrow for narrow, wide in zip(dims, dims[1:])):
        raise ValueError(f'dims are {list(dims)}; the official downsampling doubles the channels: give d, 2d, 4d, 8d.')
    if not dense:
        return SpatialMamba(**options)
    model = SpatialMamba(**{**options, 'num_classes': 0})
    return model.dense(config.get('out_indices', (0, 1, 2, 3)), official_class=official_class)


def _infer_official(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer official class and arguments from keys and shapes; what they do not tell is taken from released models."""
    first = 'layers.0.blocks.0.self_attention.state_fusion.alpha'
    if 'patch_embed.conv1.conv.weight' not in state_dict or first not in state_dict:
        raise ValueError(
            'These are not the keys of an official Spatial-Mamba state dict (no patch_embed.conv1.conv.weight or '
            f'{first}); the first ones are {sorted(state_dict)[:5]}.')
    depths = count_blocks(state_dict)
    hidden, dim = state_dict[f'layers.{len(depths) - 1}.blocks.0.mlp.fc1.weight'].shape
    config = {
        'in_chans': state_dict['patch_embed.conv1.conv.weight'].shape[1],
        'depths': depths,
        'dims': len(state_dict['layers.0.blocks.0.ln_1.weight']),
        'd_state': 1,
        # Half a channel more: a ratio that is no integer then rounds down to the same channels in every stage.
        'mlp_ratio': hidden / dim if hidden % dim == 0 else (hidden + 0.5) / dim}
    taps = find_taps(state_dict)
    if taps:
        return 'Backbone_SpatialMamba', {**config, 'out_indices': taps}
    return 'SpatialMamba', {**config, 'num_classes': len(state_dict.get('head.weight', ()))}


OFFICIAL = Official(
    classes=('SpatialMamba', *_DENSE_CLASSES),
    keys=_key_table,
    build=_build_official,
    infer=_infer_official,
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, or one of ours, into a state dict for `model`.

    Args:
        state_dict: A state dict or a training checkpoint around one.
        model: A `SpatialMamba`.

    Returns:
        Our keys.
    """
    return filter_official(state_dict, model, OFFICIAL)


def _cfg(drive_id: str = '', **kwargs: Any) -> dict[str, Any]:
    if drive_id:
        kwargs['description'] = f'they are on Google Drive, https://drive.google.com/file/d/{drive_id}/view'
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1.conv',
        'classifier': 'head.fc',
        'license': 'apache-2.0',
        'origin_url': 'https://github.com/EdwardChasel/Spatial-Mamba',
        'paper_name': 'Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion',
        'paper_ids': 'arXiv:2410.15091',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'spatial_mamba_tiny.in1k': _cfg('19kXoqGSTuKKs4AHbdUSrdKZTwTWenLIW'),
    'spatial_mamba_small.in1k': _cfg('1Wb3sYoWLpgmWrmHMYKwdgDwGPZaqM28O'),
    'spatial_mamba_base.in1k': _cfg('1k8dHp2QRCOqBSgAi36YkhZp_O8LqOPjM'),
    'spatial_mamba_pico': _cfg(
        input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0,
        description='A small model without weights, for tests.'),
})

official_results = {
    'spatial_mamba_tiny.in1k': {'top1': 83.5},
    'spatial_mamba_small.in1k': {'top1': 84.6},
    'spatial_mamba_base.in1k': {'top1': 85.3},
}


def _create_spatial_mamba(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> SpatialMamba:
    return build_model(SpatialMamba, variant, pretrained, checkpoint_filter_fn, **dict(model_args, **kwargs))


@register_model
def spatial_mamba_tiny(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-T: 26.7M parameters, 83.5 % on ImageNet-1K."""
    return _create_spatial_mamba('spatial_mamba_tiny', pretrained, kwargs, depths=(2, 4, 8, 4), dims=64)


@register_model
def spatial_mamba_small(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-S: 43.1M parameters, 84.6 % on ImageNet-1K."""
    return _create_spatial_mamba('spatial_mamba_small', pretrained, kwargs, depths=(2, 4, 21, 5), dims=64)


@register_model
def spatial_mamba_base(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-B: 95.7M parameters, 85.3 % on ImageNet-1K."""
    return _create_spatial_mamba('spatial_mamba_base', pretrained, kwargs, depths=(2, 4, 21, 5), dims=96)


@register_model
def spatial_mamba_pico(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """A weightless Spatial-Mamba for tests and demonstrations: 32 x 32 images, quick on a CPU."""
    return _create_spatial_mamba(
        'spatial_mamba_pico', pretrained, kwargs, depths=(1, 1, 2, 1), dims=(12, 24, 48, 96), mlp_ratio=2.)
