"""Mamba2D (M2D)

A hierarchical backbone: in the early stages a two-dimensional selective scan, whose states follow from the pixels above
and to the left at once, beside a local convolution; in the late stages global attention with rotary positions.

Paper: `Mamba2D: A Natively Multi-Dimensional State-Space Model for Vision Tasks`
    - https://arxiv.org/abs/2412.16146
Code: https://github.com/cocoalex00/Mamba2D (no licence file: all rights reserved)

Written anew from the published equations and checkpoints; the weights of the official repository load, those of the
first release (v1) too. What differs: scans that start at the bottom right read the map backwards instead of a flipped
copy; states are float32 under autocast; maps of a single row or column work. The official kernel of v1 is wrong for
maps that are taller than wide; the scan here is the one that was meant.

Not ported: `double_scans`, which the official code refuses to build.
"""

import logging
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerScale,
    create_classifier,
    get_device_dtype,
    register_notrace_function,
    register_notrace_module,
)
from timm.models import generate_default_cfgs, register_model
from timm.models.metaformer import StarReLU as _StarReLU
from torch import nn

from visionssm.layers import (
    Mlp,
    apply_rotary,
    default_norm,
    init_A_log_,
    init_dt_bias_,
    init_dt_proj_,
    negative_exp,
    rotary_table,
)
from visionssm.layers.conv_stem import check_map
from visionssm.layers.patch_embed import check_image
from visionssm.utils.suggest import check_choice

from ._builder import build_model, filter_official
from ._hierarchy import Hierarchy, Stage, stage_drop_path_rates
from ._official import Official, count_blocks

__all__ = ['Mamba2D']

_logger = logging.getLogger('visionssm')

Mixer = Literal['scan', 'scan_local', 'rope_attention', 'attention']
Downsample = Literal['conv7', 'conv3', 'conv1', 'conv2', 'conv4']


@register_notrace_module
class StarReLU(_StarReLU):
    """scale relu(x)^2 + bias with a learned scale and bias; timm's, in place, with initial values to draw anew."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Create the two numbers."""
        super().__init__(inplace=True, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite x, of any shape, by its activation, or by its ReLU where gradients are needed."""
        x = self.relu(x)
        if torch.is_grad_enabled() or x.dtype != self.scale.dtype:
            return self.scale * x.square() + self.bias
        return x.square_().mul_(self.scale).add_(self.bias)  # new memory for a map costs more than these

    def reset_parameters(self) -> None:
        """Set the scale to 1 and the bias to 0."""
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.bias)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """Overwrite x where no gradient needs it."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class LocalPath(nn.Module):
    """Widen, depth-wise 3 x 3 convolution, narrow, with StarReLU in between."""

    def __init__(
            self,
            dim: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the layers.

        Args:
            dim: Channels C.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.pwconv1 = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.act1 = StarReLU(**dd)
        self.dwconv = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim, bias=False, **dd)
        self.act2 = StarReLU(**dd)
        self.pwconv2 = nn.Linear(2 * dim, dim, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        x = self.act1(self.pwconv1(x)).permute(0, 3, 1, 2)
        return self.pwconv2(self.act2(self.dwconv(x).permute(0, 2, 3, 1)))


class ScanAxis(nn.Module):
    """What belongs to one of the two directions of the scan: decay rates, and the projection to its steps."""

    def __init__(
            self,
            dim: int,
            d_state: int,
            dt_rank: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Create the parameters; the mixer draws them.

        Args:
            dim: Inner channels D.
            d_state: State size N.
            dt_rank: Rank R of the step projection.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(dim, d_state, **dd))
        self.dt_proj = nn.Linear(dt_rank, dim, bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(dim, **dd))


class M2DMixer(nn.Module):
    """Project, scan the map in two dimensions at once, project back, and add the local path.

    u = gelu(in_proj(x)), y = out_proj(gelu(scan(u))) + local_path(local_norm(x)).
    """

    reverse: Final[bool]
    shared_b: Final[bool]
    has_local: Final[bool]

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            expand: float = 1.,
            dt_rank: int | None = None,
            shared_b: bool = False,
            local: bool = True,
            reverse: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the mixer.

        Args:
            dim: Channels C.
            d_state: State size N.
            expand: Inner channels D over C.
            dt_rank: Rank R of the step projections; ceil(C / 16) when None.
            shared_b: Both directions share one input matrix B, and its projection has a bias (v1).
            local: Add the local path.
            reverse: Scan from the bottom right corner.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        inner = int(expand * dim)
        dt_rank = dt_rank or math.ceil(dim / 16)
        self.reverse = reverse
        self.shared_b = shared_b
        self.has_local = local
        self.sizes = [dt_rank, dt_rank] + [d_state] * (2 if shared_b else 3)
        self.in_proj = nn.Linear(dim, inner, **dd)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=shared_b, **dd)
        self.top = ScanAxis(inner, d_state, dt_rank, **dd)
        self.left = ScanAxis(inner, d_state, dt_rank, **dd)
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.out_proj = nn.Linear(inner, dim, **dd)
        if local:
            self.local_norm = default_norm(dim, **dd)
            self.local_path = LocalPath(dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters of the scan anew; both directions start from the same steps."""
        for axis in (self.top, self.left):
            init_A_log_(axis.A_log)
            init_dt_proj_(axis.dt_proj.weight)
        init_dt_bias_(self.top.dt_bias)
        with torch.no_grad():
            self.left.dt_bias.copy_(self.top.dt_bias)
        nn.init.ones_(self.D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        u = _gelu(self.in_proj(x))
        parts = self.x_proj(u).split(self.sizes, dim=-1)
        B_top = parts[2].permute(0, 3, 1, 2)
        B_left = B_top if self.shared_b else parts[3].permute(0, 3, 1, 2)
        y = torch.ops.visionssm.wavefront_scan_2d(
            u.permute(0, 3, 1, 2), self.top.dt_proj(parts[0]).permute(0, 3, 1, 2),
            self.left.dt_proj(parts[1]).permute(0, 3, 1, 2), negative_exp(self.top.A_log),
            negative_exp(self.left.A_log), B_top, B_left, parts[-1].permute(0, 3, 1, 2), self.D, self.top.dt_bias,
            self.left.dt_bias, True, self.reverse)
        y = self.out_proj(_gelu(y.permute(0, 2, 3, 1)))
        if self.has_local:
            y = y + self.local_path(self.local_norm(x))
        return y


@register_notrace_function
def head_rotations(q: torch.Tensor, height: int, width: int, axis_dim: int) -> torch.Tensor:
    """Return the rotary table (2, H * W, head_dim) of heads `q`; channels beyond 2 `axis_dim` keep still."""
    table = rotary_table(height, width, 2 * axis_dim, q, reference_grid=None, precise=True)
    still = q.shape[-1] - 2 * axis_dim
    return torch.stack([F.pad(table[0], [0, still], value=1.), F.pad(table[1], [0, still])])


class MapAttention(nn.Module):
    """Global attention over the pixels of a map, with rotary positions and normalised queries and keys, or without."""

    rope: Final[bool]

    def __init__(
            self,
            dim: int,
            head_dim: int = 32,
            rope: bool = True,
            rope_ratio: float = 1.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the projections.

        Args:
            dim: Channels C; there are max(1, C // head_dim) heads.
            head_dim: Channels of a head.
            rope: Turn queries and keys by the position of their pixel, then normalise them.
            rope_ratio: Share of a head's channels that turns.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = max(1, dim // head_dim)
        self.head_dim = head_dim
        self.rope = rope
        self.axis_dim = int(head_dim * rope_ratio) // 2 // 2 * 2
        inner = self.num_heads * head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=False, **dd)
        self.q_norm = default_norm(head_dim, **dd) if rope else nn.Identity()
        self.k_norm = default_norm(head_dim, **dd) if rope else nn.Identity()
        self.proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, head_dim)
        if self.rope:
            table = head_rotations(q, height, width, self.axis_dim)
            q = self.q_norm(apply_rotary(q, table)).to(v.dtype)
            k = self.k_norm(apply_rotary(k, table)).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, height, width, self.num_heads * self.head_dim))


class Mamba2DBlock(nn.Module):
    """Mixer and MLP, each behind a norm; the residual stream may be scaled channel by channel."""

    def __init__(
            self,
            dim: int,
            mixer: nn.Module,
            mlp_ratio: float = 4.,
            drop_path: float = 0.,
            residual_scale: float | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Assemble the block.

        Args:
            dim: Channels C.
            mixer: Maps (B, H, W, C) to itself.
            mlp_ratio: Hidden channels of the MLP over C.
            drop_path: Rate at which each branch is dropped.
            residual_scale: Initial scale of the residual stream at each addition; none when None or 0.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = default_norm(dim, **dd)
        self.mixer = mixer
        self.res_scale1 = LayerScale(dim, residual_scale, **dd) if residual_scale else nn.Identity()
        self.norm2 = default_norm(dim, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.res_scale2 = LayerScale(dim, residual_scale, **dd) if residual_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        x = self.res_scale1(x) + self.drop_path(self.mixer(self.norm1(x)))
        return self.res_scale2(x) + self.drop_path(self.mlp(self.norm2(x)))


# Side, stride and padding of the convolutions that shrink a map.
_CONVS: dict[str, tuple[int, int, int]] = {
    'conv7': (7, 4, 2), 'conv3': (3, 2, 1), 'conv1': (1, 1, 0), 'conv2': (2, 2, 0), 'conv4': (4, 4, 1)}


class ConvEmbed(nn.Module):
    """A convolution that shrinks an image or a map, with a norm in front of it or behind it."""

    from_image: Final[bool]

    def __init__(
            self,
            in_chans: int,
            dim: int,
            kind: Downsample,
            from_image: bool,
            pre_norm: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolution.

        Args:
            in_chans: Channels that come in.
            dim: Channels C that go out.
            kind: 'conv7', side 7 and stride 4, normalised behind it; 'conv3', side 3 and stride 2; 'conv1', side 1;
                'conv2', side and stride 2; 'conv4', side and stride 4, padded by 1.
            from_image: The input is (B, in_chans, H, W), else (B, H, W, in_chans).
            pre_norm: Normalise in front of 'conv3' (v1).
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        side, stride, padding = _CONVS[kind]
        self.in_chans = in_chans
        self.from_image = from_image
        self.least = side - 2 * padding
        self.pre_norm = default_norm(in_chans, **dd) if pre_norm and kind == 'conv3' else nn.Identity()
        self.conv = nn.Conv2d(in_chans, dim, side, stride, padding, **dd)
        self.post_norm = default_norm(dim, **dd) if kind == 'conv7' else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_chans, H, W) or (B, H, W, in_chans) to (B, H', W', C)."""
        if self.from_image:
            x = check_image(x, self.in_chans, self.least, self.least).permute(0, 2, 3, 1)
        else:
            x = check_map(x, self.least)
        x = self.conv(self.pre_norm(x).permute(0, 3, 1, 2))
        return self.post_norm(x.permute(0, 2, 3, 1))


class MlpHead(nn.Module):
    """Pool a map, normalise, and classify by fc(drop(norm(gelu(fc1(x)))))."""

    def __init__(
            self,
            dim: int,
            num_classes: int,
            mlp_ratio: float = 4.,
            pool_type: str = 'avg',
            drop_rate: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the head.

        Args:
            dim: Channels C.
            num_classes: Classes; 0 for no classifier.
            mlp_ratio: Hidden channels over C.
            pool_type: Pooling of timm's `SelectAdaptivePool2d` that keeps the number of channels; '' for none.
            drop_rate: Dropout in front of the classifier.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_features = int(mlp_ratio * dim)
        self.pre_norm = default_norm(dim, **dd)
        self.fc1 = nn.Linear(dim, self.num_features, **dd)
        self.act = nn.GELU()
        self.norm = default_norm(self.num_features, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.pool_type = pool_type
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the pooling and the classifier.

        Args:
            num_classes: Classes; 0 for no classifier.
            pool_type: Pooling; None keeps it.
        """
        self.pool_type = self.pool_type if pool_type is None else pool_type
        if self.pool_type == 'catavgmax':
            raise ValueError("global_pool is 'catavgmax', which doubles the channels: take 'avg', 'max' or 'avgmax'.")
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, self.pool_type, input_fmt='NHWC', **get_device_dtype(self))
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Classify a map (B, H, W, C).

        Args:
            x: Output of the last stage.
            pre_logits: Leave out the classifier.

        Returns:
            (B, num_classes), or (B, hidden channels) without the classifier; (B, H, W, ...) without pooling.
        """
        x = self.norm(self.act(self.fc1(self.pre_norm(self.global_pool(x)))))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class Mamba2D(Hierarchy):
    """Mamba2D: stages of two-dimensional scans, then stages of attention."""

    official_class = 'Mamba2DClassifier'
    dense_class = 'Mamba2D'
    linear_std = None

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            depths: Sequence[int] = (3, 3, 9, 3),
            dims: Sequence[int] = (64, 128, 320, 512),
            mixers: Sequence[Mixer] = ('scan_local', 'scan_local', 'rope_attention', 'rope_attention'),
            downsamples: Sequence[Downsample] = ('conv7', 'conv3', 'conv3', 'conv3'),
            residual_scales: Sequence[float | None] = (1., 1., 1., 1.),
            alternate: bool = True,
            d_state: int = 16,
            expand: float = 1.,
            dt_rank: int | None = None,
            shared_b: bool = False,
            downsample_norm: bool = False,
            stage_norm: bool = True,
            mlp_ratio: float = 4.,
            head_mlp_ratio: float = 4.,
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
            dims: Channels C of each stage.
            mixers: Mixer of each stage: 'scan', the two-dimensional scan; 'scan_local', with a local path beside it;
                'rope_attention'; 'attention', without positions.
            downsamples: What leads into each stage, the stem first: see `ConvEmbed`.
            residual_scales: Initial scale of the residual stream in each stage; none where None or 0.
            alternate: Every second block of a stage scans from the bottom right corner.
            d_state: State size N.
            expand: Inner channels of the scan over C.
            dt_rank: Rank of the step projections; ceil(C / 16) when None.
            shared_b: Both directions of the scan share one input matrix (v1).
            downsample_norm: Normalise in front of the 'conv3' (v1).
            stage_norm: Normalise behind the last block of each stage (not in v1).
            mlp_ratio: Hidden channels of the MLPs over C.
            head_mlp_ratio: Hidden channels of the classifier over C.
            drop_rate: Dropout in front of the classifier.
            drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        per_stage = {'dims': dims, 'mixers': mixers, 'downsamples': downsamples, 'residual_scales': residual_scales}
        for name, values in per_stage.items():
            if len(values) != len(depths):
                raise ValueError(f'{name} are {list(values)} and depths {list(depths)}: give as many of one as of the '
                                 f'other.')
        for kind in mixers:
            check_choice('mixers', kind, _MIXERS)
        for downsample in downsamples:
            check_choice('downsamples', downsample, _CONVS)
        scan = partial(M2DMixer, d_state=d_state, expand=expand, dt_rank=dt_rank, shared_b=shared_b)

        def mixer(stage: int, block: int) -> nn.Module:
            kind, dim = mixers[stage], dims[stage]
            if kind in ('scan', 'scan_local'):
                return scan(dim, local=kind == 'scan_local', reverse=alternate and block % 2 == 1, **dd)
            return MapAttention(dim, rope=kind == 'rope_attention', **dd)

        embed = partial(ConvEmbed, pre_norm=downsample_norm)
        stages = []
        for i, rates in enumerate(stage_drop_path_rates(drop_path_rate, depths)):
            stages.append(Stage(
                embed(dims[i - 1], dims[i], downsamples[i], from_image=False, **dd) if i else nn.Identity(),
                [Mamba2DBlock(dims[i], mixer(i, j), mlp_ratio, rate, residual_scales[i], **dd)
                 for j, rate in enumerate(rates)],
                # The official name of this norm is the number of blocks in front of it: kept, so that keys translate.
                nn.Sequential(OrderedDict([(str(len(rates)), default_norm(dims[i], **dd))])) if stage_norm else None))
        strides = [_CONVS[kind][1] for kind in downsamples]
        super().__init__(
            stem=embed(in_chans, dims[0], downsamples[0], from_image=True, **dd), stages=stages, dims=dims,
            in_chans=in_chans, num_classes=num_classes, global_pool=global_pool,
            head=MlpHead(dims[-1], num_classes, head_mlp_ratio, global_pool, drop_rate, **dd),
            reductions=[math.prod(strides[:i + 1]) for i in range(len(strides))], **dd)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def tap_norm(self) -> None:
        """Return None: taps have no norm of their own, because every stage closes with one on the main path."""
        return None


# Official names of the mixers and of what leads into a stage.
_MIXERS = {'scan': '2D', 'scan_local': '2D_local', 'rope_attention': 'RopeAttention', 'attention': 'Attention'}
_DOWNSAMPLES = {'conv7': 'mf_stem', 'conv3': 'mf_2', 'conv1': 1, 'conv2': 2, 'conv4': 4}


def _translate(name: str, values: Sequence[Any], official: Mapping[str, Any]) -> list[Any]:
    """Translate official names of an argument to ours."""
    ours = {theirs: key for key, theirs in official.items()}
    for value in values:
        check_choice(name, value, ours)
    return [ours[value] for value in values]


def _key_table(official_class: str) -> tuple[tuple[str, str], ...]:
    """Return the rows (official key, our key) of an official class."""
    block, mixer = 'stages.{}.blocks.{}.', 'stages.{}.blocks.{}.mixer.'
    rows = [
        ('ds.stem.conv.{}', 'stem.conv.{}'),
        ('ds.stem.pre_norm.norm.{}', 'stem.pre_norm.{}'),
        ('ds.stem.post_norm.norm.{}', 'stem.post_norm.{}'),
        ('ds.ds{}.conv.{}', 'stages.{}.downsample.conv.{}'),
        ('ds.ds{}.pre_norm.norm.{}', 'stages.{}.downsample.pre_norm.{}'),
        ('ds.ds{}.post_norm.norm.{}', 'stages.{}.downsample.post_norm.{}'),
        ('stages.{}.{}.weight', 'stages.{}.norm.{}.weight'),
        ('stages.{}.{}.bias', 'stages.{}.norm.{}.bias'),
        ('stages.{}.{}.res_scale{}.scale', f'{block}res_scale{{}}.gamma'),
        ('stages.{}.{}.norm{}.{}', f'{block}norm{{}}.{{}}'),
        ('stages.{}.{}.MLP.{}.{}', f'{block}mlp.{{}}.{{}}'),
        *(row for side, axis in (('T', 'top'), ('L', 'left')) for row in (
            (f'stages.{{}}.{{}}.token_mixer.A{side}_log', f'{mixer}{axis}.A_log'),
            (f'stages.{{}}.{{}}.token_mixer.dt_proj{side}.weight', f'{mixer}{axis}.dt_proj.weight'),
            (f'stages.{{}}.{{}}.token_mixer.dt_proj{side}.bias', f'{mixer}{axis}.dt_bias'))),
        ('stages.{}.{}.token_mixer.D', f'{mixer}D'),
        ('stages.{}.{}.token_mixer.{}.{}', f'{mixer}{{}}.{{}}'),
        ('stages.{}.{}.token_mixer.local_path.{}.{}', f'{mixer}local_path.{{}}.{{}}'),
    ]
    if official_class == 'Mamba2D':
        return tuple((theirs, f'backbone.{ours}') for theirs, ours in rows)
    return (
        *((f'backbone.{theirs}', ours) for theirs, ours in rows),
        # from here on: the classifier, and backbones as detectors keep them
        ('norm.{}', 'head.pre_norm.{}'),
        ('head.fc1.{}', 'head.fc1.{}'),
        ('head.norm.{}', 'head.norm.{}'),
        ('head.fc2.{}', 'head.fc.{}'),
        *rows,
    )


# Arguments of the official backbone that change nothing that is computed here.
_NO_EFFECT = frozenset(('channel_last', 'featmaps_out', 'init_cfg', 'pt_ckpt', 'recomp', 'stage_norm', 'type'))
_BACKBONE = {
    'in_channels': 3, 'n_blocks': (3, 3, 9, 3), 'ds_stages': ('mf_stem', 'mf_2', 'mf_2', 'mf_2'),
    'embed_dim': (64, 128, 320, 512), 'token_mixer': ('2D_local', '2D_local', 'RopeAttention', 'RopeAttention'),
    'drop_path_rate': 0., 'res_scale_init_values': (None, None, None, None), 'inter_flip': False, 'double_scans': False}
_HEAD = {'dim': 512, 'n_classes': 1000, 'mlp_ratio': 4, 'head_dropout': 0.}
_V1 = {'expand': 2., 'shared_b': True, 'downsample_norm': True, 'stage_norm': False, 'alternate': False}


def _complete(config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
    """Note whether stages close with a norm, as those of the second release do."""
    normed = any(re.fullmatch(r'(backbone\.)?stages\.0\.\d+\.weight', key) for key in state_dict)
    if isinstance(config.get('backbone'), Mapping):
        return {**config, 'backbone': {**config['backbone'], 'stage_norm': normed}}
    return {**config, 'stage_norm': normed}


def _is_v1(backbone: Mapping[str, Any]) -> bool:
    """Tell the first release by its keys, or by its arguments: it had another attention, and no flips."""
    if 'stage_norm' in backbone:
        return not backbone['stage_norm']
    mixers = backbone.get('token_mixer', ())
    return 'Attention' in mixers or ('RopeAttention' not in mixers and not {'inter_flip', 'recomp'} & set(backbone))


def _build_official(official_class: str, config: Mapping[str, Any]) -> nn.Module:
    """Build our model from the keyword arguments of an official constructor."""
    backbone = config['backbone'] if isinstance(config.get('backbone'), Mapping) else config
    head = {**_HEAD, **(config.get('head') or {})}
    b = {**_BACKBONE, **backbone}
    ignored = sorted(set(b) - set(_BACKBONE) - _NO_EFFECT - {'backbone', 'head'} | set(head) - set(_HEAD))
    if ignored:
        _logger.warning('Ignored arguments that the official constructors of Mamba2D do not have: %s.',
                        ', '.join(ignored))
    if b['double_scans'] or '2D_dbl_scan' in b['token_mixer']:
        raise ValueError("double_scans and token_mixer '2D_dbl_scan' are not ported: the official code cannot build "
                         'them either.')
    dense = official_class == 'Mamba2D'
    options: dict[str, Any] = {
        'in_chans': b['in_channels'], 'depths': b['n_blocks'], 'dims': b['embed_dim'],
        'mixers': _translate('token_mixer', b['token_mixer'], _MIXERS),
        'downsamples': _translate('ds_stages', b['ds_stages'], _DOWNSAMPLES),
        'residual_scales': b['res_scale_init_values'], 'alternate': b['inter_flip'],
        'drop_path_rate': b['drop_path_rate'], **(_V1 if _is_v1(backbone) else {})}
    if dense:
        return Mamba2D(num_classes=0, **options).dense()
    if head['dim'] != b['embed_dim'][-1]:
        raise ValueError(f"head.dim is {head['dim']}, but the last of embed_dim is {b['embed_dim'][-1]}.")
    return Mamba2D(
        num_classes=head['n_classes'], head_mlp_ratio=head['mlp_ratio'], drop_rate=head['head_dropout'], **options)


def _infer_official(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer official class and arguments from keys and shapes; what they do not tell is taken from released models."""
    classifier = any(key.startswith('backbone.') for key in state_dict)
    sd = {key.removeprefix('backbone.'): value for key, value in state_dict.items()}
    if 'ds.stem.conv.weight' not in sd or 'stages.0.0.norm1.weight' not in sd:
        raise ValueError(
            'These are not the keys of an official Mamba2D state dict (no ds.stem.conv.weight or '
            f'stages.0.0.norm1.weight); the first ones are {sorted(state_dict)[:5]}.')
    depths = count_blocks(sd, '.norm1.')
    convs = [sd[f'ds.{"ds" * bool(i)}{i or "stem"}.conv.weight'] for i in range(len(depths))]
    sides = {_CONVS[ours][0]: theirs for ours, theirs in _DOWNSAMPLES.items()}

    def mixer(stage: int) -> str:
        prefix = f'stages.{stage}.0.token_mixer'
        if f'{prefix}.qkv.weight' in sd:
            return 'RopeAttention' if f'{prefix}.q_norm.weight' in sd else 'Attention'
        return '2D_local' if f'{prefix}.local_norm.weight' in sd else '2D'

    backbone: dict[str, Any] = {
        'in_channels': convs[0].shape[1], 'n_blocks': depths, 'embed_dim': [len(conv) for conv in convs],
        'ds_stages': [sides.get(conv.shape[-1]) for conv in convs],
        'token_mixer': [mixer(i) for i in range(len(depths))],
        'res_scale_init_values': [
            1. if f'stages.{i}.0.res_scale1.scale' in sd else None for i in range(len(depths))]}
    if f'stages.0.{depths[0]}.weight' in sd:
        backbone['inter_flip'] = True
    if not classifier:
        return 'Mamba2D', {'backbone': backbone, 'head': None}
    hidden, dim = sd['head.fc1.weight'].shape
    classes = len(sd.get('head.fc2.weight', ()))
    return 'Mamba2DClassifier', {
        'backbone': backbone, 'head': {'dim': dim, 'n_classes': classes, 'mlp_ratio': hidden / dim}}


OFFICIAL = Official(
    classes=('Mamba2DClassifier', 'Mamba2D'), keys=_key_table, build=_build_official, infer=_infer_official,
    complete=_complete)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, or one of ours, into a state dict for `model`.

    Args:
        state_dict: A state dict or a training checkpoint around one.
        model: A `Mamba2D`.

    Returns:
        The weights under our keys.
    """
    return filter_official(state_dict, model, OFFICIAL)


def _cfg(file: str = '', **kwargs: Any) -> dict[str, Any]:
    if file:
        kwargs['url'] = f'https://github.com/cocoalex00/Mamba2D/releases/download/{file}'
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv',
        'classifier': 'head.fc',
        'license': 'no licence file: all rights reserved',
        'origin_url': 'https://github.com/cocoalex00/Mamba2D',
        'paper_name': 'Mamba2D: A Natively Multi-Dimensional State-Space Model for Vision Tasks',
        'paper_ids': 'arXiv:2412.16146',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'mamba2d_nano.in1k': _cfg('v2.0.0/M2D-N-backbone.ckpt'),
    'mamba2d_tiny.in1k': _cfg('v2.0.0/M2D-T-backbone.ckpt'),
    'mamba2d_small.in1k': _cfg('v2.0.0/M2D-S-backbone.ckpt'),
    'mamba2d_tiny_v1.in1k': _cfg('v1.0.0/M2D-T-ImNet-300-ep-EMA.ckpt'),
    'mamba2d_pico': _cfg(
        input_size=(3, 32, 32), pool_size=(1, 1), license=None,
        description='A small model without weights, for tests.'),
})

# What the authors state for each file of weights, in per cent; of the first release only others state it.
official_results = {
    'mamba2d_nano.in1k': {'top1': 79.6},
    'mamba2d_tiny.in1k': {'top1': 84.0},
    'mamba2d_small.in1k': {'top1': 85.3},
}


def _create_mamba2d(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> Mamba2D:
    return build_model(Mamba2D, variant, pretrained, checkpoint_filter_fn, **dict(model_args, **kwargs))


@register_model
def mamba2d_nano(pretrained: bool = False, **kwargs: Any) -> Mamba2D:
    """M2D-N: 7.2M parameters, 79.6 % on ImageNet-1K."""
    return _create_mamba2d('mamba2d_nano', pretrained, kwargs, depths=(3, 3, 9, 3), dims=(32, 64, 160, 256))


@register_model
def mamba2d_tiny(pretrained: bool = False, **kwargs: Any) -> Mamba2D:
    """M2D-T: 26.5M parameters, 84.0 % on ImageNet-1K."""
    return _create_mamba2d('mamba2d_tiny', pretrained, kwargs, depths=(3, 3, 9, 3), dims=(64, 128, 320, 512))


@register_model
def mamba2d_small(pretrained: bool = False, **kwargs: Any) -> Mamba2D:
    """M2D-S: 50.3M parameters, 85.3 % on ImageNet-1K."""
    return _create_mamba2d('mamba2d_small', pretrained, kwargs, depths=(3, 12, 14, 3), dims=(96, 192, 384, 576))


@register_model
def mamba2d_tiny_v1(pretrained: bool = False, **kwargs: Any) -> Mamba2D:
    """M2D-T of the first release: 26.7M parameters, 82.4 % on ImageNet-1K."""
    return _create_mamba2d(
        'mamba2d_tiny_v1', pretrained, kwargs, depths=(3, 3, 9, 3), dims=(64, 128, 320, 512),
        mixers=('scan_local', 'scan_local', 'attention', 'attention'), residual_scales=(None, None, 1., 1.), **_V1)


@register_model
def mamba2d_pico(pretrained: bool = False, **kwargs: Any) -> Mamba2D:
    """A weightless Mamba2D for tests and demonstrations: 32 x 32 images, quick on a CPU."""
    return _create_mamba2d(
        'mamba2d_pico', pretrained, kwargs, depths=(2, 2, 1, 1), dims=(16, 32, 64, 96), d_state=8, head_mlp_ratio=1.)
