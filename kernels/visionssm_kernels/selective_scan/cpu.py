"""The selective scan by the native library: see kernels/csrc/selective_scan.h and the contract in `_dispatch`."""
import ctypes
import math

import torch

from .._dispatch import CHUNK, accumulation_dtype, empty_map
from .._native import cut_channels, instruction_set, native_library


_MAPS = ('u', 'delta', 'z', 'dout', 'out', 'du', 'ddelta', 'dz')


class ScanArgs(ctypes.Structure):
    """Mirror of `scan_args` in kernels/csrc/selective_scan.h."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            'batch', 'routes', 'dim', 'state', 'length', 'groups', 'b_groups', 'c_groups', 'slab', 'slabs',
            'delta_softplus', 'reverse', 'merge', 'shared_u', 'threads')),
        *((name, ctypes.c_void_p) for name in ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias', 'index')),
        *((f'{name}_stride', ctypes.c_int64 * 4) for name in _MAPS),
        *((name, ctypes.c_int64 * 5) for name in ('b_stride', 'c_stride')),
        *((name, ctypes.c_void_p) for name in (
            'out', 'last_state', 'checkpoints', 'dout', 'dlast_state', 'du', 'ddelta', 'dz', 'dA', 'dD', 'ddelta_bias',
            'dB', 'dC')),
    ]


def _groups(x: torch.Tensor) -> int:
    return 0 if x.ndim == 3 else x.shape[2]


def _strides(x: torch.Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides of a map; dimensions of size 1 are broadcast, so they get 0."""
    if x is None or x.ndim != rank:
        return (0,) * rank
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride()))


class _Call:
    """Arguments of one call; holds the tensors that the pointers point into."""

    def __init__(
            self,
            dtype: torch.dtype,
            delta_softplus: bool,
            reverse: bool,
            merge: bool,
            tensors: dict[str, torch.Tensor | None],
    ) -> None:
        self.dtype, self.tensors = dtype, {}
        for name, x in tensors.items():
            self.tensors[name] = x if x is None or name == 'index' else x.to(dtype)
        for name in ('B', 'C'):
            if self.tensors[name].ndim == 3:
                self.tensors[name] = self.tensors[name].contiguous()
        delta, A, B, C = (self.tensors[name] for name in ('delta', 'A', 'B', 'C'))
        self.batch, self.routes, self.dim, self.length = delta.shape
        self.state = A.shape[-1]
        b_groups, c_groups = _groups(B), _groups(C)
        groups = math.lcm(b_groups or 1, c_groups or 1)
        slab, self.slabs = cut_channels(self.batch, groups, self.dim // groups)
        self.args = ScanArgs(
            self.batch, self.routes, self.dim, self.state, self.length, groups, b_groups, c_groups, slab, self.slabs,
            delta_softplus, reverse, merge, self.tensors['u'].shape[1] < self.routes, torch.get_num_threads())
        self.args.b_stride, self.args.c_stride = _strides(B, 5), _strides(C, 5)
        self.groups = groups
        self.bind(**self.tensors)

    def bind(self, **tensors: torch.Tensor | None) -> None:
        """Sets pointers, and keeps the tensors alive."""
        self.tensors.update(tensors)
        for name, x in tensors.items():
            setattr(self.args, name, None if x is None else x.data_ptr())
            if name in _MAPS:
                setattr(self.args, f'{name}_stride', _strides(x, 4))

    def empty(self, *shape: int) -> torch.Tensor:
        """Makes an output in the accumulation dtype."""
        return torch.empty(shape, dtype=self.dtype)

    def run(self, backward: bool) -> None:
        """Runs the library."""
        failed = native_library().visionssm_selective_scan(
            ctypes.byref(self.args), self.dtype == torch.float64, backward, instruction_set())
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
    call.bind(out=out, last_state=last_state, checkpoints=checkpoints)
    call.run(backward=False)
    return out.to(u.dtype), last_state, checkpoints


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
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, index=index))
    batch, routes, dim, length, state = call.batch, call.routes, call.dim, call.length, call.state
    dout = dout.to(call.dtype)

    def matrix(groups: int) -> torch.Tensor:
        if groups == 0:
            return call.empty(batch, routes, dim, state)
        return call.empty(batch, routes, groups, call.groups // groups * call.slabs, state, length)

    grads = dict(
        du=torch.empty_like(u, dtype=call.dtype), ddelta=torch.empty_like(delta, dtype=call.dtype),
        dA=call.empty(batch, routes, dim, state), dB=matrix(_groups(B)), dC=matrix(_groups(C)),
        dD=None if D is None else call.empty(batch, routes, dim),
        dz=None if z is None else torch.empty_like(z, dtype=call.dtype),
        ddelta_bias=None if delta_bias is None else call.empty(batch, routes, dim))
    call.bind(dout=dout, dlast_state=None if dlast_state is None else dlast_state.contiguous(), checkpoints=checkpoints,
              **grads)
    call.run(backward=True)
    for name, x in (('dB', B), ('dC', C)):
        grads[name] = grads[name].sum(0) if x.ndim == 3 else grads[name].sum(3)
    for name in ('dA', 'dD', 'ddelta_bias'):
        grads[name] = None if grads[name] is None else grads[name].sum(0)
    return tuple(grads[name] for name in ('du', 'ddelta', 'dA', 'dB', 'dC', 'dD', 'dz', 'ddelta_bias'))
