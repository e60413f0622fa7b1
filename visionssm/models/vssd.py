"""VSSD (Vision Mamba with Non-Causal State Space Duality)

A hierarchical backbone: strides 4 to 32; blocks of the first stages let every pixel read one weighted sum over the
whole map (the non-causal form of Mamba-2's state-space duality), those of the last one attend.

Paper: `VSSD: Vision Mamba with Non-Causal State Space Duality`
    - https://arxiv.org/abs/2407.18559
Code: https://github.com/YuHengsss/VSSD (no licence stated)

Written anew from the published equations and checkpoints; the weights of the official repository load. What differs:
maps have their real sizes, so that images need not be multiples of 32; the sum over the map is float32 under autocast
too; the two directions of the bidirectional form read one sequence instead of two copies.

Options of the official class that change nothing and have no counterpart: `ssd_chunk_size`, `lepe`, `image_size`. The
version of the models that the repository announced in October 2025 (ICCV 2025) is another one and is not covered.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, List, Optional

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, ConvNormAct
from timm.models import generate_default_cfgs, register_model
from torch import nn

import visionssm_kernels  # noqa: F401  (registers the operators of torch.ops.visionssm)
from visionssm.checkpoints.load import named_average, unwrap
from visionssm.layers import (
    ConvPosBlock,
    InvertedDownsample,
    Mlp,
    ResidualStem,
    default_norm,
    init_dt_bias_,
    negative_exp,
)
from visionssm.layers.patch_embed import check_image
from visionssm.layers.precision import WideLayerNorm, widen
from visionssm.layers.ssm_init import init_A_log_uniform_
from visionssm.utils.suggest import check_choice

from ._builder import build_model, filter_official
from ._hierarchy import Hierarchy, Stage, stage_drop_path_rates
from ._official import Official, count_blocks, dense_keys, find_taps, take_known

__all__ = ['VSSD']

_MIXERS = ('ssd', 'attention')
_SCANS = ('none', 'forward', 'both')


class SSDMixer(nn.Module):
    """Mix a map by the state-space duality of Mamba-2, without an order of the pixels or along their lines.

    [z, u, dt] = in_proj(x); [v, B, C] = silu(conv(u)); dt = softplus(dt + dt_bias); A = -exp(A_log);
    y_l = C_l^T S + D v_l with S = sum_l -dt_l A B_l v_l^T over all pixels; out = out_proj(out_norm(y) z).
    With a scan S is Mamba-2's state, S_l = exp(dt_l A) S_{l-1} + dt_l B_l v_l^T, which pixel l reads.
    """

    scan: Final[str]
    positive: Final[bool]
    inner: Final[int]
    heads: Final[int]
    groups: Final[int]
    d_state: Final[int]
    dt_limit: Optional[List[float]]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            d_state: int = 64,
            expand: float = 2.,
            num_groups: int = 1,
            scan: str = 'none',
            positive: bool = True,
            learn_initial_states: bool = False,
            dt_limit: tuple[float, float] = (0., math.inf),
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the projections and state parameters.

        Args:
            dim: Channels C.
            num_heads: Heads M of the inner channels.
            d_state: State size N.
            expand: Inner channels E over C.
            num_groups: Groups G of heads that share B and C; -1 for one a head.
            scan: 'none', every pixel reads the sum over all; 'forward', the state of a scan line by line; 'both', half
                of the heads scan forwards and half backwards.
            positive: Weigh the pixels of the sum by -dt A, which is positive; else by dt A. Only without a scan.
            learn_initial_states: Learn the state in front of the first pixel. Only with a scan forwards.
            dt_limit: Smallest and largest step of a scan.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        inner = int(expand * dim)
        groups = num_heads if num_groups == -1 else num_groups
        check_choice('scan', scan, _SCANS)
        if inner % num_heads:
            raise ValueError(f'num_heads is {num_heads}; it must divide the {inner} inner channels.')
        if groups < 1 or num_heads % groups:
            raise ValueError(f'num_groups is {num_groups}; it must divide the {num_heads} heads, or be -1.')
        if scan == 'both' and groups % 2:
            raise ValueError(f"num_groups is {num_groups}; scan='both' halves the groups, so it needs an even number.")
        if learn_initial_states and scan != 'forward':
            raise ValueError(f"scan is {scan!r}; only scan='forward' has an initial state to learn.")
        self.scan = scan
        self.positive = positive
        self.inner, self.heads, self.groups, self.d_state = inner, num_heads, groups, d_state
        self.dt_limit = None if tuple(dt_limit) == (0., math.inf) else [float(limit) for limit in dt_limit]
        channels = inner + 2 * groups * d_state
        self.in_proj = nn.Linear(dim, inner + channels + num_heads, bias=False, **dd)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **dd)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(num_heads, **dd))
        self.D = nn.Parameter(torch.empty(num_heads, **dd))
        self.initial_states = nn.Parameter(
            torch.empty(num_heads, inner // num_heads, d_state, **dd)) if learn_initial_states else None
        self.out_norm = WideLayerNorm(inner, eps=1e-5, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the state parameters anew; the other parameters belong to sub-modules."""
        init_dt_bias_(self.dt_bias)
        init_A_log_uniform_(self.A_log)
        nn.init.ones_(self.D)
        if self.initial_states is not None:
            nn.init.zeros_(self.initial_states)

    def read_sum(self, v: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        """Return what every pixel reads of the sum over all.

        Args:
            v: Values, (B, L, M, P).
            dt: Steps before bias and softplus, (B, L, M).
            B: Input matrix, (B, L, G, N).
            C: Output matrix, (B, L, G, N).

        Returns:
            (B, L, M, P).
        """
        step = F.softplus(widen(dt) + self.dt_bias)
        return torch.ops.visionssm.nc_ssd(v, step, negative_exp(self.A_log), B, C, self.D, self.positive)

    def read_states(self, v: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        """Return what every pixel reads of a scan; arguments and result as for `read_sum`."""
        A = negative_exp(self.A_log)
        if self.scan == 'forward':
            states = self.initial_states
            if states is not None:
                states = states.unsqueeze(0).expand(v.shape[0], -1, -1, -1)
            return torch.ops.visionssm.ssd(
                v, dt, A, B, C, self.D, None, self.dt_bias, True, self.dt_limit, states, False)
        v_f, v_b = v.chunk(2, dim=2)
        dt_f, dt_b = dt.chunk(2, dim=2)
        B_f, B_b = B.chunk(2, dim=2)
        C_f, C_b = C.chunk(2, dim=2)
        A_f, A_b = A.chunk(2)
        D_f, D_b = self.D.chunk(2)
        bias_f, bias_b = self.dt_bias.chunk(2)
        y_f = torch.ops.visionssm.ssd(
            v_f, dt_f, A_f, B_f, C_f, D_f, None, bias_f, True, self.dt_limit, None, False)
        y_b = torch.ops.visionssm.ssd(
            v_b, dt_b, A_b, B_b, C_b, D_b, None, bias_b, True, self.dt_limit, None, True)
        return torch.cat([y_f, y_b], dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix a map.

        Args:
            x: Map, (B, H, W, C).

        Returns:
            (B, H, W, C).
        """
        matrix = self.groups * self.d_state
        z, u, dt = self.in_proj(x).split([self.inner, self.inner + 2 * matrix, self.heads], dim=-1)
        u = F.silu(self.conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1, 2)  # (B, L, E + 2 G N)
        v, B, C = u.split([self.inner, matrix, matrix], dim=-1)
        # The sum grows with the map and can leave the range of float16, so it stays float32 until it is normalised.
        v = widen(v).unflatten(-1, (self.heads, self.inner // self.heads))
        B = B.unflatten(-1, (self.groups, self.d_state))
        C = C.unflatten(-1, (self.groups, self.d_state))
        dt = dt.flatten(1, 2)
        if self.scan == 'none':
            y = self.read_sum(v, dt, B, C)
        else:
            y = self.read_states(v, dt, B, C)
        y = self.out_norm(y.flatten(2)).to(z.dtype).reshape_as(z)
        return self.out_proj(y * z)  # unlike in Mamba-2 the gate has no activation


class MapAttention(nn.Module):
    """Softmax attention of every pixel of a map to all of them."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the attention of `dim` channels in `num_heads` heads."""
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'num_heads is {num_heads}; it must divide the {dim} channels.')
        self.attn = Attention(dim, num_heads, qkv_bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        return self.attn(x.flatten(1, 2)).reshape_as(x)


class PatchStem(nn.Module):
    """Patches of 4 x 4 pixels by one convolution: norm(relu(batchnorm(conv(x)))), (B, in_chans, H, W) to maps."""

    def __init__(
            self,
            in_chans: int,
            dim: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolution and the norms of `dim` channels."""
        super().__init__()
        self.in_chans = in_chans
        self.conv1 = ConvNormAct(in_chans, dim, 4, stride=4, padding=0, device=device, dtype=dtype)
        self.norm = default_norm(dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to (B, floor(H / 4), floor(W / 4), C)."""
        return self.norm(self.conv1(check_image(x, self.in_chans, 4, 4)).permute(0, 2, 3, 1))


class SimpleDownsample(nn.Module):
    """Halve a map by one convolution: norm(relu(conv(x))), (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), C')."""

    def __init__(
            self,
            dim: int,
            out_dim: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the convolution from `dim` to `out_dim` channels."""
        super().__init__()
        # Named like the first convolution of the other form: both have one official name.
        self.expand = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.act = nn.ReLU()
        self.norm = default_norm(out_dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), C')."""
        return self.norm(self.act(self.expand(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))


_STEMS: dict[str, type[nn.Module]] = {'residual': ResidualStem, 'patch': PatchStem}
_DOWNSAMPLES: dict[str, type[nn.Module]] = {'inverted': InvertedDownsample, 'simple': SimpleDownsample}


class VSSD(Hierarchy):
    """VSSD: stages of blocks whose pixels read one sum over their map, and of blocks that attend."""

    official_class = 'VMAMBA2'
    dense_class = 'Backbone_VMAMBA2'

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            depths: Sequence[int] = (2, 4, 8, 4),
            dims: int | Sequence[int] = 64,
            num_heads: Sequence[int] = (2, 4, 8, 16),
            mixers: Sequence[str] = ('ssd', 'ssd', 'ssd', 'attention'),
            d_state: int = 64,
            expand: float = 2.,
            num_groups: int = 1,
            scan: str = 'none',
            positive: bool = True,
            learn_initial_states: bool = False,
            dt_limit: tuple[float, float] = (0., math.inf),
            mlp_ratio: float = 4.,
            mlp_drop_rate: float = 0.,
            stem: str = 'residual',
            downsample: str = 'inverted',
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
            num_heads: Heads of each stage's mixers.
            mixers: Mixer of each stage: 'ssd' or 'attention'.
            d_state: State size N; this and the next six are those of `SSDMixer`.
            expand: Inner channels of the mixer over C.
            num_groups: Groups of heads that share B and C; -1 for one a head.
            scan: 'none', 'forward' or 'both'.
            positive: Weigh the pixels of the sum by -dt A, else by dt A.
            learn_initial_states: Learn the initial states of a scan.
            dt_limit: Smallest and largest step of a scan.
            mlp_ratio: Hidden channels of the MLP over C.
            mlp_drop_rate: Dropout in the MLP.
            stem: 'residual', four overlapping convolutions and one of side 1; 'patch', one of side 4.
            downsample: 'inverted', an inverted bottleneck; 'simple', one convolution of side 3.
            drop_rate: Dropout in front of the classifier.
            drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        check_choice('stem', stem, _STEMS)
        check_choice('downsample', downsample, _DOWNSAMPLES)
        dims = [dims * 2 ** i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        for name, values in (('dims', dims), ('num_heads', num_heads), ('mixers', mixers)):
            if len(values) != len(depths):
                raise ValueError(
                    f'{name} are {list(values)} and depths {list(depths)}: give as many of one as of the other.')
        for mixer in mixers:
            check_choice('mixers', mixer, _MIXERS)
        make: dict[str, Any] = {'attention': MapAttention, 'ssd': partial(
            SSDMixer, d_state=d_state, expand=expand, num_groups=num_groups, scan=scan, positive=positive,
            learn_initial_states=learn_initial_states, dt_limit=dt_limit)}
        stages = []
        for i, (dim, heads, rates) in enumerate(
                zip(dims, num_heads, stage_drop_path_rates(drop_path_rate, depths), strict=True)):
            stages.append(Stage(
                _DOWNSAMPLES[downsample](dims[i - 1], dim, **dd) if i else nn.Identity(),
                [ConvPosBlock(
                    dim, make[mixers[i]](dim, heads, **dd),
                    Mlp(dim, int(mlp_ratio * dim), drop=mlp_drop_rate, **dd), rate, **dd) for rate in rates]))
        super().__init__(
            stem=_STEMS[stem](in_chans, dims[0], **dd), stages=stages, dims=dims, in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate, norm=default_norm(dims[-1], **dd),
            **dd)
        self.init_weights(needs_reset=False)


_MOST_STAGES = 8
_DENSE_CLASSES = ('Backbone_VMAMBA2', 'MM_VSSD')
# Rows of (official, ours) below a mixer.
_MIXER_KEYS = (
    ('to_qkv.{}', 'attn.qkv.{}'),
    ('to_out.{}', 'attn.proj.{}'),
    ('in_proj.{}', 'in_proj.{}'),
    ('conv2d.{}', 'conv.{}'),
    ('dt_bias', 'dt_bias'),
    ('A_log', 'A_log'),
    ('D', 'D'),
    ('init_states', 'initial_states'),
    ('norm.{}', 'out_norm.{}'),
    ('out_proj.{}', 'out_proj.{}'),
)
# The official code leads out of a stage by what leads into the next one here.
_KEYS = (
    *((f'patch_embed.{part}.{theirs}.{{}}', f'stem.{part}.{ours}.{{}}')
      for part in ('conv1', 'conv2.{}', 'conv3.{}') for theirs, ours in (('conv', 'conv'), ('norm', 'bn'))),
    ('patch_embed.norm.{}', 'stem.norm.{}'),
    *((f'layers.{{}}.blocks.{{}}.attn.{theirs}', f'stages.{{}}.blocks.{{}}.mixer.{ours}')
      for theirs, ours in _MIXER_KEYS),
    *((f'layers.{{}}.blocks.{{}}.{theirs}', f'stages.{{}}.blocks.{{}}.{ours}') for theirs, ours in (
        ('cpe1.{}', 'cpe1.conv.{}'), ('cpe2.{}', 'cpe2.conv.{}'), ('norm1.{}', 'norm1.{}'), ('norm2.{}', 'norm2.{}'),
        ('mlp.{}.{}', 'mlp.{}.{}'))),
    *((f'layers.{i}.downsample.{theirs}.{{}}', f'stages.{i + 1}.downsample.{ours}.{{}}')
      for i in range(_MOST_STAGES) for theirs, ours in (
          ('conv.0.conv', 'expand'), ('conv.1.conv', 'conv'), ('conv.2.conv', 'reduce.conv'),
          ('conv.2.norm', 'reduce.bn'), ('norm', 'norm'))),
    ('norm.{}', 'norm.{}'),
    ('head.{}', 'head.fc.{}'),
)


def _key_table(official_class: str) -> tuple[tuple[str, str], ...]:
    if official_class not in _DENSE_CLASSES:
        return _KEYS
    return dense_keys(_KEYS)


# What the official constructors take where the caller says nothing.
_DEFAULTS = {
    'in_chans': 3, 'num_classes': 1000, 'embed_dim': 64, 'depths': (2, 4, 8, 4), 'num_heads': (2, 4, 8, 16),
    'mlp_ratio': 4., 'drop_rate': 0., 'drop_path_rate': 0.2, 'simple_downsample': False, 'simple_patch_embed': False,
    'ssd_expansion': 2, 'ssd_ngroups': 1, 'linear_attn_duality': True, 'd_state': 64, 'bidirection': False,
    'attn_types': ('mamba2', 'mamba2', 'mamba2', 'standard'), 'ssd_positve_dA': True, 'learnable_init_states': False,
    'dt_limit': (0., math.inf)}
_MIXER_OF = {'mamba2': 'ssd', 'standard': 'attention'}
_NO_EFFECT = frozenset((
    'image_size', 'img_size', 'init_cfg', 'key', 'lepe', 'norm_layer', 'out_indices', 'patch_size', 'pretrained',
    'qkv_bias', 'ssd_chunk_size', 'ssd_expand', 'type', 'use_checkpoint'))


def _build_official(official_class: str, config: Mapping[str, Any]) -> nn.Module:
    """Build our model from the keyword arguments of an official constructor."""
    dense = official_class in _DENSE_CLASSES
    o = take_known('VSSD', config, _DEFAULTS, _NO_EFFECT)
    depths = list(o['depths'])
    for kind in o['attn_types']:
        check_choice('attn_types', kind, _MIXER_OF)
    model = VSSD(
        in_chans=o['in_chans'], num_classes=0 if dense else o['num_classes'], depths=depths, dims=o['embed_dim'],
        num_heads=list(o['num_heads'])[:len(depths)],
        mixers=[_MIXER_OF[kind] for kind in o['attn_types']][:len(depths)], d_state=o['d_state'],
        expand=o['ssd_expansion'], num_groups=o['ssd_ngroups'],
        scan='none' if o['linear_attn_duality'] else 'both' if o['bidirection'] else 'forward',
        positive=o['ssd_positve_dA'], learn_initial_states=o['learnable_init_states'], dt_limit=tuple(o['dt_limit']),
        mlp_ratio=o['mlp_ratio'], mlp_drop_rate=o['drop_rate'],
        stem='patch' if o['simple_patch_embed'] else 'residual',
        downsample='simple' if o['simple_downsample'] else 'inverted', drop_path_rate=o['drop_path_rate'])
    for stage in model.stages:
        if isinstance(stage.downsample, InvertedDownsample):
            # With one image on a CPU the official gradients are wrong by this layout; `from_official` promises them.
            stage.downsample.official_layout = True
    if not dense:
        return model
    return model.dense(config.get('out_indices', (0, 1, 2, 3)), official_class=official_class)


def _infer_mixer(sd: Mapping[str, torch.Tensor], first_blocks: Sequence[str]) -> dict[str, Any]:
    """Infer the mixers' arguments from the first block of each stage."""
    dims = [len(sd[f'{block}.norm1.weight']) for block in first_blocks]
    heads: list[int] = []
    matrices: dict[int, int] = {}
    config: dict[str, Any] = {}
    for block, dim in zip(first_blocks, dims, strict=True):
        if f'{block}.attn.A_log' not in sd:
            # The keys of attention do not tell its heads; in all released models they double from stage to stage.
            heads.append(math.gcd(dim, 2 * heads[-1] if heads else 2))
            continue
        heads.append(len(sd[f'{block}.attn.A_log']))
        inner = len(sd[f'{block}.attn.norm.weight'])
        matrices[heads[-1]] = (len(sd[f'{block}.attn.conv2d.weight']) - inner) // 2
        config.setdefault('ssd_expansion', inner / dim)
        if f'{block}.attn.init_states' in sd:
            config.update(
                linear_attn_duality=False, learnable_init_states=True,
                d_state=sd[f'{block}.attn.init_states'].shape[2])
    if matrices:
        # Sizes that follow the heads mean one group a head; else the keys do not tell groups from states.
        a_head = {size // count for count, size in matrices.items()}
        shared = len(set(matrices.values())) == 1
        size = next(iter(matrices.values()))
        config.setdefault('d_state', size if shared else min(a_head))
        config['ssd_ngroups'] = size // config['d_state'] if shared else -1
    return {
        'num_heads': heads, **config,
        'attn_types': ['mamba2' if f'{block}.attn.A_log' in sd else 'standard' for block in first_blocks]}


def _infer_official(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer official class and arguments from keys and shapes; what they do not tell is taken from released models."""
    first = 'layers.0.blocks.0.cpe1.weight'
    if first not in state_dict or not any(
            f'layers.0.blocks.0.attn.{name}' in state_dict for name in ('A_log', 'to_qkv.weight')):
        raise ValueError(
            f'These are not the keys of an official VSSD state dict (no {first}, or no '
            f'layers.0.blocks.0.attn.A_log or to_qkv.weight); the first ones are {sorted(state_dict)[:5]}.')
    depths = count_blocks(state_dict)
    hidden, dim = state_dict['layers.0.blocks.0.mlp.fc1.weight'].shape
    config = {
        'in_chans': state_dict['patch_embed.conv1.conv.weight'].shape[1], 'embed_dim': dim, 'depths': depths,
        'simple_patch_embed': 'patch_embed.norm.weight' in state_dict,
        'simple_downsample': 'layers.0.downsample.norm.weight' in state_dict,
        'mlp_ratio': hidden / dim, **_infer_mixer(state_dict, [f'layers.{i}.blocks.0' for i in range(len(depths))])}
    taps = find_taps(state_dict)
    if taps:
        return 'Backbone_VMAMBA2', {**config, 'out_indices': taps}
    return 'VMAMBA2', {**config, 'num_classes': len(state_dict.get('head.weight', ()))}


OFFICIAL = Official(
    classes=('VMAMBA2', *_DENSE_CLASSES),
    keys=_key_table,
    build=_build_official,
    infer=_infer_official,
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, or one of ours, into a state dict for `model`.

    Args:
        state_dict: A state dict or a training checkpoint around one; of files named `..._ema` the averaged weights
            are taken, which are those that were published.
        model: A `VSSD`.

    Returns:
        Our keys.
    """
    cfg = getattr(model, 'pretrained_cfg', {})
    source = cfg.get('file') or cfg.get('url') or ''
    return filter_official(unwrap(state_dict, ema=named_average(source)), model, OFFICIAL)


def _cfg(file: str = '', **kwargs: Any) -> dict[str, Any]:
    if file:
        kwargs.update(
            hf_hub_id='YuhengSSS/VSSD', hf_hub_filename=file,
            url=f'https://huggingface.co/YuhengSSS/VSSD/resolve/main/{file}')
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
        'license': 'none stated',
        'origin_url': 'https://github.com/YuHengsss/VSSD',
        'paper_name': 'VSSD: Vision Mamba with Non-Causal State Space Duality',
        'paper_ids': 'arXiv:2407.18559',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'vssd_micro.in1k': _cfg('vssd_micro_best.pth'),
    'vssd_tiny.in1k': _cfg('vssd_tiny_best_ema.pth'),
    'vssd_tiny.mesa_in1k': _cfg('vssd_tiny_e300_with_mesa.pth'),
    'vssd_small.in1k': _cfg('vssd_small_best_ema.pth'),
    'vssd_small.mesa_in1k': _cfg('vssd_small_e300_with_mesa.pth'),
    'vssd_base.in1k': _cfg('vssd_base_best_ema.pth'),
    'vssd_base.mesa_in1k': _cfg('vssd_base_e300_with_mesa.pth'),
    'vssd_pico': _cfg(
        input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0,
        description='A small model without weights, for tests.'),
})

# What the authors state for each file of weights, in per cent.
official_results = {
    'vssd_micro.in1k': {'top1': 82.5},
    'vssd_tiny.in1k': {'top1': 83.6},
    'vssd_tiny.mesa_in1k': {'top1': 84.1},
    'vssd_small.in1k': {'top1': 84.1},
    'vssd_small.mesa_in1k': {'top1': 84.5},
    'vssd_base.in1k': {'top1': 84.7},
    'vssd_base.mesa_in1k': {'top1': 85.4},
}


def _create_vssd(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> VSSD:
    return build_model(VSSD, variant, pretrained, checkpoint_filter_fn, **dict(model_args, **kwargs))


@register_model
def vssd_micro(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-M: 13.5M parameters, 82.5 % on ImageNet-1K."""
    return _create_vssd('vssd_micro', pretrained, kwargs, depths=(2, 2, 8, 4), dims=48, d_state=48)


@register_model
def vssd_tiny(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-T: 24.3M parameters, 83.6 % on ImageNet-1K, 84.1 % with self-distillation (MESA)."""
    return _create_vssd('vssd_tiny', pretrained, kwargs, depths=(2, 4, 8, 4), dims=64)


@register_model
def vssd_small(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-S: 40.1M parameters, 84.1 % on ImageNet-1K, 84.5 % with self-distillation (MESA)."""
    return _create_vssd('vssd_small', pretrained, kwargs, depths=(3, 4, 21, 5), dims=64)


@register_model
def vssd_base(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-B: 88.8M parameters, 84.7 % on ImageNet-1K, 85.4 % with self-distillation (MESA)."""
    return _create_vssd('vssd_base', pretrained, kwargs, depths=(3, 4, 21, 5), dims=96, num_heads=(3, 6, 12, 24))


@register_model
def vssd_pico(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """A weightless VSSD for tests and demonstrations: 32 x 32 images, quick on a CPU."""
    return _create_vssd(
        'vssd_pico', pretrained, kwargs, depths=(1, 1, 2, 1), dims=16, num_heads=(1, 2, 4, 8), d_state=16, mlp_ratio=1.)
