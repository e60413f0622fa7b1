"""MambaIRv2's layer: window attention, and a scan in the order of what pixels show."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import nn

from visionssm.layers import RoutedSSM, default_norm, negative_exp
from visionssm.layers.precision import WideLayerNorm, widen
from visionssm.layers.routed_ssm import route_projections
from visionssm.utils.suggest import check_choice

from .heads import MapConv

__all__ = ['AttentiveLayer', 'AttentiveSSM']

NOISES = ('never', 'train', 'always')


def gumbel_like(x: torch.Tensor) -> torch.Tensor:
    """Draw Gumbel noise: the largest of logits with such noise is a sample of their distribution."""
    return -torch.empty_like(x).exponential_().log()


class PromptedSSM(RoutedSSM):
    """A selective scan along one sequence whose output matrix is C(u) plus a prompt.

    delta, B and C depend on the input as in `RoutedSSM`; s_t = exp(delta_t A) s_{t-1} + delta_t u_t B_t;
    y_t = <s_t, C_t + prompt_t> + D u_t.
    """

    def __init__(
            self,
            dim: int,
            d_state: int,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the parameters.

        Args:
            dim: Channels D.
            d_state: State size N.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        super().__init__(dim, d_state, routes='raster', wide=True, device=device, dtype=dtype)

    def forward(self, u: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """Scan a sequence.

        Args:
            u: (B, D, L).
            prompt: (B, N, L); zero when None.

        Returns:
            (B, D, L), in at least float32.
        """
        dt, B, C = route_projections(u.unsqueeze(2), self.x_proj).squeeze(1).split(
            [self.dt_rank, self.d_state, self.d_state], dim=1)
        return torch.ops.visionssm.selective_scan(
            widen(u), torch.matmul(self.dt_proj[0], dt), negative_exp(self.A_log), B,
            C if prompt is None else C + prompt, self.D, None,
            self.dt_bias.flatten(), True)


class AttentiveSSM(nn.Module):
    """A scan in the order of what pixels show.

    A router gives every pixel one of T kinds, each with a prompt of its own. The pixels are scanned kind after kind,
    and what a pixel computes goes back to its place. As in the official code, place l of the sequence takes the prompt
    of the image's l-th pixel, not that of the pixel that stands there.
    """

    def __init__(
            self,
            dim: int,
            d_state: int,
            expand: float = 2.,
            num_tokens: int = 64,
            inner_rank: int = 32,
            route_noise: str = 'train',
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the mixer.

        Args:
            dim: Channels C.
            d_state: State size N.
            expand: Inner channels D over C.
            num_tokens: Kinds T.
            inner_rank: Rank of the table of prompts.
            route_noise: When the choice of a kind is a sample: 'never', in 'train'ing, or 'always'.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        check_choice('route_noise', route_noise, NOISES)
        inner = int(expand * dim)
        self.route_noise = route_noise
        self.in_proj = MapConv(dim, inner, 1, **dd)
        self.cpe = MapConv(inner, inner, 3, padding=1, groups=inner, **dd)
        self.route = nn.Sequential(nn.Linear(dim, dim // 3, **dd), nn.GELU(), nn.Linear(dim // 3, num_tokens, **dd))
        self.kinds = nn.Parameter(torch.empty(num_tokens, inner_rank, **dd))
        self.prompts = nn.Parameter(torch.empty(inner_rank, d_state, **dd))
        self.ssm = PromptedSSM(inner, d_state, **dd)
        self.out_norm = WideLayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the two factors of the table of prompts."""
        for table in (self.kinds, self.prompts):
            nn.init.uniform_(table, -1 / len(table), 1 / len(table))

    def choose(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return the choice of every pixel, (B, L, T): zeros and a one, with the gradient of the probabilities.

        Args:
            x: Pixels, (B, L, C).
            noise: Gumbel noise, (B, L, T); drawn where `route_noise` says so when None.
        """
        logits = widen(self.route(x)).log_softmax(-1)
        if noise is None and (self.route_noise == 'always' or self.route_noise == 'train' and self.training):
            noise = gumbel_like(logits)
        soft = (logits if noise is None else logits + noise).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
        return hard - soft.detach() + soft

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Mix a map.

        Args:
            x: Map, (B, H, W, C).
            noise: See `choose`.

        Returns:
            (B, H, W, C).
        """
        size = x.shape[1:3]
        policy = self.choose(x.flatten(1, 2), noise)
        prompt = (policy.to(x.dtype) @ (self.kinds @ self.prompts)).transpose(1, 2)  # (B, N, L)
        order = policy.argmax(-1).sort(dim=-1, stable=True).indices
        u = self.in_proj(x)
        u = (u * self.cpe(u).sigmoid()).flatten(1, 2)
        u = u.gather(1, order.unsqueeze(-1).expand_as(u))
        y = self.ssm(u.transpose(1, 2).contiguous(), prompt).transpose(1, 2)
        y = self.out_proj(self.out_norm(y).to(u.dtype))
        back = order.argsort(dim=-1)
        return y.gather(1, back.unsqueeze(-1).expand_as(y)).unflatten(1, size)


class ConvFFN(nn.Module):
    """fc2(f + gelu(dwconv(f))) with f = gelu(fc1(x)), on maps (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int, kernel_size: int, **dd: Any) -> None:
        """Build the layers."""
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = MapConv(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + F.gelu(self.dwconv(x)))


class GatedFFN(nn.Module):
    """fc2(f1 * dwconv(norm(f2))) with [f1, f2] = gelu(fc1(x)), on maps (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        """Build the layers; `hidden` is even."""
        super().__init__()
        if hidden % 2:
            raise ValueError(f'mlp_ratio gives {hidden} hidden channels; the gate needs an even number.')
        half = hidden // 2
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.norm = default_norm(half, **dd)
        self.dwconv = MapConv(half, half, 5, padding=2, groups=half, **dd)
        self.fc2 = nn.Linear(half, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to itself."""
        x, gate = F.gelu(self.fc1(x)).chunk(2, dim=-1)
        return self.fc2(x * self.dwconv(self.norm(gate)))


def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> torch.Tensor:
    """Return the mask between pixels that a cyclic shift brought into one window: (windows, w^2, w^2), 0 or -100."""
    def regions(size: int) -> torch.Tensor:
        at = torch.arange(size, device=device)
        return (at >= size - window).long() + (at >= size - shift).long()

    region = 3 * regions(height)[:, None] + regions(width)
    region = window_partition(region[None, :, :, None], (window, window)).flatten(1)
    return torch.where(region[:, None] == region[:, :, None], 0., -100.)


class AttentiveLayer(nn.Module):
    """Window attention and an attentive scan, each with an FFN and a scaled skip connection, on maps (B, H, W, C)."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int,
            shift: int,
            d_state: int,
            mlp_ratio: float,
            kernel_size: int | None,
            num_tokens: int,
            inner_rank: int,
            qkv_bias: bool,
            route_noise: str,
            **dd: Any,
    ) -> None:
        """Build the layer; arguments as for `MambaIRv2`, with `kernel_size` None for gated FFNs."""
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'num_heads is {num_heads}; it must divide embed_dim, {dim}.')
        hidden = int(mlp_ratio * dim)

        def ffn() -> nn.Module:
            return GatedFFN(dim, hidden, **dd) if kernel_size is None else ConvFFN(dim, hidden, kernel_size, **dd)

        self.window_size = window_size
        self.shift = shift
        self.norm1 = default_norm(dim, **dd)
        self.attn = WindowAttention(dim, num_heads, window_size=window_size, qkv_bias=qkv_bias, **dd)
        self.norm2 = default_norm(dim, **dd)
        self.ffn1 = ffn()
        self.norm3 = default_norm(dim, **dd)
        self.mixer = AttentiveSSM(dim, d_state, mlp_ratio, num_tokens, inner_rank, route_noise, **dd)
        self.norm4 = default_norm(dim, **dd)
        self.ffn2 = ffn()
        self.scale1 = nn.Parameter(torch.empty(dim, **dd))
        self.scale2 = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the factors of the skip connections to 1e-4."""
        nn.init.constant_(self.scale1, 1e-4)
        nn.init.constant_(self.scale2, 1e-4)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        window = (self.window_size, self.window_size)
        mask = None
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
            mask = shift_mask(height, width, self.window_size, self.shift, x.device).to(x.dtype)
        x = self.attn(window_partition(x.contiguous(), window).flatten(1, 2), mask).unflatten(1, window)
        x = window_reverse(x, window, height, width)
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, H, W, C) to itself; `noise` as in `AttentiveSSM.choose`."""
        y = self._attend(self.norm1(x)) + x
        x = self.scale1 * x + self.ffn1(self.norm2(y)) + y
        y = self.mixer(self.norm3(x), noise) + x
        return self.scale2 * x + self.ffn2(self.norm4(y)) + y
