"""The wavefront scan by the native library: see kernels/csrc/wavefront_scan.h and the contract in `reference`."""
import math
from typing import Any

import torch

from .._dispatch import accumulation_dtype
from .._native import Arguments, cut_channels, run_native
from .reference import ROWS

_INPUTS = ('u', 'delta_top', 'delta_left', 'A_top', 'A_left', 'B_top', 'B_left', 'C', 'D', 'bias_top', 'bias_left')
_MAPS = ('u', 'delta_top', 'delta_left', 'B_top', 'B_left', 'C')
_OUTPUTS = ('out', 'du', 'ddelta_top', 'ddelta_left')
ARGUMENTS = Arguments(
    ('batch', 'dim', 'state', 'height', 'width', 'delta_softplus', 'reverse', 'threads', 'slab', 'slabs'),
    (*_INPUTS, 'dout'),
    {**{name: (name, 4) for name in ('u', 'delta_top', 'delta_left', 'dout')},
     'b_top': ('B_top', 4), 'b_left': ('B_left', 4), 'c': ('C', 4), **{name: (name, 4) for name in _OUTPUTS}},
    ('out', 'checkpoints', 'du', 'ddelta_top', 'ddelta_left', 'dA_top', 'dA_left', 'dD', 'dbias_top', 'dbias_left',
     'dB_top', 'dB_left', 'dC'))
"""`wavefront_args` in kernels/csrc/wavefront_scan.h."""


def _run(
        inputs: dict[str, torch.Tensor | None],
        delta_softplus: bool,
        reverse: bool,
        backward: bool,
        **others: torch.Tensor | None,
) -> None:
    """Fills the outputs among `others`.

    Args:
        inputs: The tensors of the contract by name, in the accumulation dtype.
        delta_softplus: See `reference`.
        reverse: See `reference`.
        backward: Runs the backward pass.
        **others: The checkpoints, and the outputs of the pass; all contiguous but the maps.
    """
    u = inputs['u']
    sizes = (u.shape[0], u.shape[1], inputs['A_top'].shape[1], *u.shape[2:], delta_softplus, reverse,
             torch.get_num_threads(), *cut_channels(u.shape[0], 1, u.shape[1]))
    if run_native('visionssm_wavefront_scan', ARGUMENTS.pack(sizes, {**inputs, **others}), u.dtype == torch.float64,
                  backward):
        raise MemoryError('wavefront_scan_2d: no memory for the scratch space of the native kernels')


def forward(
        u: torch.Tensor,
        delta_top: torch.Tensor,
        delta_left: torch.Tensor,
        A_top: torch.Tensor,
        A_left: torch.Tensor,
        B_top: torch.Tensor,
        B_left: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        bias_top: torch.Tensor | None,
        bias_left: torch.Tensor | None,
        delta_softplus: bool,
        reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the scan; see `reference`."""
    batch, dim, height, width = u.shape
    checkpoints = torch.empty(
        batch, math.ceil(height / ROWS), A_top.shape[1], width, dim, dtype=accumulation_dtype(u))
    out = forward_only(u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, bias_top, bias_left,
                       delta_softplus, reverse, checkpoints=checkpoints)
    return out, checkpoints


def forward_only(*args: Any, checkpoints: torch.Tensor | None = None) -> torch.Tensor:
    """Runs the scan, arguments as in `forward`; fills checkpoints if given, at N = 16 twice as large as the output."""
    *tensors, delta_softplus, reverse = args
    u, dtype = tensors[0], accumulation_dtype(tensors[0])
    inputs = {name: x.to(dtype) if name in _MAPS else x for name, x in zip(_INPUTS, tensors, strict=True)}
    out = torch.empty_like(u, dtype=dtype)
    _run(inputs, delta_softplus, reverse, False, out=out, checkpoints=checkpoints)
    return out.to(u.dtype)


def backward(
        dout: torch.Tensor,
        u: torch.Tensor,
        delta_top: torch.Tensor,
        delta_left: torch.Tensor,
        A_top: torch.Tensor,
        A_left: torch.Tensor,
        B_top: torch.Tensor,
        B_left: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        bias_top: torch.Tensor | None,
        bias_left: torch.Tensor | None,
        checkpoints: torch.Tensor,
        delta_softplus: bool,
        reverse: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the scan; see `reference`."""
    dtype = accumulation_dtype(u)
    batch, dim, height, width = u.shape
    state = A_top.shape[1]
    _, slabs = cut_channels(batch, 1, dim)
    maps = dict(dout=dout, u=u, delta_top=delta_top, delta_left=delta_left, B_top=B_top, B_left=B_left, C=C)
    inputs = {name: x.to(dtype) for name, x in maps.items()}
    inputs |= dict(A_top=A_top, A_left=A_left, D=D, bias_top=bias_top, bias_left=bias_left)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(('dA_top', 'dA_left'), (batch, dim, state))
    shapes |= dict.fromkeys(('dB_top', 'dB_left', 'dC'), (batch, slabs, state, height, width))
    shapes |= {name: (batch, dim) for name, x in (('dD', D), ('dbias_top', bias_top), ('dbias_left', bias_left))
               if x is not None}
    grads = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    grads |= {f'd{name}': torch.empty_like(x, dtype=dtype) for name, x in maps.items()
              if name in ('u', 'delta_top', 'delta_left')}
    _run(inputs, delta_softplus, reverse, True, checkpoints=checkpoints, **grads)
    for name in ('dB_top', 'dB_left', 'dC'):
        grads[name] = grads[name].sum(1)
    for name in ('dA_top', 'dA_left', 'dD', 'dbias_top', 'dbias_left'):
        if name in grads:
            grads[name] = grads[name].sum(0)
    return tuple(grads.get(name) for name in (
        'du', 'ddelta_top', 'ddelta_left', 'dA_top', 'dA_left', 'dB_top', 'dB_left', 'dC', 'dD', 'dbias_top',
        'dbias_left'))
