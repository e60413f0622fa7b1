"""The non-causal SSD as batched matrix products in PyTorch, for any device and for export.

Heads of one group share B and C, so a group is one product: its (L, N) matrix against the (L, M / G * P) values of all
its heads. Nothing larger than the inputs is made, and B and C are not repeated. `forward` is made of ATen operations
without loops over positions, so it is also what exported programs contain.
"""
import torch

from .._dispatch import accumulation_dtype
from ..selective_scan_2d.routes import is_traced


def _cast(dtype: torch.dtype, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors]  # `to` takes its time even for nothing


def by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, L, M, P) -> (B * G, L, M / G * P); head m is of group m % G."""
    if groups == 1:
        return x.flatten(2)
    if groups == x.shape[2]:  # fewer steps to the same view
        return x.transpose(1, 2).flatten(0, 1)
    return x.unflatten(2, (-1, groups)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(2)


def _by_head(y: torch.Tensor, groups: int, size: int) -> torch.Tensor:
    """(B * G, L, M / G * P) -> (B, L, M, P): the inverse of `by_group`."""
    if groups == 1:
        return y.unflatten(2, (-1, size))
    y = y.unflatten(0, (-1, groups))
    if y.shape[3] == size:
        return y.transpose(1, 2)
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
    x_, dt, A, B, C = _cast(dtype, x, dt, A, B, C)
    B, C = by_group(B, groups), by_group(C, groups)
    # One map of new memory, which costs like a product, serves weighted inputs, skip and output. Graphs write nowhere.
    space = None if is_traced(x) else torch.empty_like(x_, memory_format=torch.contiguous_format)
    rows = by_group(torch.mul(_weights(dt, A, positive).unsqueeze(3), x_, out=space), groups)
    state = torch.bmm(B.mT, rows)
    if D is None:
        rows = torch.bmm(C, state, out=None if space is None else rows)
    else:
        skip = by_group(torch.mul(x_, _cast(dtype, D)[0].unsqueeze(1), out=space), groups)
        rows = torch.baddbmm(skip, C, state, out=None if space is None else skip)
    return _cast(x.dtype, _by_head(rows, groups, size))[0].contiguous(), state.unflatten(0, (-1, groups))


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
    x, dt, dy, B, C = _cast(dtype, x, dt, dout, B, C)
    B, C = by_group(B, groups), by_group(C, groups)
    weights, rows = _weights(dt, A, positive).unsqueeze(3), by_group(dy, groups)
    space = torch.empty_like(x, memory_format=torch.contiguous_format)
    weighted = by_group(torch.mul(weights, x, out=space), groups)
    dstate = torch.bmm(C.mT, rows)
    dC = torch.bmm(rows, state.flatten(0, 1).mT)
    dB = torch.bmm(weighted, dstate.mT)
    dx = _by_head(torch.bmm(B, dstate, out=weighted), groups, size)  # of the weighted input
    product = dx * x
    dweights = product.sum(3)
    dx = dx.mul_(weights)
    drate = (dweights * dt).sum((0, 1))
    dD = None
    if D is not None:
        dx = dx.addcmul_(D.unsqueeze(1), dy)
        dD = torch.mul(dy, x, out=product).sum((0, 1, 3))
    dB, dC = (_by_head(t, groups, t.shape[2]) for t in (dB, dC))
    return dx, _weights(dweights, A, positive), -drate if positive else drate, dB, dC, dD
