"""The optional native library of the CPU kernels: plain C, built by `setup.py`, loaded with ctypes at first use.

Nothing is compiled here. Where the library is missing (no compiler at installation) the PyTorch path serves.
"""
import ctypes
import functools
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch

from ._dispatch import environment_switch

ABI = 6
ENV_NATIVE = 'VISIONSSM_NATIVE'
LIBRARY = Path(__file__).with_name('libvisionssm_native.so')
INSTRUCTION_SETS = ('base', 'avx2', 'avx512')


_BLOCK = 16
_TASKS = 16
_MAX_BLOCKS = 8


def cut_channels(batch: int, groups: int, width: int, tasks: int = _TASKS) -> tuple[int, int]:
    """Cuts a group of channels into slabs, one a task, and never by the number of threads: results do not depend on it.

    Args:
        batch: Number of batch elements, which are tasks by themselves.
        groups: Number of groups, likewise.
        width: Channels of a group.
        tasks: Tasks that are enough; where each keeps sums of its own, more cost memory.

    Returns:
        Channels of a slab, a multiple of what the widest vectors hold; number of slabs.
    """
    blocks = math.ceil(width / _BLOCK)
    per_slab = min(max(math.ceil(batch * groups * blocks / tasks), 1), _MAX_BLOCKS, blocks)
    return per_slab * _BLOCK, math.ceil(blocks / per_slab)


_GRAIN = 32768


def threads_for(operations: int) -> int:
    """Returns how many threads an op deserves, all or one: waking them costs more than few operations.

    PyTorch counts alike. A number between would be worse than either: see `team` in kernels/csrc/instances.h.
    """
    return torch.get_num_threads() if operations >= _GRAIN else 1


class Arguments:
    """A structure of the library, which holds nothing but numbers and pointers of eight bytes: Python packs it at once.

    Attributes:
        fields: Name and count of numbers of every field, in the order of the header.
    """

    def __init__(self, sizes: Sequence[str], inputs: Sequence[str], strides: Mapping[str, tuple[str, int]],
                 results: Sequence[str]) -> None:
        """Lists the fields.

        Args:
            sizes: Names of the plain numbers.
            inputs: Names of tensors that are read.
            strides: Field without `_stride` to the tensor that it is of, and its number of dimensions.
            results: Names of the other tensors.
        """
        self.fields = [*((name, 1) for name in (*sizes, *inputs)),
                       *((f'{field}_stride', rank) for field, (_, rank) in strides.items()),
                       *((name, 1) for name in results)]
        at = dict(zip((name for name, _ in self.fields), accumulate((count for _, count in self.fields), initial=0)))
        found = {tensor: (at[f'{field}_stride'], rank) for field, (tensor, rank) in strides.items()}
        self._places = {name: (at[name], *found.get(name, (0, 0))) for name in (*inputs, *results)}
        self._zeros = [0] * sum(count for _, count in self.fields)
        self._struct = struct.Struct(f'{len(self._zeros)}q')

    def pack(
            self,
            sizes: Sequence[int],
            tensors: Mapping[str, torch.Tensor | None],
            broadcast: Iterable[str] = (),
    ) -> bytes:
        """Returns the structure; it holds pointers into the tensors, and zeros for those that are absent.

        Args:
            sizes: The plain numbers, in the order of the header.
            tensors: Tensors by name; one of another number of dimensions than its strides have gets none.
            broadcast: Names of tensors whose dimension 1 has one entry for all: its stride is 0.
        """
        numbers = self._zeros.copy()
        numbers[:len(sizes)] = sizes
        for name, x in tensors.items():
            if x is not None:
                pointer, first, rank = self._places[name]
                numbers[pointer] = x.data_ptr()
                if rank and x.ndim == rank:
                    numbers[first:first + rank] = x.stride()
        for name in broadcast:
            numbers[self._places[name][1] + 1] = 0
        return self._struct.pack(*numbers)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """Loads the library once: (library, None), or (None, why not)."""
    if not LIBRARY.exists():
        return None, ('the native library is not built: install with a C compiler, or run '
                      '`python setup.py build_ext --inplace` in a checkout')
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f'the native library does not load: {error}'
    found = library.visionssm_abi()
    if found != ABI:
        return None, f'the native library has ABI {found}, this package needs {ABI}: build it again'
    library.visionssm_isa.restype = ctypes.c_char_p
    return library, None


def native_why_not(device_type: str) -> str | None:
    """Says why the native library cannot run on a device type, None if it can."""
    if device_type != 'cpu':
        return f'the native library runs on the CPU, not on {device_type}'
    if not environment_switch(ENV_NATIVE, True):
        return f'{ENV_NATIVE}=0'
    return _load()[1]


def native_library() -> ctypes.CDLL:
    """Returns the loaded library; call `native_why_not` first."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


def instruction_set() -> int:
    """Returns the highest instruction set that the kernels may use, an index into `INSTRUCTION_SETS`.

    VISIONSSM_NATIVE_ISA ('base', 'avx2', 'avx512') caps it; the library itself never exceeds what the processor has.
    """
    name = os.environ.get('VISIONSSM_NATIVE_ISA') or INSTRUCTION_SETS[-1]
    if name not in INSTRUCTION_SETS:
        raise ValueError(f'VISIONSSM_NATIVE_ISA got {name!r}; allowed: {", ".join(INSTRUCTION_SETS)}')
    return INSTRUCTION_SETS.index(name)


def instruction_set_in_use() -> str:
    """Returns the name of the instruction set that the kernels use on this processor; empty without the library."""
    if native_why_not('cpu'):
        return ''
    return INSTRUCTION_SETS[min(instruction_set(), INSTRUCTION_SETS.index(native_library().visionssm_isa().decode()))]
