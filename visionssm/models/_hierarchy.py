"""What hierarchical backbones share: stages, timm's model contract, and the list of maps for dense prediction.

Maps are channels-last, (B, H, W, C), from the stem to the head: LayerNorm and Linear are natural there, and a
convolution sees the same memory as a channels-last image.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, List, Optional, Tuple, Union

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import nn

from visionssm.layers import default_norm
from visionssm.layers.pieces import count_pieces, in_pieces

from ._builder import load_official_keys

__all__ = ['DenseBackbone', 'Hierarchy', 'Stage', 'reset_tree', 'stage_drop_path_rates']

_STATE_PARAMETERS = ('A_log', 'D', 'dt_bias')
# What the images of a piece may have: the largest maps inside have about six times the numbers of the input, and
# blocks of memory above 32 MB are given back to the system, and taken from it anew, by each use.
_WIDEST, _MOST = 6, 1 << 22


def stage_drop_path_rates(drop_path_rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the stochastic depth rate of every block, one list a stage: linear from 0 to `drop_path_rate`."""
    if not 0. <= drop_path_rate < 1.:
        raise ValueError(f'drop_path_rate is {drop_path_rate}; it must be at least 0 and below 1.')
    if not depths or min(depths) < 1:
        raise ValueError(f'depths are {list(depths)}; every stage needs at least one block.')
    return calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)


def reset_tree(module: nn.Module) -> None:
    """Draw all weights below `module` anew, inner modules first, so that an outer one has the last word."""
    for child in reversed(list(module.modules())):
        if hasattr(child, 'reset_parameters'):
            child.reset_parameters()


class Stage(nn.Module):
    """A downsampling layer, blocks, and possibly a closing normalisation: (B, H, W, C_in) to (B, H', W', C)."""

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], norm: Optional[nn.Module] = None) -> None:
        """Assemble the stage.

        Args:
            downsample: Maps the output of the stage before; an identity in the first stage.
            blocks: Each maps (B, H, W, C) to itself.
            norm: Normalisation behind the last block, on the main path.
        """
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C_in) to (B, H', W', C); in inference on a CPU large maps a few images at a time."""
        if not torch.jit.is_scripting():
            pieces = self._pieces(x)
            if pieces > 1:
                return self._by_pieces(x, pieces)
        return self._whole(x)

    @torch.jit.unused
    def _pieces(self, x: torch.Tensor) -> int:
        pieces = count_pieces(x, _WIDEST * x.numel(), _MOST, self)
        return pieces if pieces == 1 else min(len(x), pieces)

    @torch.jit.unused
    def _by_pieces(self, x: torch.Tensor, pieces: int) -> torch.Tensor:
        return in_pieces(self._whole, x, pieces)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return self.norm(x)


class Hierarchy(nn.Module):
    """A stem, stages of shrinking maps, a normalisation and a pooled classifier, with timm's model contract.

    A family's class builds its parts and hands them over; its file may define `OFFICIAL`, and official keys then load.
    """

    output_fmt: Final[str] = 'NHWC'
    official_class: str = ''
    dense_class: str = ''
    """Name of the official class for dense prediction, when the official code has one."""
    linear_std: float | None = 0.02
    """Deviation of the linear weights that `init_weights` draws (with zero biases); PyTorch's own values when None."""

    def __init__(
            self,
            stem: nn.Module,
            stages: Iterable[nn.Module],
            dims: Sequence[int],
            in_chans: int,
            num_classes: int,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            norm: Optional[nn.Module] = None,
            head: Optional[nn.Module] = None,
            reductions: Optional[Sequence[int]] = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Assemble the model.

        Args:
            stem: Maps images (B, in_chans, H, W) to (B, H / 4, W / 4, C).
            stages: Modules with the attributes of `Stage`.
            dims: Channels of each stage.
            in_chans: Channels of the images.
            num_classes: Classes; 0 for no classifier.
            global_pool: Pooling of timm's `SelectAdaptivePool2d`; '' for none.
            drop_rate: Dropout in front of the classifier.
            norm: Normalisation behind the last stage; none when None.
            head: Replaces the pooled linear classifier; needs `fc`, `reset(num_classes, pool_type)` and
                `forward(x, pre_logits)`.
            reductions: Stride of each stage's map; 4, 8, 16, ... when None.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        super().__init__()
        for name, value, least in (('in_chans', in_chans, 1), ('num_classes', num_classes, 0)):
            if value < least:
                raise ValueError(f'{name} is {value}; at least {least} is needed.')
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.dims = tuple(dims)
        self.num_features = dims[-1]
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm = nn.Identity() if norm is None else norm
        self.head = head if head is not None else ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt='NHWC', device=device,
            dtype=dtype)
        self.head_hidden_size = self.head.num_features
        reductions = reductions or [4 << i for i in range(len(dims))]
        self.feature_info = [
            {'module': f'stages.{i}', 'num_chs': dim, 'reduction': reduction}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))]

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights.

        Args:
            needs_reset: Draw also what the sub-modules drew when they were built; needed after `to_empty()`.
        """
        if needs_reset:
            reset_tree(self)
        if self.linear_std is None:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=self.linear_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        official = getattr(sys.modules[type(self).__module__], 'OFFICIAL', None)
        if official is not None:
            load_official_keys(state_dict, prefix, self, official)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that training should not decay: those of the state."""
        return {name for name, _ in self.named_parameters() if name.rpartition('.')[2] in _STATE_PARAMETERS}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that sort parameters into layers."""
        return {
            'stem': r'^stem',
            'blocks': r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)\.', (99999,)),  # timm's number for what belongs to the layer before
                (r'^norm', (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing what they compute."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 for no classifier.
            global_pool: Pooling; None keeps it.
        """
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head.to(**get_device_dtype(self))  # an empty head does not know where the next classifier belongs
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Return the output of chosen stages.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: The last n stages if an int, all if None, else the stages.
            norm: Apply the final normalisation to the last stage's map.
            stop_early: Leave out the stages behind the last tap.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: Leave out the final features.

        Returns:
            The maps, or (final features, maps).
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt is {output_fmt!r}; allowed are 'NCHW' and 'NHWC'.")
        taps: List[torch.Tensor] = []
        last = len(self.feature_info) - 1
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice a ModuleList
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        at = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            at = i
            if i in take_indices:
                tap = self.norm(x) if norm and i == last else x
                taps.append(tap.permute(0, 3, 1, 2) if output_fmt == 'NCHW' else tap)
        if intermediates_only:
            return taps
        if at == last:
            x = self.norm(x)
        return x, taps

    @torch.jit.ignore
    def tap_norm(self) -> Optional[Callable[..., nn.Module]]:
        """Return what makes the norm that dense prediction puts behind each tap; None where it puts none."""
        return default_norm

    @torch.jit.ignore
    def dense(
            self,
            out_indices: Optional[Sequence[int]] = None,
            out_norms: Optional[bool] = None,
            pyramid: Optional[Mapping[str, Any]] = None,
            official_class: Optional[str] = None,
    ) -> 'DenseBackbone':
        """Turn this model into the backbone of a detector or a segmenter; it has no classifier afterwards.

        Args:
            out_indices: Stages to tap; all when None.
            out_norms: Normalise every tap (True) or none (False); as the official dense class does when None.
            pyramid: Not for these models, which have maps of several sizes.
            official_class: Whose key names the weights have; `dense_class` when None.

        Returns:
            A module from images to the list of NCHW maps.
        """
        if pyramid is not None:
            raise ValueError(f'pyramid is {dict(pyramid)}; {type(self).__name__} has maps of several sizes and needs '
                             'none: leave it out.')
        norm = None if out_norms is False else self.tap_norm() or (default_norm if out_norms else None)
        return DenseBackbone(
            self, range(len(self.stages)) if out_indices is None else out_indices,
            None if norm is None else partial(norm, **get_device_dtype(self)),
            self.dense_class if official_class is None else official_class)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the stages behind the last tap.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Remove the final normalisation.
            prune_head: Remove the classifier.

        Returns:
            The indices of the taps.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index + 1 < len(self.stages)
        self.stages = self.stages[:max_index + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()  # made for the last stage alone
        if shortened:
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or shortened:
            self.head = ClassifierHead(self.num_features, 0, pool_type='', input_fmt='NHWC').train(self.training)
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised last map, (B, H / 32, W / 32, C), of images (B, in_chans, H, W)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool a map (B, H, W, C) and classify it.

        Args:
            x: Output of `forward_features`.
            pre_logits: Leave out the classifier.

        Returns:
            (B, num_classes), or (B, C) without the classifier.
        """
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, num_classes) of images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


class DenseBackbone(nn.Module):
    """A hierarchical backbone as dense prediction uses it: images to a list of NCHW maps, without a classifier."""

    def __init__(
            self,
            backbone: Hierarchy,
            out_indices: Sequence[int] = (0, 1, 2, 3),
            norm_layer: Optional[Callable[[int], nn.Module]] = None,
            official_class: str = '',
    ) -> None:
        """Cut off the classifier and normalise the taps.

        Args:
            backbone: The backbone; its final normalisation and its classifier are removed.
            out_indices: Stages to tap.
            norm_layer: Makes a normalisation over the last axis for the channels of a tap; none when None.
            official_class: Whose key names the weights have.
        """
        super().__init__()
        count = len(backbone.stages)
        wrong = [i for i in out_indices if not -count <= i < count]
        if wrong or not out_indices:
            raise ValueError(f'out_indices are {tuple(out_indices)}; choose among the stages 0 to {count - 1}.')
        self.out_indices: List[int] = sorted({i % count for i in out_indices})
        self.official_class = official_class
        self.feature_info = [backbone.feature_info[i] for i in self.out_indices]
        backbone.prune_intermediate_layers(count, prune_norm=True)  # all stages stay: official weights hold them all
        self.backbone = backbone
        self.out_norms = nn.ModuleList([
            nn.Identity() if norm_layer is None or i not in self.out_indices else norm_layer(dim)
            for i, dim in enumerate(backbone.dims)])

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights; see `Hierarchy.init_weights`."""
        self.backbone.init_weights(needs_reset)
        if needs_reset:
            reset_tree(self.out_norms)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        official = getattr(sys.modules[type(self.backbone).__module__], 'OFFICIAL', None)
        if official is not None and self.official_class:
            load_official_keys(state_dict, prefix, self, official)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Return the maps, each (B, C, H', W'), of images (B, in_chans, H, W)."""
        x = self.backbone.stem(x)
        maps: List[torch.Tensor] = []
        for i, (stage, norm) in enumerate(zip(self.backbone.stages, self.out_norms)):
            x = stage(x)
            if i in self.out_indices:
                maps.append(norm(x).permute(0, 3, 1, 2))
        return maps
