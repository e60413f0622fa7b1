"""Vim (Vision Mamba)

A plain, single-scale backbone: patches and a class token in the middle of them form one sequence, which every block
reads with a selective state-space scan from both ends.

Paper: `Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model`
    - https://arxiv.org/abs/2401.09417
Code: https://github.com/hustvl/Vim (Apache-2.0)

Written anew from the published equations and checkpoints; the weights of the official repository load. What differs:
the position embedding follows the size of the image, with the class token's row put where it belongs; the scan runs
backwards over the tokens instead of over flipped copies; under autocast the residual stream stays in float32, with
low-precision weights it has their type (`residual_in_fp32` has no switch).

Options of the official class that no released weight uses and that are not ported: `if_bidirectional` (layers paired
by direction), `flip_img_sequences_ratio`, random class-token positions, `ssm_cfg` beyond sizes, `ft_seq_len`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, List, Optional, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerNorm,
    RmsNorm,
    calculate_drop_path_rates,
    get_device_dtype,
    lecun_normal_,
    register_notrace_function,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import nn

from visionssm.layers import (
    BiMamba,
    BiMamba2,
    PatchEmbed,
    PlainPyramid,
    SimpleFeaturePyramid,
    apply_rotary,
    class_token_index,
    drop_class_tokens,
    insert_class_tokens,
    resize_pos_embed,
    rotary_table,
)
from visionssm.layers.bimamba_official import bimamba_keys
from visionssm.utils.suggest import check_choice

from ._builder import build_model, filter_official, load_official_keys
from ._hierarchy import reset_tree
from ._official import Official, take_known

__all__ = ['Vim', 'VimDense']

_CLASS_TOKENS = ('middle', 'head', 'double', 'none')
_POOLS = ('', 'token', 'avg', 'max', 'last', 'logit_max')
_ROPES = ('none', 'hidden', 'both')
_PYRAMID = 'SimpleFeaturePyramid(VisionMambaDet)'
_PYRAMID_OPTIONS = ('type', 'out_channels', 'extra_level', 'residual_features', 'last')


@register_notrace_function
def rotary_rows(
        x: torch.Tensor,
        height: int,
        width: int,
        class_token: str,
        grid: float,
        official: bool,
) -> torch.Tensor:
    """Return the rotary table (2, L, C) of tokens `x`, (B, L, C); class tokens keep still."""
    table = rotary_table(height, width, x.shape[-1], x, grid)
    still = torch.stack([torch.ones_like(table[0, :1]), torch.zeros_like(table[0, :1])])
    if official and class_token == 'middle' and height * width % 2 == 0:
        class_token = 'head'
    return insert_class_tokens(table, class_token, still, still)


class VimBlock(nn.Module):
    """Add, normalise, mix. The addition of a block's output is left to its successor."""

    rope_residual: Final[bool]

    def __init__(
            self,
            dim: int,
            mixer: nn.Module,
            norm: nn.Module,
            drop_path: float = 0.,
            rope_residual: bool = False,
    ) -> None:
        """Assemble the block.

        Args:
            dim: Channels C.
            mixer: Maps (B, L, C) to (B, L, C).
            norm: Normalisation of the residual stream.
            drop_path: Rate at which the incoming hidden stream is dropped.
            rope_residual: Rotate the residual stream too where a rotary table is given.
        """
        super().__init__()
        self.dim = dim
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.rope_residual = rope_residual

    def forward(
            self,
            x: torch.Tensor,
            residual: Optional[torch.Tensor] = None,
            rope: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden and the residual stream.

        Args:
            x: Hidden stream, the output of the mixer before, (B, L, C).
            residual: Residual stream, (B, L, C); None in front of the first block.
            rope: Rotary table, (2, L, C).

        Returns:
            Two tensors (B, L, C): the mixer's raw output, and the residual that it was computed from.
        """
        if rope is not None:
            x = apply_rotary(x, rope)
            if residual is not None and self.rope_residual:
                residual = apply_rotary(residual, rope)
        residual = x if residual is None else residual + self.drop_path(x)
        return self.mixer(self.norm(residual)), residual


class Vim(nn.Module):
    """Vision Mamba: a sequence of patches and class tokens through bidirectional state-space blocks."""

    official_class = 'VisionMamba'
    use_rope: Final[bool]

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            patch_size: int | tuple[int, int] = 16,
            stride: int | tuple[int, int] | None = None,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str | None = None,
            embed_dim: int = 192,
            depth: int = 24,
            d_state: int = 16,
            d_conv: int = 4,
            expand: float = 2,
            dt_rank: int | None = None,
            bimamba_type: str = 'v2',
            divide_output: bool = True,
            init_values: float | None = None,
            mixer: str = 'mamba',
            headdim: int = 64,
            ngroups: int = 1,
            class_token: str = 'middle',
            pos_embed: bool = True,
            rope: str = 'none',
            rope_grid: float = 14.,
            rope_official: bool = False,
            norm_layer: str = 'rmsnorm',
            norm_eps: float = 1e-5,
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model.

        Args:
            img_size: Image size (H, W) of the position embedding; other sizes resample it.
            patch_size: Side(s) of a patch.
            stride: Distance(s) of neighbouring patches; `patch_size` when None.
            in_chans: Channels of the images.
            num_classes: Classes; 0 for no classifier.
            global_pool: 'token', the class token (mean of both for class_token='double'); 'avg' or 'max' over the
                patches; 'last', the last token; 'logit_max', the largest logit over all tokens; '', all tokens.
                None takes 'token' where there is a class token and else 'avg'.
            embed_dim: Channels C.
            depth: Number of blocks.
            d_state: State size N.
            d_conv: Width of the causal convolution.
            expand: Inner channels of the mixer over C.
            dt_rank: Rank of the step projection; ceil(C / 16) when None. Mamba only.
            bimamba_type: 'v2', both directions; 'v1', both with shared parameters (Mamba only); 'none', forward only.
            divide_output: Halve the sum of both directions.
            init_values: Initial value of a scale of each mixer's output; none when None.
            mixer: 'mamba', that of all released weights; 'mamba2', heads with one decay each and a gated norm.
            headdim: Channels of a head. Mamba-2 only.
            ngroups: Groups of heads that share B and C. Mamba-2 only.
            class_token: 'middle', 'head', 'double' (one at each end) or 'none'.
            pos_embed: Learn an absolute position embedding.
            rope: Rotary embedding in front of every block: 'none', 'hidden', or 'both' streams.
            rope_grid: Side of the grid whose rotary positions are the integers.
            rope_official: With an odd number of tokens leave the first one unrotated, as the official code does, even
                where the class token stands elsewhere.
            norm_layer: 'rmsnorm' or 'layernorm'.
            norm_eps: Epsilon of the normalisations.
            drop_rate: Dropout in front of the classifier.
            pos_drop_rate: Dropout behind the position embedding.
            drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        check_choice('class_token', class_token, _CLASS_TOKENS)
        check_choice('rope', rope, _ROPES)
        check_choice('mixer', mixer, ('mamba', 'mamba2'))
        for name, size in (('embed_dim', embed_dim), ('depth', depth), ('d_state', d_state), ('d_conv', d_conv)):
            if size < 1:
                raise ValueError(f'{name} is {size}; at least 1 is needed.')
        if rope != 'none' and embed_dim % 4:
            raise ValueError(f'embed_dim is {embed_dim}; rotary embedding needs a multiple of 4.')
        norm = _norm_layer(norm_layer, norm_eps, dd)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.class_token = class_token
        self.num_prefix_tokens = {'none': 0, 'double': 2}.get(class_token, 1)
        self.global_pool = self._check_pool(global_pool or ('' if global_pool == '' else self._default_pool()))
        self.use_rope = rope != 'none'
        if mixer != 'mamba':
            self.official_class = ''  # the official code has no such mixer
        self.rope_grid = float(rope_grid)
        self.rope_official = rope_official
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(img_size, patch_size, stride or patch_size, in_chans, embed_dim, **dd)
        self.cls_token = self.cls_token_head = self.cls_token_tail = None
        if class_token == 'double':
            self.cls_token_head = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
            self.cls_token_tail = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        elif class_token != 'none':
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        num_tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim, **dd)) if pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)

        rates = calculate_drop_path_rates(drop_path_rate, depth)
        options = {'bimamba_type': bimamba_type, 'divide_output': divide_output, 'init_values': init_values, **dd}
        if mixer == 'mamba2':
            make_mixer = partial(BiMamba2, embed_dim, d_state, d_conv, expand, headdim, ngroups, **options)
        else:
            make_mixer = partial(BiMamba, embed_dim, d_state, d_conv, expand, dt_rank, **options)
        # A block adds the output of the one before it, so the rates lag by one and the last one belongs to the end.
        self.blocks = nn.ModuleList([
            VimBlock(embed_dim, make_mixer(), norm(embed_dim), rate, rope_residual=rope == 'both')
            for rate in [0., *rates[:-1]]])
        self.drop_path = DropPath(rates[-1]) if rates[-1] > 0. else nn.Identity()
        self.norm = norm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {'module': f'blocks.{i}', 'num_chs': embed_dim, 'reduction': reduction} for i in range(depth)]
        self.init_weights(needs_reset=False)

    def _default_pool(self) -> str:
        return 'avg' if self.class_token == 'none' else 'token'

    def _check_pool(self, global_pool: str) -> str:
        check_choice('global_pool', global_pool, _POOLS)
        if global_pool == 'token' and self.class_token == 'none':
            raise ValueError("global_pool='token' needs a class token; use 'avg', 'max' or 'last' without one.")
        return global_pool

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights.

        Args:
            needs_reset: Draw also what the sub-modules drew when they were built; needed after `to_empty()`.
        """
        if needs_reset:
            reset_tree(self)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for table in (self.pos_embed, self.cls_token, self.cls_token_head, self.cls_token_tail):
            if table is not None:
                trunc_normal_(table, std=.02)
        for block in self.blocks:
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
            with torch.no_grad():
                block.mixer.out_proj.weight.div_(math.sqrt(len(self.blocks)))
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=.02)
            nn.init.zeros_(self.head.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        load_official_keys(state_dict, prefix, self, OFFICIAL)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that training should not decay: tokens, positions, and the state parameters."""
        fixed = {'pos_embed', 'cls_token', 'cls_token_head', 'cls_token_tail'}
        state = {name for name, _ in self.named_parameters() if name.endswith(('.A_log', '.D', '.dt_bias'))}
        return fixed | state

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that sort parameters into layers."""
        return {
            'stem': r'^cls_token|^pos_embed|^patch_embed',
            'blocks': r'^blocks' if coarse else [(r'^blocks\.(\d+)', None), (r'^norm', (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing what they compute."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 for no classifier.
            global_pool: As in the constructor; None keeps the pooling.
        """
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = self._check_pool(global_pool)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def drop_class_tokens(self) -> None:
        """Remove the class tokens and their rows of the position embedding."""
        if self.class_token == 'none':
            return
        if self.pos_embed is not None:
            rows = drop_class_tokens(self.pos_embed.detach(), self.class_token).clone()
            self.pos_embed = nn.Parameter(rows, requires_grad=self.pos_embed.requires_grad)
        self.cls_token = self.cls_token_head = self.cls_token_tail = None
        self.class_token, self.num_prefix_tokens = 'none', 0
        if self.global_pool == 'token':
            self.global_pool = 'avg'

    @torch.jit.ignore
    def dense(
            self,
            out_indices: Sequence[int] | None = None,
            out_norms: bool | None = None,
            pyramid: Mapping[str, Any] | None = None,
    ) -> 'VimDense':
        """Turn this model into the backbone of a detector or a segmenter, as the official code has them.

        Args:
            out_indices: Blocks to tap, see `VimDense`.
            out_norms: Not for these models: True is refused.
            pyramid: `type`, 'simple' for the official detection (with `out_channels`, 256, and `extra_level`, True) or
                'plain' for the official segmentation; and `residual_features` and `last` of `VimDense`. Maps of one
                size when None.

        Returns:
            A module from images to the list of NCHW maps.
        """
        if out_norms:
            raise ValueError('out_norms is True; the taps of Vim have no norms: leave it out.')
        options = {'type': 'none', 'out_channels': 256, **(pyramid or {})}
        for name in options:
            check_choice('an option of pyramid', name, _PYRAMID_OPTIONS)
        kind, out_chans = options.pop('type'), options.pop('out_channels')
        if out_indices is None and kind == 'none':
            out_indices = _even_taps(len(self.blocks))
        return VimDense(
            self, out_indices, pyramid=kind, out_chans=out_chans,
            official_class=_PYRAMID if kind == 'simple' else 'VisionMambaSeg', **options)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the stored position embedding for another image size.

        Args:
            img_size: New size (H, W).
        """
        old_size = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        if self.pos_embed is not None and self.patch_embed.grid_size != old_size:
            with torch.no_grad():
                resized = resize_pos_embed(self.pos_embed, old_size, self.patch_embed.grid_size, self.class_token)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size)

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, int, int]:
        """Return tokens (B, L, C) and the grid (H', W') of an image."""
        x = self.patch_embed(x)
        height, width = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)  # (B, C, H', W') -> (B, M, C)
        if self.cls_token is not None:
            x = insert_class_tokens(x, self.class_token, self.cls_token)
        elif self.cls_token_head is not None:
            x = insert_class_tokens(x, self.class_token, self.cls_token_head, self.cls_token_tail)
        if self.pos_embed is not None:
            x = x + resize_pos_embed(self.pos_embed, self.patch_embed.grid_size, [height, width], self.class_token)
        return self.pos_drop(x), height, width

    def _rope(self, x: torch.Tensor, height: int, width: int) -> Optional[torch.Tensor]:
        """Return the rotary table (2, L, C) of the tokens; class tokens keep still."""
        if not self.use_rope:
            return None
        return rotary_rows(x, height, width, self.class_token, self.rope_grid, self.rope_official)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return all normalised tokens, (B, L, C), of images (B, in_chans, H, W)."""
        x, height, width = self._embed(x)
        rope = self._rope(x, height, width)
        residual: Optional[torch.Tensor] = None
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, residual = checkpoint(block, x, residual, rope)
            else:
                x, residual = block(x, residual, rope)
        x = self.drop_path(x)
        return self.norm(x if residual is None else residual + x)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Return the residual stream behind chosen blocks, without class tokens.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: The last n blocks if an int, all if None, else the blocks.
            norm: Apply the final normalisation to every tap.
            stop_early: Leave out the blocks behind the last tap.
            output_fmt: 'NCHW' or 'NLC'.
            intermediates_only: Leave out the final features.

        Returns:
            The taps, or (final features, taps).
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt is {output_fmt!r}; allowed are 'NCHW' and 'NLC'.")
        taps: List[torch.Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, height, width = self._embed(x)
        rope = self._rope(x, height, width)
        residual: Optional[torch.Tensor] = None
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice a ModuleList
            blocks = self.blocks
        else:
            blocks = self.blocks[:max_index + 1]
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, residual = checkpoint(block, x, residual, rope)
            else:
                x, residual = block(x, residual, rope)
            if i in take_indices:
                tap = x if residual is None else residual + x
                tap = drop_class_tokens(self.norm(tap) if norm else tap, self.class_token)
                if output_fmt == 'NCHW':
                    tap = _to_map(tap, height, width)
                taps.append(tap)
        if intermediates_only:
            return taps
        x = self.drop_path(x)
        x = x if residual is None else residual + x
        if torch.jit.is_scripting() or not stop_early or max_index == len(self.blocks) - 1:
            x = self.norm(x)
        return x, taps

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove the blocks behind the last tap.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Remove the final normalisation.
            prune_head: Remove the classifier.

        Returns:
            The indices of the taps.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        if max_index + 1 < len(self.blocks):
            self.drop_path = self.blocks[max_index + 1].drop_path
        self.blocks = self.blocks[:max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool tokens (B, L, C) and classify them.

        Args:
            x: Output of `forward_features`.
            pre_logits: Leave out the classifier.

        Returns:
            (B, num_classes), or (B, C) without the classifier; (B, L, ...) where nothing is pooled.
        """
        if self.global_pool == 'token':
            if self.class_token == 'double':
                x = (x[:, 0] + x[:, -1]) / 2
            else:
                x = x[:, class_token_index(self.class_token, x.shape[1] - 1)]
        elif self.global_pool == 'avg':
            x = drop_class_tokens(x, self.class_token).mean(dim=1)
        elif self.global_pool == 'max':
            x = drop_class_tokens(x, self.class_token).amax(dim=1)
        elif self.global_pool == 'last':
            x = x[:, -1]
        x = self.head_drop(x)
        if not pre_logits:
            x = self.head(x)
        return x.amax(dim=1) if self.global_pool == 'logit_max' else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, num_classes) of images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


class VimDense(nn.Module):
    """Vim as the official detection and segmentation code uses it: images to a list of maps, no classifier.

    Taps are what that code feeds its necks, which is not what `features_only` returns: the raw output of a mixer, or
    the residual stream as the next block sees it (after that block's rotary embedding).
    """

    def __init__(
            self,
            backbone: Vim,
            out_indices: Sequence[int] | None = None,
            residual_features: bool = True,
            last: str = 'add',
            pyramid: str = 'none',
            out_chans: int = 256,
            extra_level: bool = True,
            official_class: str = 'VisionMambaSeg',
    ) -> None:
        """Cut off class tokens and classifier, and build the pyramid.

        Args:
            backbone: The trunk; its class tokens, with their rows of the position embedding, and its classifier are
                removed.
            out_indices: Blocks to tap; four at equal distances for the plain pyramid, else the last one, when None.
            residual_features: Tap the residual stream; else the output of the mixer.
            last: What the residual stream is at the last block: 'none', the mixer's output; 'add', their sum;
                'norm', the sum normalised.
            pyramid: 'none'; 'plain', four taps rescaled to four strides; 'simple', the last map to four or five.
            out_chans: Channels of the maps of the simple pyramid.
            extra_level: Fifth map of the simple pyramid.
            official_class: Whose key names the weights have.
        """
        super().__init__()
        check_choice('last', last, ('none', 'add', 'norm'))
        check_choice('pyramid', pyramid, ('none', 'plain', 'simple'))
        depth, dim = len(backbone.blocks), backbone.embed_dim
        if out_indices is None:
            out_indices = _even_taps(depth) if pyramid == 'plain' else (depth - 1,)
        wrong = [i for i in out_indices if not -depth <= i < depth]
        if wrong or not out_indices:
            raise ValueError(f'out_indices are {tuple(out_indices)}; choose among the blocks 0 to {depth - 1}.')
        self.out_indices = sorted({i % depth for i in out_indices})
        if pyramid == 'plain' and len(self.out_indices) not in (1, 4):
            raise ValueError(f'out_indices are {tuple(out_indices)}; the plain pyramid takes four taps, or one.')
        self.residual_features = residual_features
        self.last = last
        self.official_class = official_class
        backbone.drop_class_tokens()
        backbone.reset_classifier(0)
        backbone.drop_path = nn.Identity()
        if official_class != 'VisionMambaSeg':
            backbone.norm = nn.Identity()
        elif last != 'norm':
            backbone.norm.requires_grad_(False)  # the official weights hold it, but no feature passes through it
        self.backbone = backbone
        dd = get_device_dtype(backbone)
        step = backbone.feature_info[0]['reduction']
        info = [(dim, step) for _ in self.out_indices]
        self.pyramid = None
        if pyramid == 'plain':
            patch_size = backbone.patch_embed.patch_size[0]
            self.pyramid = PlainPyramid(dim, patch_size, **dd)
            info = [(dim, step * 2 ** (i + 2) // patch_size) for i in range(4)]
        elif pyramid == 'simple':
            self.pyramid = SimpleFeaturePyramid(dim, out_chans, extra_level, **dd)
            info = [(out_chans, step * 2 ** i // 4) for i in range(4 + extra_level)]
        self.feature_info = [{'num_chs': channels, 'reduction': reduction} for channels, reduction in info]

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights; see `Vim.init_weights`."""
        self.backbone.init_weights(needs_reset)
        if needs_reset and self.pyramid is not None:
            reset_tree(self.pyramid)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        load_official_keys(state_dict, prefix, self, OFFICIAL)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Return the maps, each (B, C, H', W'), of images (B, in_chans, H, W)."""
        trunk = self.backbone
        x, height, width = trunk._embed(x)
        rope = trunk._rope(x, height, width)
        residual: Optional[torch.Tensor] = None
        taps: List[torch.Tensor] = []
        last = len(trunk.blocks) - 1
        for i, block in enumerate(trunk.blocks):
            if trunk.grad_checkpointing and not torch.jit.is_scripting():
                x, residual = checkpoint(block, x, residual, rope)
            else:
                x, residual = block(x, residual, rope)
            if self.residual_features and i - 1 in self.out_indices:
                taps.append(residual)
            elif not self.residual_features and i in self.out_indices:
                taps.append(x)
        if self.residual_features and last in self.out_indices:
            if self.last != 'none':
                x = residual + x
            taps.append(trunk.norm(x) if self.last == 'norm' else x)
        maps = [_to_map(tap, height, width) for tap in taps]
        if self.pyramid is None:
            return maps
        return self.pyramid(maps[-1] if isinstance(self.pyramid, SimpleFeaturePyramid) else maps)


def _even_taps(depth: int) -> tuple[int, ...]:
    """Return the last blocks of four equal parts of the depth, as the official segmentation taps them."""
    return tuple(depth * k // 4 - 1 for k in range(1, 5)) if depth >= 4 else tuple(range(depth))


def _norm_layer(name: str, eps: float, dd: dict[str, Any]) -> partial:
    check_choice('norm_layer', name, ('rmsnorm', 'layernorm'))
    return partial(RmsNorm if name == 'rmsnorm' else LayerNorm, eps=eps, **dd)


def _to_map(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, height, width)  # (B, M, C) -> (B, C, H', W')


def _key_table(official_class: str) -> tuple[tuple[str, str], ...]:
    """Return the rows (official key, our key) of an official class."""
    rows = [
        ('cls_token', 'cls_token'),
        ('cls_token_head', 'cls_token_head'),
        ('cls_token_tail', 'cls_token_tail'),
        ('pos_embed', 'pos_embed'),
        ('patch_embed.proj.{}', 'patch_embed.proj.{}'),
        ('layers.{}.norm.{}', 'blocks.{}.norm.{}'),
        ('norm_f.{}', 'norm.{}'),
        ('head.{}', 'head.{}'),
        *bimamba_keys('layers.{}.mixer.', 'blocks.{}.mixer.'),
    ]
    if official_class not in ('', 'VisionMamba'):
        rows = [(theirs, f'backbone.{ours}') for theirs, ours in rows] + [('fpn{}.{}.{}', 'pyramid.fpn{}.{}.{}')]
    if official_class == _PYRAMID:
        rows = [(f'net.{theirs}', ours) for theirs, ours in rows]
        rows += [
            ('simfp_{}.{}.{}', 'pyramid.simfp_{}.{}.{}'),
            ('simfp_{}.{}.norm.{}', 'pyramid.simfp_{}.{}.norm.{}'),
        ]
    return tuple(rows)


def _rope_tables(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the rotary tables that official state dicts store though nothing in them is trained."""
    trunk = getattr(model, 'backbone', model)
    if not getattr(trunk, 'use_rope', False):
        return {}
    weight = trunk.patch_embed.proj.weight
    cos, sin = rotary_table(
        *trunk.patch_embed.grid_size, trunk.embed_dim, weight.new_empty(0, dtype=torch.float32), trunk.rope_grid)
    prefix = 'net.' if model.official_class == _PYRAMID else ''
    return {f'{prefix}rope.freqs_cos': cos, f'{prefix}rope.freqs_sin': sin}


# What an official constructor takes when its arguments are not given: today's values, and those of July 2024, the last
# state in which the segmentation backbone runs.
_HEAD_DEFAULTS = {
    'rms_norm': True, 'if_abs_pos_embed': True, 'bimamba_type': 'v2', 'if_cls_token': True, 'if_divide_out': True,
    'use_middle_cls_token': True}
_JULY_2024_DEFAULTS = {
    'rms_norm': False, 'if_abs_pos_embed': False, 'bimamba_type': 'none', 'if_cls_token': False, 'if_divide_out': False,
    'use_middle_cls_token': False}
_COMMON_DEFAULTS = {
    'img_size': 224, 'patch_size': 16, 'stride': 16, 'embed_dim': 192, 'depth': 24, 'd_state': 16, 'num_classes': 1000,
    'drop_rate': 0., 'drop_path_rate': 0.1, 'norm_epsilon': 1e-5, 'final_pool_type': 'none', 'if_rope': False,
    'if_rope_residual': False, 'pt_hw_seq_len': 14, 'if_bimamba': False, 'init_layer_scale': None,
    'use_double_cls_token': False, 'ssm_cfg': None}
_POOL_OF = {'mean': 'avg', 'max': 'logit_max', 'all': '', 'none': 'last'}
_LAST_OF = {'none': 'none', 'add': 'add', 'add & norm': 'norm'}
# Official arguments that change nothing that is computed here.
_NO_EFFECT = frozenset((
    'channels', 'in_chans', 'device', 'dtype', 'ft_seq_len', 'function', 'fused_add_norm', 'if_devide_out',
    'if_random_cls_token_position', 'init_cfg', 'initializer_cfg', 'out_feature', 'pretrained', 'residual_in_fp32'))


def _trunk_options(config: Mapping[str, Any], defaults: Mapping[str, Any], dense: bool) -> dict[str, Any]:
    """Translate the official constructor's arguments to those of `Vim`."""
    known = {**_COMMON_DEFAULTS, **defaults}
    unported = [
        name for name, harmless in (('if_bidirectional', False), ('flip_img_sequences_ratio', -1.))
        if config.get(name, harmless) not in (harmless, None) and config[name] > 0]
    if unported:
        raise ValueError(f'{", ".join(unported)}: no released weight uses this option and it is not ported.')
    o = take_known('Vim', config, known, _NO_EFFECT)
    class_token = 'none'
    if o['if_cls_token'] and not dense:
        class_token = 'double' if o['use_double_cls_token'] else 'middle' if o['use_middle_cls_token'] else 'head'
    options = {
        'img_size': o['img_size'] if isinstance(o['img_size'], int) else tuple(o['img_size']),
        'patch_size': o['patch_size'],
        'stride': o['stride'],
        'in_chans': config.get('in_chans', config.get('channels', 3)),
        'embed_dim': o['embed_dim'],
        'depth': o['depth'],
        'd_state': o['d_state'],
        'bimamba_type': 'v1' if o['if_bimamba'] else o['bimamba_type'],
        'divide_output': o['if_divide_out'],
        'init_values': o['init_layer_scale'],
        'class_token': class_token,
        'pos_embed': o['if_abs_pos_embed'],
        'rope': ('both' if o['if_rope_residual'] else 'hidden') if o['if_rope'] else 'none',
        'rope_grid': o['pt_hw_seq_len'],
        'rope_official': True,
        'norm_layer': 'rmsnorm' if o['rms_norm'] else 'layernorm',
        'norm_eps': o['norm_epsilon'],
        'pos_drop_rate': o['drop_rate'],
        'drop_path_rate': o['drop_path_rate'],
    }
    if not dense:
        check_choice('final_pool_type', o['final_pool_type'], _POOL_OF)
        options['num_classes'] = o['num_classes']
        options['global_pool'] = 'token' if class_token != 'none' else _POOL_OF[o['final_pool_type']]
    return {**options, **(o['ssm_cfg'] or {})}


def _build_official(official_class: str, config: Mapping[str, Any]) -> nn.Module:
    """Build our model from the keyword arguments of an official constructor."""
    config = dict(config)
    if official_class == 'VisionMamba':
        return Vim(**_trunk_options(config, _HEAD_DEFAULTS, dense=False))
    if official_class == 'VisionMambaSeg':
        own = {key: config.pop(key, default) for key, default in (
            ('out_indices', (3, 5, 7, 11)), ('use_residual_as_feature', False), ('last_layer_process', 'none'),
            ('if_fpn', True))}
        check_choice('last_layer_process', own['last_layer_process'], _LAST_OF)
        return VimDense(
            Vim(num_classes=0, **_trunk_options(config, _JULY_2024_DEFAULTS, dense=True)),
            out_indices=own['out_indices'],
            residual_features=own['use_residual_as_feature'],
            last=_LAST_OF[own['last_layer_process']],
            pyramid='plain' if own['if_fpn'] else 'none',
            official_class=official_class)
    neck = {}
    if official_class == _PYRAMID:
        if tuple(config.get('scale_factors', (4., 2., 1., .5))) != (4., 2., 1., .5):
            raise ValueError(f"scale_factors are {config['scale_factors']}; only (4, 2, 1, 0.5) is ported.")
        neck = {
            'pyramid': 'simple',
            'out_chans': config.get('out_channels', 256),
            'extra_level': config.get('top_block', 'LastLevelMaxPool') is not None}
        config = dict(config.get('net', config))
    last = config.pop('last_layer_process', 'none')
    if last not in ('none', 'add'):
        raise ValueError(f"last_layer_process is {last!r}; official detection runs with 'none' and 'add' only.")
    trunk = Vim(num_classes=0, **_trunk_options(config, _HEAD_DEFAULTS, dense=True))
    return VimDense(trunk, last=last, official_class=official_class, **neck)


def _infer_official(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer official class and arguments from keys and shapes; what they do not tell is taken from released models."""
    keys = set(state_dict)
    prefix = 'net.' if any(key.startswith('net.') for key in keys) else ''
    sd = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
    if 'patch_embed.proj.weight' not in sd or 'layers.0.mixer.A_log' not in sd:
        raise ValueError(
            'These are not the keys of an official Vim state dict (no patch_embed.proj.weight or '
            f'layers.0.mixer.A_log); the first ones are {sorted(keys)[:5]}.')
    dense = not any(key.startswith(('head.', 'cls_token')) for key in sd)
    embed_dim, in_chans, patch = sd['patch_embed.proj.weight'].shape[:3]
    rope = 'rope.freqs_cos' in sd
    double = 'cls_token_head' in sd
    extra = 2 if double else int('cls_token' in sd)
    patches = len(sd['rope.freqs_cos']) if rope else sd['pos_embed'].shape[1] - extra if 'pos_embed' in sd else 196
    side = round(patches ** 0.5)
    if side * side != patches:
        raise ValueError(f'The {patches} patches of pos_embed form no square, so the image size cannot be told from '
                         f'the state dict: give the config of the official constructor.')
    # 224 pixels cut with a smaller stride are more likely than an odd image size.
    stride = next((s for s in (patch, max(1, patch // 2)) if (224 - patch) // s + 1 == side), patch)
    img_size = 224 if (224 - patch) // stride + 1 == side else (side - 1) * stride + patch
    both = any('conv1d_b' in key for key in sd)
    shared = any('A_b_log' in key for key in sd)
    config = {
        'img_size': img_size, 'patch_size': patch, 'stride': stride, 'in_chans': in_chans, 'embed_dim': embed_dim,
        'depth': 1 + max(int(key.split('.')[1]) for key in sd if key.startswith('layers.')),
        'd_state': sd['layers.0.mixer.A_log'].shape[1], 'rms_norm': 'layers.0.norm.bias' not in sd,
        'if_abs_pos_embed': 'pos_embed' in sd, 'if_rope': rope, 'if_rope_residual': rope,
        'init_layer_scale': 1. if 'layers.0.mixer.gamma' in sd else None,
        'bimamba_type': 'v2' if both else 'v1' if shared else 'none', 'if_cls_token': extra > 0,
        'use_double_cls_token': double, 'use_middle_cls_token': not rope, 'if_divide_out': not rope,
        'final_pool_type': 'mean', 'num_classes': len(sd['head.weight']) if 'head.weight' in sd else 0}
    if rope:
        # The second column turns the slowest channel pair, which cannot have gone round, by reference / side / period.
        slowest = 10000. ** (4 / embed_dim - 1)
        sin = sd['rope.freqs_sin'][1, -1]
        config['pt_hw_seq_len'] = 14 if sin.is_meta else round(sin.asin().item() / slowest * side, 2)
    if prefix:
        channels = next((len(v) for k, v in state_dict.items() if k == 'simfp_4.0.weight'), 256)
        return _PYRAMID, {'net': dict(config, last_layer_process='add', if_divide_out=True), 'out_channels': channels}
    if not dense:
        return 'VisionMamba', config
    if 'norm_f.weight' not in sd:
        return 'VisionMambaDet', dict(config, last_layer_process='add')
    depth = config['depth']
    config.update(
        out_indices=[depth * k // 4 - 1 for k in range(1, 5)], use_residual_as_feature=rope,
        last_layer_process='add' if rope else 'none', if_fpn='fpn1.0.weight' in sd)
    return 'VisionMambaSeg', config


def _assumed_stride(config: Mapping[str, Any]) -> str:
    """Say which stride was taken, unless the official constructor's own size and stride fit."""
    net = config.get('net', config)
    size, patch, stride = (net[key] for key in ('img_size', 'patch_size', 'stride'))
    told = net['if_abs_pos_embed'] or net['if_rope']
    if told and size == 224 and stride == patch:
        return ''
    side = (size - patch) // stride + 1
    known = f'{side} x {side} patches' if told else 'no number of patches'
    return (f'Keys and shapes tell {known} of {patch} pixels, and not the stride between them: assumed are stride '
            f'{stride} and img_size {size}.')


OFFICIAL = Official(
    classes=('VisionMamba', _PYRAMID, 'VisionMambaDet', 'VisionMambaSeg'),
    keys=_key_table,
    build=_build_official,
    infer=_infer_official,
    derived=_rope_tables,
    assumed=_assumed_stride,
)


def _fit_pos_embed(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Resample the position embedding of a checkpoint to the grid of the model."""
    table = state_dict.get('pos_embed')
    if table is None or model.pos_embed is None or table.shape == model.pos_embed.shape:
        return state_dict
    num_patches = table.shape[1] - model.num_prefix_tokens
    source = getattr(model, 'pretrained_model_args', {}).get('img_size')
    if source is None:
        source = getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))[-2:]
    grid = model.patch_embed.dynamic_feat_size(to_2tuple(source))
    if grid[0] * grid[1] != num_patches:
        grid = (round(num_patches ** 0.5),) * 2
    if grid[0] * grid[1] != num_patches or table.shape[-1] != model.embed_dim:
        return state_dict  # left as it is, so that the check of all shapes reports it
    resized = resize_pos_embed(table, grid, model.patch_embed.grid_size, model.class_token)
    return {**state_dict, 'pos_embed': resized}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, or one of ours, into a state dict for `model`.

    Args:
        state_dict: A state dict or a training checkpoint around one.
        model: A `Vim`.

    Returns:
        Our keys, with the position embedding resampled to the grid of the model.
    """
    return filter_official(state_dict, model, OFFICIAL, _fit_pos_embed)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    if 'hf_hub_id' in kwargs:
        kwargs['url'] = f"https://huggingface.co/{kwargs['hf_hub_id']}/resolve/main/{kwargs['hf_hub_filename']}"
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        'origin_url': 'https://github.com/hustvl/Vim',
        'paper_name': 'Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model',
        'paper_ids': 'arXiv:2401.09417',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'vim_tiny.in1k': _cfg(
        hf_hub_id='hustvl/Vim-tiny-midclstok', hf_hub_filename='vim_t_midclstok_76p1acc.pth'),
    'vim_tiny_stride8.ft_in1k': _cfg(
        hf_hub_id='hustvl/Vim-tiny-midclstok', hf_hub_filename='vim_t_midclstok_ft_78p3acc.pth'),
    'vim_small.in1k': _cfg(
        hf_hub_id='hustvl/Vim-small-midclstok', hf_hub_filename='vim_s_midclstok_80p5acc.pth'),
    'vim_small_stride8.ft_in1k': _cfg(
        hf_hub_id='hustvl/Vim-small-midclstok', hf_hub_filename='vim_s_midclstok_ft_81p6acc.pth'),
    'vim_base.in1k': _cfg(
        hf_hub_id='hustvl/Vim-base-midclstok', hf_hub_filename='vim_b_midclstok_81p9acc.pth'),
    'vim_tiny_rope.preview_in1k': _cfg(
        hf_hub_id='hustvl/Vim-tiny', hf_hub_filename='vim_tiny_73p1.pth'),
    'vim_pico': _cfg(input_size=(3, 32, 32), crop_pct=1.0, description='A small model without weights, for tests.'),
})

# What the authors state for each file of weights, in per cent.
official_results = {
    'vim_tiny.in1k': {'top1': 76.1, 'top5': 93.0},
    'vim_tiny_stride8.ft_in1k': {'top1': 78.3, 'top5': 94.2},
    'vim_small.in1k': {'top1': 80.5, 'top5': 95.1},
    'vim_small_stride8.ft_in1k': {'top1': 81.6, 'top5': 95.4},
    'vim_base.in1k': {'top1': 81.9, 'top5': 95.8},
    'vim_tiny_rope.preview_in1k': {'top1': 73.1, 'top5': 91.1},
}


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> Vim:
    depth = kwargs.get('depth', 24)
    return build_model(Vim, variant, pretrained, checkpoint_filter_fn, _even_taps(depth), **kwargs)


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti: 7.1M parameters, 196 patches, 76.1 % on ImageNet-1K."""
    return _create_vim('vim_tiny', pretrained, **dict({'embed_dim': 192}, **kwargs))


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S: 25.8M parameters, 196 patches, 80.5 % on ImageNet-1K."""
    return _create_vim('vim_small', pretrained, **dict({'embed_dim': 384}, **kwargs))


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B: 97.6M parameters, 196 patches, 81.9 % on ImageNet-1K."""
    return _create_vim('vim_base', pretrained, **dict({'embed_dim': 768}, **kwargs))


@register_model
def vim_tiny_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+: overlapping patches of stride 8, 729 of them, 78.3 % on ImageNet-1K."""
    return _create_vim('vim_tiny_stride8', pretrained, **dict({'embed_dim': 192, 'stride': 8}, **kwargs))


@register_model
def vim_small_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+: overlapping patches of stride 8, 729 of them, 81.6 % on ImageNet-1K."""
    return _create_vim('vim_small_stride8', pretrained, **dict({'embed_dim': 384, 'stride': 8}, **kwargs))


@register_model
def vim_tiny_rope(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti of January 2024: class token first, rotary embedding of both streams, undivided sum; 73.1 %."""
    model_args = {'embed_dim': 192, 'class_token': 'head', 'rope': 'both', 'divide_output': False}
    return _create_vim('vim_tiny_rope', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_pico(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A weightless Vim for tests and demonstrations: 32 x 32 images, 49 overlapping patches, quick on a CPU."""
    model_args = {'img_size': 32, 'patch_size': 6, 'stride': 4, 'embed_dim': 96, 'depth': 4, 'd_state': 8}
    return _create_vim('vim_pico', pretrained, **dict(model_args, **kwargs))
