"""The non-causal SSD as batched matrix products in PyTorch, for any device and for export.

Heads of one group share B and C, so a group is one product: its (L, N) matrix against the (L, M / G * P) values of all
its heads. Nothing larger than the inputs is made, and B and C are not repeated. `forward` is made of ATen operations
without loops over positions, so it is also what exported programs contain.
"""
import torch

from .._dispatch import accumulation_dtype
from ..selective_scan_2d.routes import is_traced


def by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, L, M, P) -> (B, G, L, M / G * P); head m is of group m % G."""
    return x.unflatten(2, (-1, groups)).permute(0, 3, 1, 2, 4).flatten(3)


def _by_head(y: torch.Tensor, size: int) -> torch.Tensor:
    """(B, G, ..., M / G * P) -> (B, ..., M, P): the inverse of `by_group`, for (B, G, L, ...) and (B, G, N, ...)."""
    return y.unflatten(3, (-1, size)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _weights(dt: torch.Tensor, A: torch.Tensor, positive: bool) -> torch.Tensor:
    return dt * (-A if positive else A)


def forward(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        positive: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes all positions; see `reference`."""
    dtype = accumulation_dtype(x)
    groups, size = B.shape[2], x.shape[3]
    x_, A, B, C = x.to(dtype), A.to(dtype), B.to(dtype).transpose(1, 2), C.to(dtype).transpose(1, 2)
    weighted = by_group(_weights(dt.to(dtype), A, positive)[..., None] * x_, groups)
    state = torch.matmul(B.transpose(2, 3), weighted)  # (B, G, N, M / G * P)
    # Into the memory of what is done with: new memory of this size costs like the product. Graphs write nowhere.
    traced = is_traced(x)
    out = _by_head(torch.matmul(C, state, out=None if traced else weighted), size)
    if D is not None:
        out = torch.addcmul(out, D.to(dtype)[:, None], x_, out=None if traced else out)
    return out.to(x.dtype).contiguous(), _by_head(state, size).transpose(1, 2).contiguous()


def backward(
        dout: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        state: torch.Tensor,
        positive: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients; see `reference`."""
    dtype = accumulation_dtype(x)
    groups, size = B.shape[2], x.shape[3]
    x, dt, dy = (t.to(dtype) for t in (x, dt, dout))
    B, C = (t.to(dtype).transpose(1, 2) for t in (B, C))  # (B, G, L, N)
    weights = _weights(dt, A, positive)[..., None]
    state = by_group(state.transpose(1, 2), groups)  # (B, G, N, M / G * P)
    dy_, weighted = by_group(dy, groups), by_group(weights * x, groups)
    dstate = torch.matmul(C.transpose(2, 3), dy_)
    dC = torch.matmul(dy_, state.transpose(2, 3))
    dB = torch.matmul(weighted, dstate.transpose(2, 3))
    dweighted = _by_head(torch.matmul(B, dstate), size)
    dx = dweighted * weights
    if D is not None:
        dx = dx.addcmul_(D[:, None], dy)
    dweights = (dweighted * x).sum(3)
    drate = (dweights * dt).sum((0, 1))
    return (dx, _weights(dweights, A, positive), -drate if positive else drate, dB.transpose(1, 2),
            dC.transpose(1, 2), None if D is None else (dy * x).sum(3).sum((0, 1)))
