"""Multi-head scan: sub-spaces of the channels, each read along its own routes, fused by how much these disagree."""

from typing import Any, Final, List

import torch
import torch.nn.functional as F
from timm.layers import get_act_layer, register_notrace_function
from torch import nn

from .precision import WideLayerNorm, widen
from .routed_ssm import RoutedSSM, scan_routes

__all__ = ['GatedMultiHeadScan', 'MultiHeadScan', 'scan_route_attention']


def scan_route_attention(y: torch.Tensor, threshold: float) -> torch.Tensor:
    """Sum the routes of every head where they differ enough, element by element.

    out = (sum_k y_k) relu(std_k(y) / (mean_k(y - min_k(y)) + 1e-5) - threshold), std with the divisor K - 1.

    Args:
        y: What each route of each head gives on each pixel, (B, M, K, D, H, W).
        threshold: Coefficient of variation below which an element is left out.

    Returns:
        (B, M, D, H, W), in at least float32, because coefficients of half-precision numbers would be noise.

    Note:
        Where all routes agree, the deviation is zero, and its gradient is taken as zero, as `torch.std` does.
    """
    y = widen(y)
    spread = (y - y.amin(2, keepdim=True)).mean(2)
    # torch.std computes the same, over a strided axis ten times slower on a CPU
    variance = (y - y.mean(2, keepdim=True)).square().sum(2) / (y.shape[2] - 1)
    differs = variance > 0
    deviation = torch.where(differs, variance, 1.).sqrt() * differs
    return y.sum(2) * F.relu(deviation / (spread + 1e-5) - threshold)


@register_notrace_function
def scan_heads(
        u: torch.Tensor,
        x_proj: torch.Tensor,
        dt_proj: torch.Tensor,
        dt_bias: torch.Tensor,
        A_log: torch.Tensor,
        D: torch.Tensor,
        routes: str,
) -> torch.Tensor:
    """Scan one map a route, (B, K, D, H, W), to the same; parameters as in `RoutedSSM`."""
    # The result stays wide, because sums over routes can leave the range of float16.
    return scan_routes(u, x_proj, dt_proj, dt_bias, A_log, D, routes, 'none', True)


class MultiHeadScan(nn.Module):
    """Project to M sub-spaces, scan each along two paths from both ends, fuse the routes, join the sub-spaces.

    s = proj(x) is cut into M heads; y_k are the outputs of a head's four scans; z = scan_route_attention(y);
    out = out_proj(cat_norm(concat z)). The heads' paths are, in this order: snakes, zigzags, spirals, lines.
    """

    num_heads: Final[int]
    head_dim: Final[int]
    threshold: Final[float]
    routes: Final[str]

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            num_heads: int = 4,
            project_out: bool = True,
            threshold: float = 0.4,
            dt_rank: int | None = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the projections and the state parameters.

        Args:
            dim: Channels C.
            d_state: State size N.
            num_heads: Heads M: 3, or 4 for the lines too. Each gets D = C // M channels.
            project_out: Normalise the joined heads and project them to C channels; without, M must divide C.
            threshold: Threshold of `scan_route_attention`.
            dt_rank: Rank of the step projections; ceil(D / 16) when None.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        if num_heads not in (3, 4):
            raise ValueError(f'num_heads is {num_heads}; paths are defined for 3 and 4 heads.')
        head_dim = dim // num_heads
        if head_dim < 1:
            raise ValueError(f'dim is {dim}; {num_heads} heads need at least {num_heads} channels.')
        if not project_out and dim % num_heads:
            raise ValueError(f'dim is {dim}, no multiple of the {num_heads} heads: without project_out every channel '
                             f'must belong to a head. Choose another dim, or project_out=True.')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.threshold = float(threshold)
        self.routes = f'mhs_{num_heads}'
        self.proj = nn.Linear(dim, num_heads * head_dim, bias=False, **dd)
        self.heads = nn.ModuleDict({
            name: RoutedSSM(head_dim, d_state, dt_rank, f'mhs_{name.lower()}', 'none', **dd)
            for name in 'CXSZ'[:num_heads]})
        self.cat_norm = WideLayerNorm(num_heads * head_dim, **dd) if project_out else nn.Identity()
        self.out_proj = nn.Linear(num_heads * head_dim, dim, bias=False, **dd) if project_out else nn.Identity()

    def _scan(self, u: torch.Tensor) -> torch.Tensor:
        """Scan all heads at once, one map a route: (B, 4 M, D, H, W) to the same."""
        x_proj: List[torch.Tensor] = []
        dt_proj: List[torch.Tensor] = []
        dt_bias: List[torch.Tensor] = []
        A_log: List[torch.Tensor] = []
        D: List[torch.Tensor] = []
        for head in self.heads.values():
            x_proj.append(head.x_proj)
            dt_proj.append(head.dt_proj)
            dt_bias.append(head.dt_bias)
            A_log.append(head.A_log)
            D.append(head.D)
        return scan_heads(
            u, torch.cat(x_proj), torch.cat(dt_proj), torch.cat(dt_bias), torch.cat(A_log), torch.cat(D), self.routes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix over a map.

        Args:
            x: Map, (B, C, H, W).

        Returns:
            (B, H, W, C); without `project_out` in at least float32.
        """
        u = torch.matmul(self.proj.weight, x.flatten(2))  # (B, M D, L)
        u = u.view(x.shape[0], self.num_heads, 1, self.head_dim, x.shape[2], x.shape[3])
        y = self._scan(u.expand(-1, -1, 4, -1, -1, -1).flatten(1, 2)).unflatten(1, (self.num_heads, 4))
        y = scan_route_attention(y, self.threshold)
        y = y.flatten(1, 2).permute(0, 2, 3, 1)  # (B, M, D, H, W) -> (B, H, W, M D)
        return self.out_proj(self.cat_norm(y))


class GatedMultiHeadScan(nn.Module):
    """MHS-VM's mixer: projection, depthwise convolution, multi-head scan, normalisation, gate; no projection behind it.

    [u, z] = in_proj(x); out = out_norm(scan(act(conv(u)))) * act(z).
    """

    gated: Final[bool]

    def __init__(
            self,
            dim: int,
            d_state: int = 16,
            num_heads: int = 4,
            project_out: bool = True,
            threshold: float = 0.4,
            gated: bool = True,
            d_conv: int = 3,
            act: str = 'silu',
            drop: float = 0.,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the mixer.

        Args:
            dim: Channels C, inside too.
            d_state: State size N.
            num_heads: As for `MultiHeadScan`.
            project_out: As for `MultiHeadScan`.
            threshold: As for `MultiHeadScan`.
            gated: Use the gate; without it there is no projection either, and the convolution reads x.
            d_conv: Side of the depthwise convolution, odd.
            act: Activation behind the convolution and of the gate.
            drop: Dropout behind the gate.
            device: Where the parameters are created.
            dtype: Type of the parameters.
        """
        if d_conv % 2 == 0:
            raise ValueError(f'd_conv is {d_conv}; an odd side keeps the size of the map.')
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.gated = gated
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False, **dd) if gated else nn.Identity()
        self.conv = nn.Conv2d(dim, dim, d_conv, padding=d_conv // 2, groups=dim, **dd)
        self.act = get_act_layer(act)()
        self.scan = MultiHeadScan(dim, d_state, num_heads, project_out, threshold, **dd)
        self.out_norm = WideLayerNorm(dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix a map.

        Args:
            x: Map, (B, H, W, C).

        Returns:
            (B, H, W, C).
        """
        u = self.in_proj(x)
        z = u
        if self.gated:
            u, z = u.chunk(2, dim=-1)
        # One copy to channel-first here saves strided reads in the convolution, the projections and the scan.
        u = self.act(self.conv(u.permute(0, 3, 1, 2).contiguous()))
        y = self.out_norm(self.scan(u)).to(u.dtype)
        if self.gated:
            y = y * self.act(z)
        return self.drop(y)
