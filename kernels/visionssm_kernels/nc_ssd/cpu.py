"""The non-causal SSD by the native library: see kernels/csrc/nc_ssd_kernels.h.

It computes in float32. In float64 the products of PyTorch serve: they are four times as fast as the vectors of the
least width that the library has for double.
"""
import torch

from .._native import Arguments, run_native, threads_for
from . import chunked

__all__ = ['backward', 'forward']

_MAPS = ('x', 'B', 'C', 'dout')
ARGUMENTS = Arguments(
    ('batch', 'length', 'heads', 'size', 'groups', 'state', 'positive', 'threads'),
    ('x', 'dt', 'A', 'B', 'C', 'D', 'dout'),
    {'x': ('x', 4), 'dt': ('dt', 3), **{name: (name, 4) for name in _MAPS[1:]}},
    ('sums', 'out', 'dx', 'ddt', 'dB', 'dC', 'dterms'))
"""`nc_ssd_args` in kernels/csrc/nc_ssd.h."""


def _run(positive: bool, tensors: dict[str, torch.Tensor | None]) -> None:
    """Fill the outputs among the tensors, which are contiguous."""
    tensors['dt'] = tensors['dt'].float()
    for name in _MAPS:
        if name in tensors:
            x = tensors[name].float()
            tensors[name] = x if x.stride(3) == 1 else x.contiguous()
    x, state = tensors['x'], tensors['B'].shape[3]
    sizes = (*x.shape, tensors['B'].shape[2], state, positive, threads_for(x.numel() * state))
    if run_native('visionssm_nc_ssd', ARGUMENTS.pack(sizes, tensors), 'dout' in tensors):
        raise MemoryError(f'nc_ssd: no memory for the sums of x {tuple(x.shape)}')


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
    if x.dtype == torch.float64:
        return chunked.forward(x, dt, A, B, C, D, positive)
    batch, _, heads, size = x.shape
    groups, state = B.shape[2:]
    out = x.new_empty(x.shape, dtype=torch.float32)
    sums = out.new_empty(batch, groups, state, heads // groups * size)
    _run(positive, {'x': x, 'dt': dt, 'A': A, 'B': B, 'C': C, 'D': D, 'sums': sums, 'out': out})
    return out.to(x.dtype), sums


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
    if x.dtype == torch.float64:
        return chunked.backward(dout, x, dt, A, B, C, D, state, positive)
    dx, ddt, dB, dC = (t.new_empty(t.shape, dtype=torch.float32) for t in (x, dt, B, C))
    dterms = ddt.new_empty(1 if D is None else 2, *dt.shape)
    _run(positive, {
        'x': x, 'dt': dt, 'A': A, 'B': B, 'C': C, 'D': D, 'dout': dout, 'sums': state, 'dx': dx, 'ddt': ddt, 'dB': dB,
        'dC': dC, 'dterms': dterms})
    dA, *dD = (terms.sum((0, 1)) for terms in dterms)  # not in one sum: gradients share no memory
    return dx, ddt, dA, dB, dC, dD[0] if dD else None
