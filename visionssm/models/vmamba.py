"""VMamba

A hierarchical backbone: strides 4 to 32, and in every block a selective state-space scan along the rows and columns of
the map, in both directions of each, between two projections (SS2D); most models add an MLP.

Paper: `VMamba: Visual State Space Model`
    - https://arxiv.org/abs/2401.10166
Code: https://github.com/MzeroMiko/VMamba (MIT)

Written anew from the published equations and checkpoints; the weights of the official repository load. What differs:
maps are channels-last throughout (the official layouts `ln` and `ln2d` are the same numbers); the position embedding
follows the size of the image; patch merging pads odd maps for every norm.

Options of the official class that no released weight uses and that are not ported: blocks that normalise behind the
mixer, and the forms `xv1a`, `xv2a`, `xv3a`, which the official code itself cannot run.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Optional

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, GluMlp, get_act_layer
from timm.models import generate_default_cfgs, register_model
from torch import nn

from visionssm.layers import SS2D, ConvDownsample, ConvStem, Mlp, PatchMerging, default_norm, ss2d_options
from visionssm.utils.suggest import check_choice

from ._builder import build_model, filter_official
from ._hierarchy import Hierarchy, Stage, stage_drop_path_rates
from ._official import Official, count_blocks, dense_keys, find_taps, take_known, translate_keys

__all__ = ['VMamba']

_DOWNSAMPLES = ('v1', 'v2', 'v3')
_STEMS = ('v1', 'v2')
_DENSE_CLASSES = ('Backbone_VSSM', 'MM_VSSM')


class MapBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the channels of a channels-last map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (B, H, W, C)."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x.permute(0, 3, 1, 2), self.running_mean, self.running_var, self.weight, self.bias, self.training,
            0.1, self.eps)
        return y.permute(0, 2, 3, 1)


_NORMS: dict[str, Callable[..., nn.Module]] = {'layernorm': default_norm, 'batchnorm': MapBatchNorm}


class VMambaBlock(nn.Module):
    """Mixer and, where there is one, MLP, each behind a norm and around a residual connection."""

    has_mlp: Final[bool]

    def __init__(
            self,
            dim: int,
            mixer: nn.Module,
            norm_layer: Callable[..., nn.Module],
            mlp: Optional[nn.Module] = None,
            drop_path: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Assemble the block.

        Args:
            dim: Channels C.
            mixer: Maps (B, H, W, C) to itself.
            norm_layer: Makes the norms.
            mlp: Maps (..., C) to itself; none when None.
            drop_path: Rate at which each branch is dropped.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.has_mlp = mlp is not None
        self.norm1 = norm_layer(dim, device=device, dtype=dtype)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        if mlp is not None:
            self.norm2 = norm_layer(dim, device=device, dtype=dtype)
            self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        if self.has_mlp:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class VMamba(Hierarchy):
    """VMamba: stages of blocks that scan their map along rows and columns."""

    official_class = 'VSSM'
    dense_class = 'Backbone_VSSM'

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            patch_size: int = 4,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            depths: Sequence[int] = (2, 2, 8, 2),
            dims: int | Sequence[int] = 96,
            d_state: int = 1,
            expand: float = 1.,
            dt_rank: int | None = None,
            d_conv: int = 3,
            conv_bias: bool = False,
            act: str = 'silu',
            gate: str = 'none',
            out_norm: str = 'layernorm',
            out_act: bool = False,
            routes: str = 'cross',
            ssm: str = 'mamba1',
            init: str = 'v0',
            mixer_drop_rate: float = 0.,
            mlp_ratio: float = 4.,
            mlp_act: str = 'gelu',
            mlp_gate: bool = False,
            mlp_drop_rate: float = 0.,
            norm_layer: str = 'layernorm',
            stem: str = 'v2',
            stem_norm: bool = True,
            downsample: str = 'v3',
            pos_embed: bool = False,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model.

        Args:
            img_size: Image size (H, W) of the position embedding; without one any size is alike.
            patch_size: Stride of the stem.
            in_chans: Channels of the images.
            num_classes: Classes; 0 for no classifier.
            global_pool: Pooling in front of the classifier.
            depths: Blocks of each stage.
            dims: Channels C of each stage, or of the first one, after which they double.
            d_state: State size N.
            expand: Inner channels of the mixer over C.
            dt_rank: Rank of the step projection; ceil(C / 16) when None.
            d_conv: Side of the mixer's convolution; none below 2.
            conv_bias: Bias of that convolution.
            act: Activation of the mixer.
            gate: Gate of the mixer: 'none', 'act' or 'linear'; this and the next four are those of `SS2D`.
            out_norm: Normalisation of the mixer's scan.
            out_act: GELU behind it.
            routes: Directions of the scan.
            ssm: 'mamba1' or 'mamba2'.
            init: Style of the initial state parameters.
            mixer_drop_rate: Dropout behind the mixer.
            mlp_ratio: Hidden channels of the MLP over C; no MLP at 0.
            mlp_act: Activation of the MLP.
            mlp_gate: Gate the hidden channels by the activation of as many others.
            mlp_drop_rate: Dropout in the MLP.
            norm_layer: 'layernorm' or 'batchnorm', in all places but the mixer.
            stem: 'v1', one convolution of the size of a patch; 'v2', two overlapping ones.
            stem_norm: Normalise in the stem.
            downsample: 'v1', patch merging; 'v2', a convolution of side 2; 'v3', one of side 3.
            pos_embed: Learn an absolute position embedding.
            drop_rate: Dropout in front of the classifier.
            drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        check_choice('norm_layer', norm_layer, _NORMS)
        check_choice('stem', stem, _STEMS)
        check_choice('downsample', downsample, _DOWNSAMPLES)
        dims = [dims * 2 ** i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(dims) != len(depths):
            raise ValueError(f'dims are {dims} and depths {list(depths)}: give as many of one as of the other.')
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        norm = _NORMS[norm_layer]
        mixer = partial(
            SS2D, d_state=d_state, expand=expand, dt_rank=dt_rank, d_conv=d_conv, conv_bias=conv_bias, act=act,
            gate=gate, out_norm=out_norm, out_act=out_act, routes=routes, ssm=ssm, init=init,
            drop=mixer_drop_rate)
        mlp = partial(_mlp, ratio=mlp_ratio, act=mlp_act, gated=mlp_gate, drop=mlp_drop_rate)
        stages = []
        for i, rates in enumerate(stage_drop_path_rates(drop_path_rate, depths)):
            stages.append(Stage(
                _downsample(downsample, dims[i - 1], dims[i], norm, **dd) if i else nn.Identity(),
                [VMambaBlock(dims[i], mixer(dims[i], **dd), norm, mlp(dims[i], **dd), rate, **dd) for rate in rates]))
        first = (patch_size // 2) ** 2 if stem == 'v2' else patch_size
        super().__init__(
            stem=ConvStem(
                in_chans, dims[0], patch_size, stem == 'v2', norm if stem_norm else nn.Identity,
                (height // patch_size, width // patch_size) if pos_embed else None, **dd),
            stages=stages, dims=dims, in_chans=in_chans, num_classes=num_classes, global_pool=global_pool,
            drop_rate=drop_rate, norm=norm(dims[-1], **dd), reductions=[first << i for i in range(len(dims))], **dd)
        self.norm_layer = norm_layer
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def tap_norm(self) -> Callable[..., nn.Module]:
        """Return what makes the norm behind each tap: the same as in the blocks."""
        return _NORMS[self.norm_layer]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that training should not decay: the position embedding and those of the state."""
        return {'stem.pos_embed'} | super().no_weight_decay()


def _mlp(dim: int, ratio: float, act: str, gated: bool, drop: float, **dd: Any) -> nn.Module | None:
    hidden = int(ratio * dim)
    if hidden == 0:
        return None
    if gated:
        return GluMlp(dim, 2 * hidden, act_layer=get_act_layer(act), drop=(0., drop), **dd)
    return Mlp(dim, hidden, act_layer=get_act_layer(act), drop=drop, **dd)


def _downsample(version: str, dim: int, out_dim: int, norm: Callable[..., nn.Module], **dd: Any) -> nn.Module:
    if version == 'v1':
        return PatchMerging(dim, out_dim, norm_layer=norm, **dd)
    return ConvDownsample(dim, out_dim, 2 if version == 'v2' else 3, norm, **dd)


_MOST_STAGES = 8
# Rows of (official, ours); the official code leads out of a stage by what leads into the next one here.
_KEYS = (
    ('patch_embed.0.{}', 'stem.conv1.{}'),
    ('patch_embed.2.{}', 'stem.norm1.{}'),
    ('patch_embed.5.{}', 'stem.conv2.{}'),
    ('patch_embed.7.{}', 'stem.norm2.{}'),
    ('pos_embed', 'stem.pos_embed'),
    *((f'layers.{{}}.blocks.{{}}.{theirs}', f'stages.{{}}.blocks.{{}}.{ours}') for theirs, ours in (
        ('norm.{}', 'norm1.{}'),
        ('op.x_proj_weight', 'mixer.ssm.x_proj'),
        ('op.dt_projs_weight', 'mixer.ssm.dt_proj'),
        ('op.dt_projs_bias', 'mixer.ssm.dt_bias'),
        ('op.A_logs', 'mixer.ssm.A_log'),
        ('op.Ds', 'mixer.ssm.D'),
        ('op.conv2d.{}', 'mixer.conv.{}'),
        ('op.conv2d.{}.{}', 'mixer.conv.{}.{}'),
        ('op.{}.{}', 'mixer.{}.{}'),
        ('op.{}.{}.{}', 'mixer.{}.{}.{}'),
        ('{}.{}', '{}.{}'),
        ('{}.{}.{}', '{}.{}.{}'))),
    *((f'layers.{i}.downsample.{theirs}.{{}}', f'stages.{i + 1}.downsample.{ours}.{{}}')
      for i in range(_MOST_STAGES) for theirs, ours in (
          ('1', 'conv'), ('3', 'post_norm'), ('norm', 'norm'), ('reduction', 'reduction'))),
    ('classifier.norm.{}', 'norm.{}'),
    ('classifier.head.{}', 'head.fc.{}'),
)
# What the official loader renames in files of January 2024.
_OLD_KEYS = (
    ('patch_embed.proj.{}', 'patch_embed.0.{}'),
    ('patch_embed.norm.{}', 'patch_embed.2.{}'),
    ('layers.{}.blocks.{}.ln_1.{}', 'layers.{}.blocks.{}.norm.{}'),
    *((f'layers.{{}}.blocks.{{}}.self_attention.{name}', f'layers.{{}}.blocks.{{}}.op.{name}')
      for name in ('{}', '{}.{}', '{}.{}.{}')),
    ('norm.{}', 'classifier.norm.{}'),
    ('head.{}', 'classifier.head.{}'),
)
_LINEAR = re.compile(r'(in_proj|out_proj|fc1|fc2|reduction|head|fc)\.weight$')


def _key_table(official_class: str) -> tuple[tuple[str, str], ...]:
    if official_class not in _DENSE_CLASSES:
        return _KEYS
    return dense_keys(_KEYS)


def _tidy(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename what older files call differently, and take the two last axes off weights of 1 x 1 convolutions."""
    return {
        key: value[:, :, 0, 0] if _LINEAR.search(key) and value.ndim == 4 else value
        for key, value in translate_keys(state_dict, _OLD_KEYS).items()}


# What the official constructors take where the caller says nothing.
_DEFAULTS = {
    'patch_size': 4, 'in_chans': 3, 'num_classes': 1000, 'depths': (2, 2, 9, 2), 'dims': (96, 192, 384, 768),
    'ssm_d_state': 16, 'ssm_ratio': 2., 'ssm_dt_rank': 'auto', 'ssm_act_layer': 'silu', 'ssm_conv': 3,
    'ssm_conv_bias': True, 'ssm_drop_rate': 0., 'ssm_init': 'v0', 'forward_type': 'v2', 'mlp_ratio': 4.,
    'mlp_act_layer': 'gelu', 'mlp_drop_rate': 0., 'gmlp': False, 'drop_path_rate': 0.1, 'patch_norm': True,
    'norm_layer': 'ln', 'downsample_version': 'v2', 'patchembed_version': 'v1', 'posembed': False, 'imgsize': 224}
_NORM_OF = {'ln': 'layernorm', 'ln2d': 'layernorm', 'bn': 'batchnorm'}
_NO_EFFECT = frozenset(('init_cfg', 'out_indices', 'pretrained', 'ssm_rank_ratio', 'type', 'use_checkpoint'))


def _build_official(official_class: str, config: Mapping[str, Any]) -> nn.Module:
    """Build our model from the keyword arguments of an official constructor."""
    dense = official_class in _DENSE_CLASSES
    o = take_known('VMamba', config, _DEFAULTS, _NO_EFFECT)
    norm_layer = str(o['norm_layer']).lower()
    check_choice('norm_layer', norm_layer, _NORM_OF)
    options = {
        'img_size': o['imgsize'], 'patch_size': o['patch_size'], 'in_chans': o['in_chans'], 'depths': o['depths'],
        'dims': o['dims'], 'num_classes': 0 if dense else o['num_classes'], 'd_state': o['ssm_d_state'],
        'expand': o['ssm_ratio'], 'dt_rank': None if o['ssm_dt_rank'] == 'auto' else o['ssm_dt_rank'],
        'd_conv': o['ssm_conv'], 'conv_bias': o['ssm_conv_bias'], 'act': str(o['ssm_act_layer']).lower(),
        'init': o['ssm_init'], 'mixer_drop_rate': o['ssm_drop_rate'], 'mlp_ratio': o['mlp_ratio'],
        'mlp_act': str(o['mlp_act_layer']).lower(), 'mlp_gate': o['gmlp'], 'mlp_drop_rate': o['mlp_drop_rate'],
        'norm_layer': _NORM_OF[norm_layer], 'stem': o['patchembed_version'], 'stem_norm': o['patch_norm'],
        'downsample': o['downsample_version'], 'pos_embed': o['posembed'], 'drop_path_rate': o['drop_path_rate'],
        **ss2d_options(o['forward_type'])}
    model = VMamba(**options)
    if not dense:
        return model
    if model.stem.pos_embed is not None:
        # The official dense class creates the embedding, stores it, and never adds it.
        model.stem.add_pos_embed = False
        model.stem.pos_embed.requires_grad_(False)
    return model.dense(config.get('out_indices', (0, 1, 2, 3)), official_class=official_class)


def _infer_ratio(inner: Sequence[int], dims: Sequence[int]) -> float:
    """Return a factor that takes every width to its inner width, as the official code rounds."""
    # Half a channel more than the widest one needs is right for all where no shorter factor is.
    candidates = [round(inner[-1] / dims[-1], digits) for digits in (0, 1, 2, 3)] + [(inner[-1] + 0.5) / dims[-1]]
    return next((r for r in candidates if [int(r * dim) for dim in dims] == list(inner)), candidates[-1])


def _infer_official(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer official class and arguments from keys and shapes; what they do not tell is taken from released models."""
    sd = _tidy(state_dict)
    if 'patch_embed.0.weight' not in sd or 'layers.0.blocks.0.op.x_proj_weight' not in sd:
        raise ValueError(
            'These are not the keys of an official VMamba state dict (no patch_embed.0.weight or '
            f'layers.0.blocks.0.op.x_proj_weight); the first ones are {sorted(sd)[:5]}.')
    depths = count_blocks(sd)
    firsts = [f'layers.{i}.blocks.0' for i in range(len(depths))]
    dims, inner = zip(*(sd[f'{block}.op.out_proj.weight'].shape for block in firsts), strict=True)
    block, conv = firsts[0], next((k for k in (f'{firsts[0]}.op.conv2d', f'{firsts[0]}.op.conv2d.1')
                                   if f'{k}.weight' in sd), '')
    mamba2 = f'{block}.op.dt_projs_weight' not in sd
    ranks = [sd[f'{first}.op.dt_projs_bias'].shape[1] if mamba2 else sd[f'{first}.op.dt_projs_weight'].shape[2]
             for first in firsts]
    out_norm = next((suffix for key, suffix in (
        ('weight', ''), ('0.weight', '_oncnorm'), ('1.weight', '_ondwconv3'))
        if f'{block}.op.out_norm.{key}' in sd), '_onnone')
    gate = '' if len(sd[f'{block}.op.in_proj.weight']) > inner[0] else '_noz'
    hidden = [sd[f'{first}.mlp.fc2.weight'].shape[1] if f'{first}.mlp.fc2.weight' in sd else 0 for first in firsts]
    merge, halve = 'layers.0.downsample.norm.weight', 'layers.0.downsample.1.weight'
    kernel = sd['patch_embed.0.weight'].shape[-1]
    overlap = 'patch_embed.5.weight' in sd
    config = {
        'patch_size': 2 * (kernel - 1) if overlap else kernel, 'in_chans': sd['patch_embed.0.weight'].shape[1],
        'depths': depths, 'dims': list(dims),
        'ssm_d_state': (sd[f'{block}.op.x_proj_weight'].shape[1] - ranks[0]) // 2,
        'ssm_ratio': _infer_ratio(inner, dims),
        'ssm_dt_rank': 'auto' if ranks == [math.ceil(dim / 16) for dim in dims] else ranks[0],
        'ssm_act_layer': 'gelu' if mamba2 else 'silu', 'ssm_init': 'v2' if mamba2 else 'v0',
        'ssm_conv': sd[f'{conv}.weight'].shape[-1] if conv else 0, 'ssm_conv_bias': f'{conv}.bias' in sd,
        'forward_type': ('m0' if mamba2 else 'v05') + out_norm + gate,
        'mlp_ratio': _infer_ratio(hidden, dims) if hidden[0] else 0.,
        'gmlp': bool(hidden[0]) and len(sd[f'{block}.mlp.fc1.weight']) > hidden[0],
        'patch_norm': 'patch_embed.2.weight' in sd,
        'norm_layer': 'bn' if f'{block}.norm.running_mean' in sd else 'ln',
        'downsample_version': 'v1' if merge in sd else 'v2' if halve in sd and sd[halve].shape[-1] == 2 else 'v3',
        'patchembed_version': 'v2' if overlap else 'v1', 'posembed': 'pos_embed' in sd}
    if 'pos_embed' in sd:
        config['imgsize'] = sd['pos_embed'].shape[-1] * config['patch_size']
    if 'classifier.norm.weight' in sd or 'classifier.head.weight' in sd:
        return 'VSSM', {**config, 'num_classes': len(sd.get('classifier.head.weight', ()))}
    return 'Backbone_VSSM', {**config, 'out_indices': find_taps(sd)}


OFFICIAL = Official(
    classes=('VSSM', *_DENSE_CLASSES),
    keys=_key_table,
    build=_build_official,
    infer=_infer_official,
    tidy=_tidy,
)


def _fit_pos_embed(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Resample the position embedding of a checkpoint to the grid of the model."""
    key = 'stem.pos_embed'
    table, own = state_dict.get(key), model.stem.pos_embed
    if table is None or own is None or table.shape == own.shape or table.shape[:2] != own.shape[:2]:
        return state_dict
    resized = F.interpolate(table.float(), size=own.shape[2:], mode='bicubic', align_corners=False)
    return {**state_dict, key: resized.to(table.dtype)}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, or one of ours, into a state dict for `model`.

    Args:
        state_dict: A state dict or a training checkpoint around one.
        model: A `VMamba`.

    Returns:
        Our keys, with the position embedding resampled to the grid of the model.
    """
    return filter_official(state_dict, model, OFFICIAL, _fit_pos_embed)


def _cfg(file: str = '', **kwargs: Any) -> dict[str, Any]:
    if file:
        kwargs['url'] = f'https://github.com/MzeroMiko/VMamba/releases/download/{file}'
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
        'license': 'mit',
        'origin_url': 'https://github.com/MzeroMiko/VMamba',
        'paper_name': 'VMamba: Visual State Space Model',
        'paper_ids': 'arXiv:2401.10166',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'vmamba_tiny.in1k': _cfg('%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth'),
    'vmamba_small.in1k': _cfg('%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth'),
    'vmamba_base.in1k': _cfg('%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth'),
    'vmamba_tiny_s2l5.in1k': _cfg('%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth'),
    'vmamba_small_s2l15.in1k': _cfg('%23v2cls/vssm_small_0229_ckpt_epoch_222.pth'),
    'vmamba_base_s2l15.in1k': _cfg('%23v2cls/vssm_base_0229_ckpt_epoch_237.pth'),
    'vmamba_tiny_v0.in1k': _cfg('%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth'),
    'vmamba_small_v0.in1k': _cfg('%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth'),
    'vmamba_base_v0.in1k': _cfg('%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth'),
    'vmamba_tiny_m2': _cfg(),
    'vmamba_small_m2': _cfg(),
    'vmamba_base_m2': _cfg(),
    'vmamba_pico': _cfg(
        input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0,
        description='A small model without weights, for tests.'),
})

# What the authors state for each file of weights, in per cent.
official_results = {
    'vmamba_tiny.in1k': {'top1': 82.6},
    'vmamba_small.in1k': {'top1': 83.3, 'top5': 96.4},
    'vmamba_base.in1k': {'top1': 83.8, 'top5': 96.6},
    'vmamba_tiny_s2l5.in1k': {'top1': 82.5, 'top5': 96.0},
    'vmamba_small_s2l15.in1k': {'top1': 83.6, 'top5': 96.6},
    'vmamba_base_s2l15.in1k': {'top1': 83.9, 'top5': 96.7},
    'vmamba_tiny_v0.in1k': {'top1': 82.2, 'top5': 96.0},
    'vmamba_small_v0.in1k': {'top1': 83.5, 'top5': 96.5},
    'vmamba_base_v0.in1k': {'top1': 83.7, 'top5': 96.6},
}

# The first models gate the scan and have no MLP.
_VANILLA = {
    **ss2d_options('v0'), 'd_state': 16, 'expand': 2., 'mlp_ratio': 0., 'stem': 'v1', 'downsample': 'v1'}
_MAMBA2 = {**ss2d_options('m0_noz'), 'd_state': 64, 'act': 'gelu', 'init': 'v2'}


def _create_vmamba(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> VMamba:
    return build_model(VMamba, variant, pretrained, checkpoint_filter_fn, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, official name vmamba_tiny_s1l8: 30.2M parameters, 82.6 % on ImageNet-1K."""
    return _create_vmamba('vmamba_tiny', pretrained, kwargs, depths=(2, 2, 8, 2), dims=96)


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, official name vmamba_small_s1l20: 49.0M parameters, 83.3 % on ImageNet-1K."""
    return _create_vmamba('vmamba_small', pretrained, kwargs, depths=(2, 2, 20, 2), dims=96)


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, official name vmamba_base_s1l20: 86.6M parameters, 83.8 % on ImageNet-1K."""
    return _create_vmamba('vmamba_base', pretrained, kwargs, depths=(2, 2, 20, 2), dims=128)


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T with twice the inner channels and fewer blocks: 30.7M parameters, 82.5 % on ImageNet-1K."""
    return _create_vmamba('vmamba_tiny_s2l5', pretrained, kwargs, depths=(2, 2, 5, 2), dims=96, expand=2.)


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S with twice the inner channels and fewer blocks: 50.1M parameters, 83.6 % on ImageNet-1K."""
    return _create_vmamba('vmamba_small_s2l15', pretrained, kwargs, depths=(2, 2, 15, 2), dims=96, expand=2.)


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B with twice the inner channels and fewer blocks: 88.6M parameters, 83.9 % on ImageNet-1K."""
    return _create_vmamba('vmamba_base_s2l15', pretrained, kwargs, depths=(2, 2, 15, 2), dims=128, expand=2.)


@register_model
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first, vanilla VMamba-T: 22.9M parameters, 82.2 % on ImageNet-1K."""
    return _create_vmamba('vmamba_tiny_v0', pretrained, kwargs, depths=(2, 2, 9, 2), dims=96, **_VANILLA)


@register_model
def vmamba_small_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first, vanilla VMamba-S: 44.4M parameters, 83.5 % on ImageNet-1K."""
    return _create_vmamba('vmamba_small_v0', pretrained, kwargs, depths=(2, 2, 27, 2), dims=96, **_VANILLA)


@register_model
def vmamba_base_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first, vanilla VMamba-B: 76.3M parameters, 83.7 % on ImageNet-1K."""
    return _create_vmamba('vmamba_base_v0', pretrained, kwargs, depths=(2, 2, 27, 2), dims=128, **_VANILLA)


@register_model
def vmamba_tiny_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T with the scan of Mamba-2: 25.3M parameters, no released weights."""
    return _create_vmamba('vmamba_tiny_m2', pretrained, kwargs, depths=(2, 2, 4, 2), dims=96, **_MAMBA2)


@register_model
def vmamba_small_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S with the scan of Mamba-2: 39.1M parameters, no released weights."""
    return _create_vmamba('vmamba_small_m2', pretrained, kwargs, depths=(2, 2, 12, 2), dims=96, **_MAMBA2)


@register_model
def vmamba_base_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B with the scan of Mamba-2: 67.5M parameters, no released weights."""
    return _create_vmamba('vmamba_base_m2', pretrained, kwargs, depths=(2, 2, 12, 2), dims=128, **_MAMBA2)


@register_model
def vmamba_pico(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A weightless VMamba for tests and demonstrations: 32 x 32 images, quick on a CPU."""
    return _create_vmamba('vmamba_pico', pretrained, kwargs, depths=(1, 1, 2, 1), dims=(16, 32, 64, 128), mlp_ratio=2.)
