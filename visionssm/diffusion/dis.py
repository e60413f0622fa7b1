"""DiS: a diffusion model whose backbone is a bidirectional Mamba

Patches, the time step and the class are tokens of one sequence, which is scanned in both directions; long skip
connections lead from the first half of the blocks to the second one.

Paper: `Scalable Diffusion Models with State Space Backbone`
    - https://arxiv.org/abs/2402.05608
Code: https://github.com/feizc/DiS (CC BY-NC 4.0)

Written anew from the published equations; state dicts of the official code load. No weights have been published.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import RmsNorm, calculate_drop_path_rates
from timm.models import checkpoint, generate_default_cfgs
from torch import nn

from visionssm.layers import BiMamba
from visionssm.layers.bimamba_official import bimamba_keys
from visionssm.models._builder import build_task_model, filter_official, load_official_keys
from visionssm.models._hierarchy import reset_tree
from visionssm.models._official import Official, take_known
from visionssm.models._tasks import register_task_model
from visionssm.models.vim import VimBlock

__all__ = ['DiS']

MAX_PERIOD = 10000


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Return cosines and sines of time steps, (B, dim) in float32.

    Args:
        t: Time steps, (B,), of any type; fractions are allowed.
        dim: Channels; the last one is zero where their number is odd.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class FinalLayer(nn.Module):
    """Normalisation, scale and shift by the condition where there is one, and the projection to a patch's pixels."""

    def __init__(self, dim: int, out_dim: int, conditional: bool, **dd: Any) -> None:
        """Build the layer for `dim` channels and `out_dim` values a patch."""
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **dd)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, **dd)) if conditional else None
        self.linear = nn.Linear(dim, out_dim, **dd)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Project tokens (B, L, C) under conditions (B, C)."""
        x = self.norm(x)
        if self.modulation is not None:
            shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        return self.linear(x)


class DiS(nn.Module):
    """DiS: noisy images, time steps and classes to the noise, and to where the variance lies between its bounds."""

    official_class = 'DisModel'

    def __init__(
            self,
            img_size: int = 32,
            patch_size: int = 2,
            in_chans: int = 4,
            num_classes: int = 1000,
            embed_dim: int = 768,
            depth: int = 24,
            d_state: int = 16,
            learn_sigma: bool = True,
            class_dropout_prob: float = 0.1,
            drop_path_rate: float = 0.1,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the network.

        Args:
            img_size: Side of the images, or of their latents.
            patch_size: Side of a patch.
            in_chans: Channels of the images: 3 for RGB, 4 for latents.
            num_classes: Classes; 0 for none.
            embed_dim: Channels C of a token.
            depth: Blocks without the middle one; half of them stand in front of it.
            d_state: State size of the scan.
            learn_sigma: Return the variance beside the noise.
            class_dropout_prob: How often training hides the class, which guidance needs.
            drop_path_rate: Stochastic depth rate of the last block, linear from 0.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if not isinstance(img_size, int) or img_size < patch_size or img_size % patch_size:
            raise ValueError(f'img_size is {img_size}; it must be one number, a multiple of patch_size, {patch_size}.')
        if depth < 2:
            raise ValueError(f'depth is {depth}; at least one block on either side of the middle, 2, is needed.')
        half = depth // 2
        self.img_size = img_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.out_chans = 2 * in_chans if learn_sigma else in_chans
        self.num_classes = max(num_classes, 0)
        self.learn_sigma = learn_sigma
        self.class_dropout_prob = class_dropout_prob
        self.grad_checkpointing = False
        conditional = self.num_classes > 0
        self.num_extra = 2 if conditional else 1
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, **dd)
        self.time_embed = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim, **dd), nn.SiLU(), nn.Linear(4 * embed_dim, embed_dim, **dd))
        # one row more: the class that stands for none
        self.label_embed = nn.Embedding(self.num_classes + 1, embed_dim, **dd) if conditional else None
        self.pos_embed = nn.Parameter(
            torch.empty(1, self.num_extra + (img_size // patch_size) ** 2, embed_dim, **dd))
        rates = [0., *calculate_drop_path_rates(drop_path_rate, depth)]

        def block(i: int) -> VimBlock:
            mixer = BiMamba(embed_dim, d_state, divide_output=False, **dd)
            return VimBlock(embed_dim, mixer, RmsNorm(embed_dim, eps=1e-5, **dd), rates[i])

        self.in_blocks = nn.ModuleList([block(i) for i in range(half)])
        self.mid_block = block(half)
        self.out_blocks = nn.ModuleList([block(half + 1 + i) for i in range(half)])
        self.skips = nn.ModuleList([nn.Linear(2 * embed_dim, embed_dim, **dd) for _ in range(half)])
        self.drop_path = nn.Identity() if drop_path_rate == 0 else self.out_blocks[-1].drop_path
        self.norm = RmsNorm(embed_dim, eps=1e-5, **dd)
        self.final_layer = FinalLayer(embed_dim, patch_size ** 2 * self.out_chans, conditional, **dd)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights.

        Args:
            needs_reset: Draw also what the sub-modules drew when they were built; needed after `to_empty()`.
        """
        if needs_reset:
            reset_tree(self)
        nn.init.zeros_(self.pos_embed)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        blocks = [*self.in_blocks, self.mid_block, *self.out_blocks]
        for block in blocks:
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
            with torch.no_grad():
                block.mixer.out_proj.weight.div_(math.sqrt(len(blocks) - 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        load_official_keys(state_dict, prefix, self, OFFICIAL)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that training should not decay; the official recipe decays none at all."""
        state = ('A_log', 'D', 'dt_bias')
        return {'pos_embed', *(key for key, _ in self.named_parameters() if key.rpartition('.')[2] in state)}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing what they compute."""
        self.grad_checkpointing = enable

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.num_classes

    def _check(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> None:
        shape = (self.in_chans, self.img_size, self.img_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != shape:
            raise ValueError(f'Expected images or latents of shape (B, {", ".join(map(str, shape))}), got '
                             f'{tuple(x.shape)}; img_size and in_chans are fixed when the model is built.')
        if t.shape != x.shape[:1]:
            raise ValueError(f'Expected one time step an image, ({len(x)},), got {tuple(t.shape)}.')
        if (y is None) != (self.num_classes == 0):
            raise ValueError('This model is unconditional and takes no classes.' if y is not None else
                             f'This model needs classes: 0 to {self.num_classes - 1}, or {self.null_class} for none.')
        if y is not None and y.shape != x.shape[:1]:
            raise ValueError(f'Expected one class an image, ({len(x)},), got {tuple(y.shape)}.')

    def _hide_classes(self, y: torch.Tensor) -> torch.Tensor:
        if not self.training or self.class_dropout_prob == 0:
            return y
        return torch.where(torch.rand(y.shape, device=y.device) < self.class_dropout_prob, self.null_class, y)

    def _run(self, block: nn.Module, *streams: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, *streams)
        return block(*streams)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Predict the noise.

        Args:
            x: Noisy images or latents, (B, in_chans, img_size, img_size).
            t: Time steps, (B,), 0 to 999 in the official process.
            y: Classes, (B,), `null_class` for none; None for a model without classes.

        Returns:
            (B, 2 in_chans, img_size, img_size): the noise, and where the logarithm of the variance lies between its
            bounds, from -1 to 1; the noise alone without `learn_sigma`.
        """
        self._check(x, t, y)
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, L, C)
        time = self.time_embed(timestep_embedding(t, patches.shape[-1]).to(self.pos_embed.dtype))
        extra, condition = [time], time
        if y is not None and self.label_embed is not None:
            label = self.label_embed(self._hide_classes(y))
            extra, condition = [label, time], time + label
        x = torch.cat([*(token.unsqueeze(1).to(patches.dtype) for token in extra), patches], dim=1) + self.pos_embed
        residual: torch.Tensor | None = None
        stack = []
        for block in self.in_blocks:
            x, residual = self._run(block, x, residual)
            stack.append(x)
        x, residual = self._run(self.mid_block, x, residual)
        for block, skip in zip(self.out_blocks, self.skips):
            x, residual = self._run(block, skip(torch.cat([x, stack.pop()], dim=-1)), residual)
        x = self.norm(residual + self.drop_path(x))
        return self._to_image(self.final_layer(x, condition)[:, self.num_extra:])

    def _to_image(self, tokens: torch.Tensor) -> torch.Tensor:
        """Lay out (B, L, P * P * channels), channels fastest, as images."""
        side, patch = self.img_size // self.patch_size, self.patch_size
        x = tokens.view(tokens.shape[0], side, side, patch, patch, self.out_chans).permute(0, 5, 1, 3, 2, 4)
        return x.flatten(4, 5).flatten(2, 3)

    def forward_with_cfg(
            self,
            x: torch.Tensor,
            t: torch.Tensor,
            y: torch.Tensor | None = None,
            cfg_scale: float = 1.5,
            guided_channels: int = 3,
    ) -> torch.Tensor:
        """Predict with guidance by the class: unconditional + scale * (conditional - unconditional).

        Args:
            x: Noisy images, (2 B, ...), of which the first half is read.
            t: Time steps, (2 B,).
            y: Classes of the first half, `null_class` in the second one; None for a model without classes, which
                guidance does not change.
            cfg_scale: Strength; 1 is no guidance.
            guided_channels: The first channels of the noise are guided, the rest stays as each half has it. The
                official code guides three, whatever the number of channels.

        Returns:
            As `forward`, the guided channels alike in both halves.
        """
        if len(x) % 2:
            raise ValueError(f'Guidance takes a batch of two halves, got {len(x)} images.')
        out = self(torch.cat([x[:len(x) // 2]] * 2), t, y)
        noise, rest = out[:, :guided_channels], out[:, guided_channels:]
        conditional, unconditional = noise.chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def _key_table(official_class: str) -> tuple[tuple[str, str], ...]:
    """Return the rows (official key, our key)."""
    rows = [row for name in ('in_blocks.{}', 'out_blocks.{}', 'mid_block')
            for row in bimamba_keys(f'{name}.mixer.', f'{name}.mixer.')]
    return (
        *rows,
        ('patch_embed.proj.{}', 'patch_embed.{}'),
        ('label_emb.embedding_table.weight', 'label_embed.weight'),
        ('out_blocks.{}.skip_linear.{}', 'skips.{}.{}'),
        ('norm_f.weight', 'norm.weight'),
        ('final_layer.adaLN_modulation.1.{}', 'final_layer.modulation.1.{}'),
    )


_DEFAULTS = {
    'img_size': 224, 'patch_size': 16, 'embed_dim': 192, 'channels': 3, 'depth': 24, 'num_classes': -1,
    'learn_sigma': True, 'class_dropout_prob': 0.1, 'drop_path_rate': 0.1}
_NO_EFFECT = frozenset(('conv', 'drop_rate', 'if_cls_token', 'ssm_cfg', 'norm_epsilon', 'rms_norm', 'fused_add_norm',
                        'residual_in_fp32', 'bimamba_type', 'initializer_cfg', 'mixed_precision'))


def _build_official(official_class: str, config: Mapping[str, Any]) -> DiS:
    """Build our model from the keyword arguments of the official constructor."""
    if not config.get('skip', True):
        raise ValueError('skip is False; the official code builds such a model and cannot run it.')
    o = take_known('DiS', {key: value for key, value in config.items() if key != 'skip'}, _DEFAULTS, _NO_EFFECT)
    return DiS(
        o['img_size'], o['patch_size'], o['channels'], o['num_classes'], o['embed_dim'], o['depth'],
        learn_sigma=o['learn_sigma'], class_dropout_prob=o['class_dropout_prob'], drop_path_rate=o['drop_path_rate'])


def _infer_official(state_dict: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer the official arguments from keys and shapes."""
    sd = state_dict
    if 'patch_embed.proj.weight' not in sd or 'mid_block.mixer.A_b_log' not in sd:
        raise ValueError('These are not the keys of an official DiS state dict (no mid_block.mixer.A_b_log); the first '
                         f'ones are {sorted(sd)[:5]}.')
    embed_dim, channels, patch_size, _ = sd['patch_embed.proj.weight'].shape
    labels = sd.get('label_emb.embedding_table.weight')
    rows = sd['pos_embed'].shape[1] - (1 if labels is None else 2)
    return 'DisModel', {
        'img_size': round(rows ** 0.5) * patch_size, 'patch_size': patch_size, 'channels': channels,
        'embed_dim': embed_dim, 'num_classes': -1 if labels is None else len(labels) - 1,
        'depth': 2 * len({key.split('.')[1] for key in sd if key.startswith('in_blocks.')}),
        'learn_sigma': len(sd['final_layer.linear.weight']) == 2 * channels * patch_size ** 2}


OFFICIAL = Official(classes=('DisModel',), keys=_key_table, build=_build_official, infer=_infer_official)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Turn an official checkpoint, or one of ours, into a state dict for `model`.

    Args:
        state_dict: A state dict or a training checkpoint around one, whose averaged weights are taken.
        model: A `DiS`.

    Returns:
        Our keys.
    """
    return filter_official(state_dict, model, OFFICIAL)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': -1,  # timm then hands none to the network
        'input_size': (4, 32, 32),
        'mean': (0.5, 0.5, 0.5),
        'std': (0.5, 0.5, 0.5),
        'first_conv': None,
        'classifier': None,
        'license': 'cc-by-nc-4.0',
        'origin_url': 'https://github.com/feizc/DiS',
        'paper_name': 'Scalable Diffusion Models with State Space Backbone',
        'paper_ids': 'arXiv:2402.05608',
        'description': 'none have been published',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    **{f'dis_{size}_patch{patch}': _cfg() for size in ('small', 'base', 'medium', 'large', 'huge') for patch in (2, 4)},
    'dis_pico': _cfg(input_size=(1, 28, 28), description='A small model without weights, for tests.'),
})


def _create_dis(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> DiS:
    return build_task_model(
        DiS, variant, default_cfgs, checkpoint_filter_fn, pretrained, **dict(model_args, **kwargs))


@register_task_model('diffusion')
def dis_small_patch2(pretrained: bool = False, **kwargs: Any) -> DiS:
    """DiS-S/2: about 28.4M parameters without classes; 32 x 32 latents and 1000 classes unless told otherwise."""
    return _create_dis('dis_small_patch2', pretrained, kwargs, embed_dim=368, depth=24, patch_size=2)


@register_task_model('diffusion')
def dis_small_patch4(pretrained: bool = False, **kwargs: Any) -> DiS:
    """DiS-S/4: about 28.4M parameters without classes; 32 x 32 latents and 1000 classes unless told otherwise."""
    return _create_dis('dis_small_patch4', pretrained, kwargs, embed_dim=368, depth=24, patch_size=4)


@register_task_model('diffusion')
def dis_base_patch2(pretrained: bool = False, **kwargs: Any) -> DiS:
    """DiS-B/2: about 119.2M parameters without classes; 32 x 32 latents and 1000 classes unless told otherwise."""
    return _create_dis('dis_base_patch2', pretrained, kwargs, embed_dim=768, depth=24, patch_size=2)


@register_task_model('diffusion')
def dis_base_patch4(pretrained: bool = False, **kwargs: Any) -> DiS:
    """DiS-B/4: about 119.2M parameters without classes; 32 x 32 latents and 1000 classes unless told otherwise."""
    return _create_dis('dis_base_patch4', pretrained, kwargs, embed_dim=768, depth=24, patch_size=4)


@register_task_model('diffusion')
def dis_medium_patch2(pretrained: bool = False, **kwargs: Any) -> DiS:
    """DiS-M/2: about 229.5M parameters without classes; 32 x 32 latents and 1000 classes unless told otherwise."""
    return _create_dis('dis_medium_patch2', pretrained, kwargs, embed_dim=768, depth=48, patch_size=2)


@register_task_model('diffusion')
def dis_medium_patch4(pretrained: bool = False, **kwargs: Any) -> DiS:
    """DiS-M/4: about 229.5M parameters without classes; 32 x 32 latents and 1000 classes unless told otherwise."""
    return _create_dis('dis_medium_patch4', pretrained, kwargs, embed_dim=768, depth=48, patch_size=4)


@register_task_model('diffusion')
def dis_large_patch2(pretrained: bool = False, **kwargs: Any) -> DiS:
    """DiS-L/2: about 404.1M parameters without classes; 32 x 32 latents and 1000 classes unless told otherwise."""
    return _create_dis('dis_large_patch2', pretrained, kwargs, embed_dim=1024, depth=48, patch_size=2)


@register_task_model('diffusion')
def dis_large_patch4(pretrained: bool = False, **kwargs: Any) -> DiS:
    """DiS-L/4: about 404.1M parameters without classes; 32 x 32 latents and 1000 classes unless told otherwise."""
    return _create_dis('dis_large_patch4', pretrained, kwargs, embed_dim=1024, depth=48, patch_size=4)


@register_task_model('diffusion')
def dis_huge_patch2(pretrained: bool = False, **kwargs: Any) -> DiS:
    """DiS-H/2: about 900.7M parameters without classes; 32 x 32 latents and 1000 classes unless told otherwise."""
    return _create_dis('dis_huge_patch2', pretrained, kwargs, embed_dim=1536, depth=48, patch_size=2)


@register_task_model('diffusion')
def dis_huge_patch4(pretrained: bool = False, **kwargs: Any) -> DiS:
    """DiS-H/4: about 900.7M parameters without classes; 32 x 32 latents and 1000 classes unless told otherwise."""
    return _create_dis('dis_huge_patch4', pretrained, kwargs, embed_dim=1536, depth=48, patch_size=4)


@register_task_model('diffusion')
def dis_pico(pretrained: bool = False, **kwargs: Any) -> DiS:
    """A weightless model for tests and first steps: 28 x 28 gray pictures of ten classes, quick on a CPU."""
    return _create_dis(
        'dis_pico', pretrained, kwargs, img_size=28, embed_dim=96, depth=4, patch_size=2, num_classes=10)
