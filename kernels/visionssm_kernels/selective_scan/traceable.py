"""The selective scan as a graph of ATen operations without loops over positions, for torch.export and ONNX.

A log-depth scan: after doubling step j every position holds the composition of its last 2^j recurrence steps. Needs
memory O(B D L N) and multiplies log2(L) times as much, so nothing runs it but exported graphs.
"""
import torch
from torch.nn import functional as F

from .._dispatch import accumulation_dtype
from .reference import from_route, to_route

MAX_DYNAMIC_LENGTH = 1 << 16
"""Longest sequence that a graph with a dynamic length computes correctly."""


def count_doublings(length: int | torch.SymInt) -> int:
    """Number of doubling steps: a graph with a dynamic length takes those of the longest sequence allowed."""
    if isinstance(length, torch.SymInt):
        torch._check(length <= MAX_DYNAMIC_LENGTH)
        return (MAX_DYNAMIC_LENGTH - 1).bit_length()
    return (length - 1).bit_length()


def _per_channel(x: torch.Tensor, dim: int, index: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    if x.ndim == 3:
        return x[None, ..., None]
    return to_route(x, index, reverse).repeat_interleave(dim // x.shape[2], dim=2)


def routed_scan(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        index: torch.Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        merge: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes `visionssm::routed_scan` without its checkpoints; see `visionssm_kernels._dispatch`."""
    dtype = accumulation_dtype(u)
    A, B, C = A.to(dtype), B.to(dtype), C.to(dtype)
    x, step = (to_route(t.to(dtype), index, reverse) for t in (u, delta))
    step = step if delta_bias is None else step + delta_bias.to(dtype)[..., None]
    step = F.softplus(step) if delta_softplus else step
    dim, length = delta.shape[2:]
    decay = torch.exp(step[..., None, :] * A[..., None])
    states = (step * x)[..., None, :] * _per_channel(B, dim, index, reverse)
    for j in range(count_doublings(length)):
        shift = 1 << j
        states = states + decay * F.pad(states, (shift, 0))[..., :length]
        decay = decay * F.pad(decay, (shift, 0), value=1.0)[..., :length]
    y = (states * _per_channel(C, dim, index, reverse)).sum(3)
    if D is not None:
        y = y + D.to(dtype)[..., None] * x
    if z is not None:
        y = y * F.silu(to_route(z.to(dtype), index, reverse))
    y = from_route(y, index, reverse)
    out = y.sum(1, keepdim=True) if merge else y
    # checkpoints serve the gradient alone, which exported graphs do not have
    return out.to(u.dtype), states[..., -1], states.new_empty(*delta.shape[:3], 0, A.shape[-1])
