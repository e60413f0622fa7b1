"""The non-causal SSD as written down, one position after the other, in any floating dtype.

    S = sum_l w_l B_l x_l^T        y_l = C_l^T S + D x_l        w_l = -dt_l A, or dt_l A with `positive` False

for each head m, with B and C of group m % G (VSSD, arXiv 2407.18559). There is no decay and no order: every position
reads the sum over all positions.

Every backend of `nc_ssd` exposes the two functions of this module, called underneath autograd. Inputs:

    x            (B, L, M, P), any floating dtype, any strides
    dt           (B, L, M), any floating dtype, any strides; finished steps
    A, D         (M,), in the accumulation dtype, contiguous; D may be None
    B, C         (B, L, G, N), any floating dtype each, any strides; G divides M
    positive     the weights are -dt A, else dt A

B, L, M, P, G, N >= 1. `forward` returns out (B, L, M, P), contiguous, in the dtype of x, and the sums S as
(B, G, N, M / G * P), those of the heads of a group side by side, contiguous, in the accumulation dtype. `backward` gets
them back and returns the gradients of the six tensors in their shapes, in any floating dtype, None where the input is
None.
"""
import torch

from .._dispatch import accumulation_dtype


def group_of(heads: int, groups: int, device: torch.device) -> torch.Tensor:
    """Returns the group of each head, (M,): 0, 1, ..., G - 1, 0, 1, ..."""
    return torch.arange(heads, device=device) % groups


def forward(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        positive: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes all positions; see the module. Differentiable by autograd when called directly."""
    dtype = accumulation_dtype(x)
    groups, group = B.shape[2], group_of(x.shape[2], B.shape[2], x.device)
    x_, dt, B, C = x.to(dtype), dt.to(dtype), B.to(dtype)[:, :, group], C.to(dtype)[:, :, group]
    weights = (-A if positive else A) * dt
    state = x_.new_zeros(x.shape[0], x.shape[2], B.shape[3], x.shape[3])
    for l in range(x.shape[1]):
        state = state + weights[:, l, :, None, None] * B[:, l, :, :, None] * x_[:, l, :, None, :]
    ys = [(C[:, l, :, :, None] * state).sum(2) for l in range(x.shape[1])]
    out = torch.stack(ys, 1)
    if D is not None:
        out = out + D[:, None] * x_
    state = state.unflatten(1, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(3)
    return out.to(x.dtype).contiguous(), state.contiguous()


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
    """Gradients, one position after the other; see the module."""
    dtype = accumulation_dtype(x)
    groups, group = B.shape[2], group_of(x.shape[2], B.shape[2], x.device)
    x, dt, dy, B, C = (t.to(dtype) for t in (x, dt, dout, B, C))
    rate = -A if positive else A
    state = state.unflatten(3, (-1, x.shape[3])).permute(0, 3, 1, 2, 4).flatten(1, 2)  # (B, M, N, P)
    dstate = torch.zeros_like(state)
    for l in range(x.shape[1]):
        dstate = dstate + C[:, l, group, :, None] * dy[:, l, :, None, :]
    dx, dweights, dB, dC = torch.zeros_like(x), torch.zeros_like(dt), torch.zeros_like(B), torch.zeros_like(C)
    for l in range(x.shape[1]):
        weight = (rate * dt[:, l])[..., None]
        drive = (B[:, l, group, :, None] * dstate).sum(2)
        dx[:, l] = weight * drive if D is None else weight * drive + D[:, None] * dy[:, l]
        dweights[:, l] = (drive * x[:, l]).sum(2)
        for m in range(x.shape[2]):
            dB[:, l, m % groups] += weight[:, m] * (dstate[:, m] * x[:, l, m, None, :]).sum(2)
            dC[:, l, m % groups] += (state[:, m] * dy[:, l, m, None, :]).sum(2)
    drate = (dweights * dt).sum((0, 1))
    return (dx, dweights * rate, -drate if positive else drate, dB, dC,
            None if D is None else (dy * x).sum((0, 1, 3)))
