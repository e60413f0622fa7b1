"""ViM2 (Vision MambaMixer)

A hierarchical backbone: blocks of two selective mixers over the map (VMamba's SS2D) and one over the channels of every
pixel; the input of each mixer is a learned sum of what all earlier mixers of its stage have put out.

Paper: `MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection`
    - https://arxiv.org/abs/2403.19888 (first version, March 2024)
Code: none was released, nor weights. Everything here is from the paper, unverified against official weights.

Fixed by the paper: the variants (channels, mixers of each stage, widths of the channel mixers), a 4 x 4 stem of stride
4, four stages, the expansion by 2 and the 3 x 3 depthwise convolution of the token mixer, its four scans with a shared
gate, the equations of the weighted sums, average pooling and a linear classifier. Open there and chosen here:

- Token mixer: VMamba's first one, with B, C and the steps from the convolved features; d_state 16, dt_rank
  ceil(C / 16), S4D-real decay, steps from [1e-3, 0.1]; LayerNorm in front, and on the merged scans before the gate.
- Channel mixer: the printed equations tie weights to the number of pixels, which contradicts the paper's own
  evaluation at other sizes and its parameter counts. Here every pixel is a batch element and its W channels are the
  sequence, of feature width 1; one centred convolution of 3 channels; a scan from each end with parameters of its own.
- Order: the table has two token mixers for each channel mixer, the text one; the table is followed.
- Weighted sums: every mixer is one step, so the second of two token mixers sees no new channel mixer. Weights start as
  the plain chain, each mixer reading its predecessor. The output of a stage is that of its last channel mixer, without
  another sum, which is what the paper's count of the weights says.
- Mixers keep an inner residual connection (`inner_residual`): without channel mixers and with the plain chain ViM2 is
  VMamba, as the paper claims. Stem norm, patch merging and the last norm are VMamba's too.
- `channel_mixer='mlp'` (with weighted_average=False the paper's ViM2-MLP) has the channel mixer's width as its hidden
  size: with the mixers of ViM2-S that gives the 40M parameters that the paper states.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, List, Optional

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, register_notrace_function
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import nn

from visionssm.checkpoints.load import unwrap
from visionssm.layers import (
    SS2D,
    ConvStem,
    Mlp,
    PatchMerging,
    default_norm,
    init_A_log_,
    init_dt_bias_,
    init_dt_proj_,
    negative_exp,
)
from visionssm.layers.precision import widen
from visionssm.utils.suggest import check_choice

from ._builder import build_model
from ._hierarchy import Hierarchy, stage_drop_path_rates

__all__ = ['ViM2']

_CHANNEL_MIXERS = ('bidirectional', 'mlp', 'none')


@register_notrace_function
def wide_square(x: torch.Tensor) -> torch.Tensor:
    """Return x * x in at least float32: a square can leave the range of float16."""
    x = widen(x)
    return x * x


class ChannelSSM(nn.Module):
    """Selective scan along the channels of every pixel, with parameters that all pixels and channels share.

    [dt, B, C] = x_proj a_l; delta = softplus(dt + dt_bias); A = -exp(A_log);
    s_l = exp(delta_l A) s_{l-1} + delta_l a_l B_l; y_l = <s_l, C_l> + D a_l, with `reverse` from the last channel on.

    A feature is one number, so B_l = a_l b and C_l = a_l c with constant vectors b and c: the scan reads a_l^2 under
    the constant b and c and is multiplied by a_l behind, which spares the N times larger maps of B and C. The pixels
    are the channels of the scan, the axis that its kernels work on in parallel.
    """

    reverse: Final[bool]

    def __init__(
            self,
            d_state: int = 16,
            reverse: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the parameters.

        Args:
            d_state: State size N.
            reverse: Read the channels from the last one.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.d_state = d_state
        self.reverse = reverse
        self.x_proj = nn.Parameter(torch.empty(1 + 2 * d_state, 1, **dd))
        self.dt_bias = nn.Parameter(torch.empty(1, **dd))
        self.A_log = nn.Parameter(torch.empty(1, d_state, **dd))
        self.D = nn.Parameter(torch.empty(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        init_dt_proj_(self.x_proj)  # [-1, 1] for one feature, which is what nn.Linear draws too
        init_dt_bias_(self.dt_bias)
        init_A_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """Mix along the channels.

        Args:
            a: Features of the pixels, (B, H W, W').

        Returns:
            (B, H W, W'), in at least float32.
        """
        pixels = a.shape[1]
        dt, b, c = self.x_proj.squeeze(1).split([1, self.d_state, self.d_state])
        y = torch.ops.visionssm.selective_scan(
            wide_square(a), a * dt, negative_exp(self.A_log).expand(pixels, -1), b.expand(pixels, -1),
            c.expand(pixels, -1), None, None, self.dt_bias.expand(pixels), True, self.reverse)
        return a * (y + self.D)


class ChannelMixer(nn.Module):
    """Selective channel mixer: gate and features from one projection, a scan from both ends of the channels.

    [a, g] = in_proj(x); a = silu(conv(a)); out = out_proj((ssm(a) + ssm_b(a)) * silu(g)).
    """

    def __init__(
            self,
            dim: int,
            width: int,
            d_state: int = 16,
            d_conv: int = 3,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the mixer.

        Args:
            dim: Channels C.
            width: Length W of the sequence of channels that is scanned.
            d_state: State size N.
            d_conv: Channels that the convolution sees, odd.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        if d_conv % 2 == 0:
            raise ValueError(f'd_conv is {d_conv}; an odd number keeps the channels in their places.')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.behind = d_conv // 2
        self.in_proj = nn.Linear(dim, 2 * width, bias=False, **dd)
        self.conv = nn.Conv1d(1, 1, d_conv, padding=d_conv // 2, **dd)
        self.ssm = ChannelSSM(d_state, **dd)
        self.ssm_b = ChannelSSM(d_state, reverse=True, **dd)
        self.out_proj = nn.Linear(width, dim, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix the channels of every pixel by itself.

        Args:
            x: Map, (B, H, W, C).

        Returns:
            (B, H, W, C).
        """
        a, g = self.in_proj(x).chunk(2, dim=-1)
        a = F.pad(a.flatten(1, 2), (0, self.behind))  # (B, H W, W' + 1)
        # A causal convolution of a sequence with a longer end, read that much later, is a centred one.
        bias = self.conv.bias
        if bias is not None:  # always so, but TorchScript wants to be told
            bias = bias.expand(a.shape[1])
        a = torch.ops.visionssm.causal_conv1d(
            a, self.conv.weight.expand(a.shape[1], -1, -1), bias, 'silu', False)[:, :, self.behind:]
        y = (self.ssm(a) + self.ssm_b(a)).unflatten(1, (x.shape[1], x.shape[2])) * F.silu(g)
        return self.out_proj(y.to(g.dtype))


class WeightedAverage(nn.Module):
    """Sum of all earlier outputs of token mixers and channel mixers, each with a learned scalar.

    The input of the stage counts as the first output of both kinds, as in the paper's equations. Nothing normalises the
    weights and nothing bounds them.
    """

    shortcut: Final[bool]

    def __init__(
            self,
            num_token: int,
            num_channel: int,
            latest: str = 'token',
            shortcut: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the weights.

        Args:
            num_token: Outputs of token mixers, with the input of the stage.
            num_channel: Outputs of channel mixers, with the input of the stage.
            latest: Kind of the last mixer before, 'token' or 'channel': its weight starts at 1, the others at 0.
            shortcut: Start with the weight 1 for the input of the stage too.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        check_choice('latest', latest, ('token', 'channel'))
        super().__init__()
        self.latest = latest
        self.shortcut = shortcut
        self.token = nn.Parameter(torch.empty(num_token, device=device, dtype=dtype))
        self.channel = nn.Parameter(torch.empty(num_channel, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weights to those of the plain chain."""
        self.token.zero_()
        self.channel.zero_()
        (self.token if self.latest == 'token' else self.channel)[-1] = 1.
        if self.shortcut:
            self.token[0] = 1.

    def forward(self, token: List[torch.Tensor], channel: List[torch.Tensor]) -> torch.Tensor:
        """Sum.

        Args:
            token: The input of the stage and the outputs of its token mixers so far, equal shapes.
            channel: The input of the stage and the outputs of its channel mixers so far.

        Returns:
            A tensor of that shape.
        """
        x = self.token[0] * token[0]
        for i in range(1, len(token)):
            x = x + self.token[i] * token[i]
        for i in range(len(channel)):
            x = x + self.channel[i] * channel[i]
        return x


class ViM2Block(nn.Module):
    """One mixer behind a norm, usually around a residual connection, with the weights of its input."""

    is_channel: Final[bool]
    residual: Final[bool]

    def __init__(
            self,
            mixer: nn.Module,
            norm: nn.Module,
            average: Optional[nn.Module] = None,
            is_channel: bool = False,
            residual: bool = True,
            drop_path: float = 0.,
    ) -> None:
        """Assemble the block.

        Args:
            mixer: Maps (B, H, W, C) to itself.
            norm: Normalisation in front of it.
            average: Makes the input of the block from earlier outputs; the stage calls it. None for the last output.
            is_channel: The mixer is a channel mixer.
            residual: Add the input to the output.
            drop_path: Rate at which the mixer is dropped.
        """
        super().__init__()
        self.is_channel = is_channel
        self.residual = residual
        self.average = average
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        y = self.drop_path(self.mixer(self.norm(x)))
        return x + y if self.residual else y


class ViM2Stage(nn.Module):
    """A downsampling layer and blocks that read weighted sums: (B, H, W, C_in) to (B, H', W', C)."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Assemble the stage from its downsampling layer and its `ViM2Block`s."""
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C_in) to (B, H', W', C)."""
        x = self.downsample(x)
        token = [x]
        channel = [x]
        for block in self.blocks:
            if block.average is not None:
                x = block.average(token, channel)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if block.average is not None:  # without sums nothing is read again
                if block.is_channel:
                    channel.append(x)
                else:
                    token.append(x)
        return x


def _make_blocks(
        dim: int,
        width: int,
        rates: Sequence[float],
        token_mixers: int,
        token_mixer: partial,
        channel_mixer: str,
        d_state: int,
        weighted_average: bool,
        inner_residual: bool,
        dd: dict[str, Any],
) -> list[ViM2Block]:
    """Return the mixers of a stage: `token_mixers` over the map, one over the channels, and so on, one a rate."""
    blocks: list[ViM2Block] = []
    counts = {'token': 1, 'channel': 1}
    latest = 'token'
    for i, rate in enumerate(rates):
        kind = 'channel' if channel_mixer != 'none' and i % (token_mixers + 1) == token_mixers else 'token'
        average = None
        if weighted_average:
            average = WeightedAverage(counts['token'], counts['channel'], latest, not inner_residual, **dd)
        if kind == 'token':
            mixer = token_mixer(dim)
        elif channel_mixer == 'mlp':
            mixer = Mlp(dim, width, **dd)
        else:
            mixer = ChannelMixer(dim, width, d_state, **dd)
        blocks.append(ViM2Block(mixer, default_norm(dim, **dd), average, kind == 'channel', inner_residual, rate))
        counts[kind] += 1
        latest = kind
    return blocks


class ViM2(Hierarchy):
    """Vision MambaMixer: selective mixing of tokens and of channels, with learned sums of earlier features."""

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            depths: Sequence[int] = (1, 1, 3, 1),
            dims: int | Sequence[int] = 96,
            widths: Sequence[int] | None = None,
            token_mixers: int = 2,
            d_state: int = 16,
            expand: float = 2,
            dt_rank: int | None = None,
            channel_mixer: str = 'bidirectional',
            weighted_average: bool = True,
            inner_residual: bool = True,
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
            depths: Blocks of each stage; a block is `token_mixers` token mixers and one channel mixer.
            dims: Channels C of each stage, or of the first one, after which they double.
            widths: Width of the channel mixers of each stage; when None twice C, and C in the last stage.
            token_mixers: Token mixers in front of each channel mixer.
            d_state: State size N of both mixers.
            expand: Inner channels of the token mixer over C.
            dt_rank: Rank of the token mixer's step projection; ceil(C / 16) when None.
            channel_mixer: 'bidirectional', the selective one; 'mlp', a plain MLP; 'none'.
            weighted_average: Each mixer reads a learned sum of all earlier outputs of its stage; else the last one.
            inner_residual: Add its input to the output of each mixer.
            drop_rate: Dropout in front of the classifier.
            drop_path_rate: Stochastic depth of the last mixer, rising linearly from 0.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        check_choice('channel_mixer', channel_mixer, _CHANNEL_MIXERS)
        if token_mixers < 1:
            raise ValueError(f'token_mixers is {token_mixers}; at least 1 is needed.')
        if not inner_residual and not weighted_average:
            raise ValueError(
                'Without inner_residual and without weighted_average nothing leads around a mixer: switch one on.')
        dims = [dims * 2 ** i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        widths = [*(2 * dim for dim in dims[:-1]), dims[-1]] if widths is None else list(widths)
        if not len(dims) == len(widths) == len(depths):
            raise ValueError(
                f'depths are {list(depths)}, dims {dims} and widths {widths}: give as many of each as of the others.')
        token_mixer = partial(SS2D, d_state=d_state, expand=expand, dt_rank=dt_rank, gate='act', **dd)
        steps = token_mixers + (channel_mixer != 'none')
        stages = []
        for i, rates in enumerate(stage_drop_path_rates(drop_path_rate, [steps * depth for depth in depths])):
            blocks = _make_blocks(
                dims[i], widths[i], rates, token_mixers, token_mixer, channel_mixer, d_state, weighted_average,
                inner_residual, dd)
            stages.append(ViM2Stage(PatchMerging(dims[i - 1], dims[i], **dd) if i else nn.Identity(), blocks))
        super().__init__(
            stem=ConvStem(in_chans, dims[0], **dd), stages=stages, dims=dims, in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate, norm=default_norm(dims[-1], **dd),
            **dd)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that training should not decay: those of the states, and the weights of the sums."""
        weights = {name for name, _ in self.named_parameters() if name.endswith(('.average.token', '.average.channel'))}
        return weights | super().no_weight_decay()


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint of ours; there are no official ones.

    Args:
        state_dict: A state dict or a training checkpoint around one.
        model: A `ViM2`.

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
        'description': 'Made from the paper, unverified against official weights: none were released.',
        'origin_url': 'https://github.com/MambaMixer/M2',
        'paper_name': 'MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection',
        'paper_ids': 'arXiv:2403.19888',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'vim2_tiny': _cfg(),
    'vim2_small': _cfg(),
    'vim2_base': _cfg(),
    'vim2_pico': _cfg(
        input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0,
        description='A small model without weights, for tests.'),
})


def _create_vim2(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> ViM2:
    return build_model(ViM2, variant, pretrained, checkpoint_filter_fn, **dict(model_args, **kwargs))


@register_model
def vim2_tiny(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-T from the paper: 24.0M parameters (20M claimed), no weights."""
    return _create_vim2('vim2_tiny', pretrained, kwargs, depths=(1, 1, 3, 1), dims=96)


@register_model
def vim2_small(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-S from the paper: 43.7M parameters (43M claimed), no weights."""
    return _create_vim2('vim2_small', pretrained, kwargs, depths=(1, 1, 9, 1), dims=96)


@register_model
def vim2_base(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-B from the paper: 75.6M parameters (74M claimed), no weights."""
    return _create_vim2('vim2_base', pretrained, kwargs, depths=(1, 1, 9, 1), dims=128)


@register_model
def vim2_pico(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """A weightless ViM2 for tests and demonstrations: 32 x 32 images, quick on a CPU."""
    model_args = {'depths': (1, 1, 1, 1), 'dims': (16, 32, 64, 80), 'd_state': 8}
    return _create_vim2('vim2_pico', pretrained, kwargs, **model_args)
