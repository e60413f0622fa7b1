"""The scan of Mamba-2 as a graph of ATen operations without loops, for torch.export and ONNX.

The chunked form with all chunks at once, and the states passed from chunk to chunk by a second matrix of segment sums:
memory O(B M (L Q + (L / Q)^2 + L P N / Q)). The length may be dynamic.
"""
import math

import torch
from torch.nn import functional as F

from .._dispatch import CHUNK, accumulation_dtype
from .chunked import segment_decays
from .reference import chunk_length


def ssd_scan(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        initial_states: torch.Tensor | None,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
        reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes `visionssm::ssd_scan` without its chunk states; see `reference`."""
    dtype, length = accumulation_dtype(x), x.shape[1]
    per_group = x.shape[2] // B.shape[2]
    size = chunk_length(length) if isinstance(length, int) else CHUNK
    # where the length is dynamic, one chunk more: a graph that was made of a single one would hold for no other number
    padding = -length % size + (0 if isinstance(length, int) else size)

    def chunks(sequence: torch.Tensor) -> torch.Tensor:
        """(B, L, M, ...) -> (B, M, chunks, Q, ...)."""
        sequence = F.pad(sequence, (0, 0) * (sequence.ndim - 2) + (0, padding))
        return sequence.unflatten(1, (-1, size)).movedim(3, 1)

    u, dt, B, C = (t.to(dtype) for t in (x, dt, B, C))
    if reverse:
        u, dt, B, C = (t.flip(1) for t in (u, dt, B, C))
    step = dt if dt_bias is None else dt + dt_bias.to(dtype)
    step = F.softplus(step) if dt_softplus else step
    # infinite bounds are left out, which not every target of an export can represent
    step = step.clamp(min=dt_min) if dt_min > -math.inf else step
    step = step.clamp(max=dt_max) if dt_max < math.inf else step
    B_l, C_l = (chunks(t.repeat_interleave(per_group, 2)) for t in (B, C))
    drive = chunks(step[..., None] * u)
    log_decay = chunks(step * A.to(dtype))
    sums = log_decay.cumsum(-1)
    within = segment_decays(log_decay)
    local = (drive * within[..., -1, :, None]).mT @ B_l  # (B, M, chunks, P, N)
    first = torch.zeros_like(local[:, :, :1]) if initial_states is None else initial_states.to(dtype)[:, :, None]
    passing = segment_decays(F.pad(sums[..., -1], (1, 0)))
    states = (passing @ torch.cat([first, local], 2).flatten(3)).unflatten(3, local.shape[3:])
    y = ((C_l @ B_l.mT) * within) @ drive + torch.exp(sums)[..., None] * (C_l @ states[:, :, :-1].mT)
    y = y.movedim(1, 3).flatten(1, 2)[:, :length]
    y = y if D is None else y + D.to(dtype) * u
    y = y.flip(1) if reverse else y
    y = y if z is None else y * F.silu(z.to(dtype))
    # the chunk states serve the gradient alone, which exported graphs do not have
    return y.to(x.dtype), states[:, :, -1], states.new_empty(*states.shape[:2], 0, *states.shape[3:])
