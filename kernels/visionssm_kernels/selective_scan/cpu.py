"""The selective scan by the native library: see kernels/csrc/selective_scan.h and the contract in `_dispatch`."""
import math

import torch

from .._dispatch import CHUNK, accumulation_dtype, empty_map
from .._native import Arguments, cut_channels, instruction_set, native_library

_MAPS = ('u', 'delta', 'z', 'dout', 'out', 'du', 'ddelta', 'dz')
ARGUMENTS = Arguments(
    ('batch', 'routes', 'dim', 'state', 'length', 'groups', 'b_groups', 'c_groups', 'slab', 'slabs', 'delta_softplus',
     'reverse', 'merge', 'shared_u', 'threads'),
    ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias', 'index'),
    {**{name: (name, 4) for name in _MAPS}, **{name.lower(): (name, 5) for name in ('B', 'C', 'dB', 'dC')}},
    ('out', 'last_state', 'checkpoints', 'dout', 'dlast_state', 'du', 'ddelta', 'dz', 'dA', 'dD', 'ddelta_bias', 'dB',
     'dC', 'dB_odd', 'dC_odd'))
"""`scan_args` in kernels/csrc/selective_scan.h."""

Tensors = dict[str, torch.Tensor | None]


def _groups(x: torch.Tensor) -> int:
    return 0 if x.ndim == 3 else x.shape[2]


class _Call:
    """Arguments of one call; holds the tensors that the pointers point into."""

    def __init__(self, dtype: torch.dtype, delta_softplus: bool, reverse: bool, merge: bool, tensors: Tensors) -> None:
        for name in ('u', 'delta', 'B', 'C', 'z', 'dout'):
            x = tensors.get(name)
            if x is not None and x.dtype != dtype:
                tensors[name] = x.to(dtype)
        for name in ('B', 'C'):
            if tensors[name].ndim == 3:
                tensors[name] = tensors[name].contiguous()
        delta, B, C = tensors['delta'], tensors['B'], tensors['C']
        self.dtype, self.tensors = dtype, tensors
        self.batch, self.routes, self.dim, self.length = delta.shape
        self.state = tensors['A'].shape[-1]
        b_groups, c_groups = _groups(B), _groups(C)
        self.groups = math.lcm(b_groups or 1, c_groups or 1)
        # in the backward pass every slab reads and adds up the gradients of B and C
        tasks = 8 if 'dout' in tensors else 16
        slab, self.slabs = cut_channels(self.batch, self.groups, self.dim // self.groups, tasks)
        shared_u = tensors['u'].shape[1] < self.routes
        # maps that all routes share
        self.shared = (('u', 'du') if shared_u else ()) + (('out', 'dout') if merge else ())
        self.sizes = (
            self.batch, self.routes, self.dim, self.state, self.length, self.groups, b_groups, c_groups, slab,
            self.slabs, delta_softplus, reverse, merge, shared_u, torch.get_num_threads())

    def empty(self, *shape: int) -> torch.Tensor:
        """Makes an output in the accumulation dtype, which is that of A."""
        return self.tensors['A'].new_empty(shape)

    def run(self, backward: bool, **results: torch.Tensor | None) -> None:
        """Runs the library on outputs and what they are computed from."""
        failed = native_library().visionssm_selective_scan(
            ARGUMENTS.pack(self.sizes, self.tensors | results, self.shared), self.dtype == torch.float64, backward,
            instruction_set())
        if failed:
            raise MemoryError('selective_scan: no memory for the scratch space of the native kernels')


def forward(
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
    """Runs the scan; see `visionssm_kernels._dispatch`."""
    call = _Call(accumulation_dtype(u), delta_softplus, reverse, merge, dict(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, index=index))
    out = empty_map(u, 1 if merge else call.routes, call.dtype)
    last_state = call.empty(call.batch, call.routes, call.dim, call.state)
    checkpoints = call.empty(call.batch, call.routes, call.dim, math.ceil(call.length / CHUNK), call.state)
    call.run(False, out=out, last_state=last_state, checkpoints=checkpoints)
    return (out if out.dtype == u.dtype else out.to(u.dtype)), last_state, checkpoints


def backward(
        dout: torch.Tensor,
        dlast_state: torch.Tensor | None,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        index: torch.Tensor | None,
        checkpoints: torch.Tensor,
        delta_softplus: bool,
        reverse: bool,
        merge: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the scan; see `visionssm_kernels._dispatch`."""
    call = _Call(accumulation_dtype(u), delta_softplus, reverse, merge, dict(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, index=index, dout=dout))
    batch, routes, dim, state = call.batch, call.routes, call.dim, call.state

    def matrix(x: torch.Tensor) -> torch.Tensor:
        return call.empty(batch, routes, dim, state) if x.ndim == 3 else torch.empty_like(x, dtype=call.dtype)

    grads = dict(
        du=torch.empty_like(u, dtype=call.dtype), ddelta=torch.empty_like(delta, dtype=call.dtype),
        dA=call.empty(batch, routes, dim, state), dB=matrix(B), dC=matrix(C),
        dD=None if D is None else call.empty(batch, routes, dim),
        dz=None if z is None else torch.empty_like(z, dtype=call.dtype),
        ddelta_bias=None if delta_bias is None else call.empty(batch, routes, dim))
    dlast_state = None if dlast_state is None else dlast_state.contiguous()
    odd = {name: matrix(x) for name, x in (('dB', B), ('dC', C))
           if x.ndim > 3 and (call.slabs > 1 or call.groups > x.shape[2])}
    call.run(True, dlast_state=dlast_state, checkpoints=checkpoints, dB_odd=odd.get('dB'), dC_odd=odd.get('dC'),
             **grads)
    for name in list(odd):
        grads[name] += odd.pop(name)  # no name keeps it: its memory serves what follows
    constant = [name for name, x in (('dB', B), ('dC', C)) if x.ndim == 3]
    for name in ('dA', 'dD', 'ddelta_bias', *constant):
        x = grads[name]
        grads[name] = x if x is None else x.sum(0) if batch > 1 else x.squeeze(0)
    return tuple(grads[name] for name in ('du', 'ddelta', 'dA', 'dB', 'dC', 'dD', 'dz', 'ddelta_bias'))
