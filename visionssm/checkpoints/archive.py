"""Checks of a foreign file before anything in it is believed: no bombs, no tensors larger than their file.

`torch.load(weights_only=True)` keeps a file from running code. It does not keep it from asking for more memory than
there is: through compressed entries, through entries that share their bytes, or through tensors that claim to be larger
than what is stored of them. The pickle is walked here with an empty object in the place of everything that it names, so
nothing is built and nothing runs.
"""

import math
import os
import pickle
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

from .errors import CheckpointError

__all__ = ['check_archive']

_LARGEST_RATIO = 20
"""How much an entry may shrink by compression; `torch.save` does not compress, and weights hardly can be."""
_MIB = 1 << 20
_ITEM_SIZES = {
    'Double': 8, 'Float': 4, 'Half': 2, 'BFloat16': 2, 'Long': 8, 'Int': 4, 'Short': 2, 'ComplexDouble': 16,
    'ComplexFloat': 8}
_OLD_MAGIC = 0x1950a86a20f9469cfc6c
_SIZED = ('builtins.bytearray', '__builtin__.bytearray', 'torch.Tensor', 'torch._tensor.Tensor')


class _Storage:
    def __init__(self, item_size: int) -> None:
        self.item_size = item_size


class _Inert:
    """Takes the place of every object of a pickle: swallows what is done to it."""

    path = ''
    walker: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> '_Inert':
        if cls.walker is not None:
            cls.walker.note_call(cls.path, args)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Keep nothing."""

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep nothing."""

    def append(self, value: Any) -> None:
        """Keep nothing."""

    def extend(self, values: Any) -> None:
        """Keep nothing."""

    def add(self, value: Any) -> None:
        """Keep nothing."""


class _Walker(pickle.Unpickler):
    """Reads a pickle without building anything, and adds up what its tensors claim to hold."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding='bytes')
        self.path, self.file_size = path, path.stat().st_size
        self.storages: dict[str, int] = {}
        self.total = 0

    def find_class(self, module: str, name: str) -> type[_Inert]:
        return type('Inert', (_Inert,), {'path': f'{module}.{name}', 'walker': self})

    def persistent_load(self, saved: Any) -> Any:
        if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] not in ('storage', b'storage'):
            return _Inert()
        kind = getattr(saved[1], 'path', '').rpartition('.')[2].removesuffix('Storage')
        item_size, count = _ITEM_SIZES.get(kind, 1), saved[4]
        if not isinstance(count, int) or count < 0:
            raise CheckpointError(f'The checkpoint {str(self.path)!r} has a storage of {count!r} elements.')
        key = str(saved[2])
        self.storages[key] = max(count * item_size, self.storages.get(key, 0))
        return _Storage(item_size)

    def note_call(self, name: str, args: tuple) -> None:
        """Check what the pickle asks to be built from numbers of its own."""
        if name.startswith('torch._utils._rebuild_tensor') and len(args) > 2 and isinstance(args[0], _Storage):
            self.total += _product(args[2]) * args[0].item_size
            if self.total > 1024 * _MIB + 16 * self.file_size:
                raise CheckpointError(
                    f'The tensors in {str(self.path)!r} claim to hold over {self.total / _MIB:.0f} MiB; the file has '
                    f'{self.file_size / _MIB:.1f} MiB. Do not open it.')
        elif name in _SIZED and any(isinstance(value, int) and value > self.file_size for value in args):
            raise CheckpointError(f'The checkpoint {str(self.path)!r} asks for a {name} of {max(args)} elements, more '
                                  f'than its {self.file_size} bytes can fill. Do not open it.')


def check_archive(path: str | os.PathLike) -> None:
    """Refuse a file of `torch.save` that would take more memory than its size explains.

    Args:
        path: The file, of the zip format or the one before it.

    Raises:
        CheckpointError: The file is a bomb, or has names that lead out of it.
        zipfile.BadZipFile, pickle.UnpicklingError, ...: It is damaged.
    """
    path = Path(path)
    with open(path, 'rb') as file:
        if file.read(4) == b'PK\x03\x04':
            _check_zip(path)
        else:
            file.seek(0)
            _check_old_format(file, path)


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            name = PurePosixPath(entry.filename)
            if name.is_absolute() or '..' in name.parts or '\\' in entry.filename or ':' in entry.filename:
                raise CheckpointError(f'The checkpoint {str(path)!r} has an entry {entry.filename!r}, whose name leads '
                                      f'out of the archive. Do not open it.')
            if entry.file_size > _MIB and entry.file_size > _LARGEST_RATIO * entry.compress_size:
                raise CheckpointError(
                    f'The checkpoint {str(path)!r} has an entry {entry.filename!r} of {entry.compress_size} bytes that '
                    f'grows to {entry.file_size}: no weights compress like that. Do not open it.')
        packed, size = sum(entry.compress_size for entry in entries), path.stat().st_size
        if packed > size:
            raise CheckpointError(f'The entries of {str(path)!r} have {packed} bytes together, the file has {size}: '
                                  f'they share their bytes. Do not open it.')
        sizes = {entry.filename.partition('/')[2]: entry.file_size for entry in entries}
        for entry in entries:
            if entry.filename.partition('/')[2] == 'data.pkl':
                with archive.open(entry) as file:
                    walker = _walk(file, path)
                _check_storages(path, walker.storages, sizes)


def _check_storages(path: Path, storages: dict[str, int], sizes: dict[str, int]) -> None:
    for key, claimed in storages.items():
        stored = sizes.get(f'data/{key}', claimed)
        if claimed > stored:
            raise CheckpointError(f'The checkpoint {str(path)!r} has a tensor that claims {claimed} bytes, of which '
                                  f'{stored} are stored. Do not open it.')


def _check_old_format(file: IO[bytes], path: Path) -> None:
    """Check a file of the format before zip: pickles in a row, then the bytes of the storages."""
    if _first(file, path) != _OLD_MAGIC:
        return  # torch.load reads nothing more of it
    for _ in ('protocol', 'system'):
        _walk(file, path)
    claimed = sum(_walk(file, path).storages.values())
    if claimed > path.stat().st_size:
        raise CheckpointError(f'The tensors in {str(path)!r} claim {claimed} bytes, the file has '
                              f'{path.stat().st_size}. Do not open it.')


def _first(file: IO[bytes], path: Path) -> Any:
    return _load(_Walker(file, path))


def _walk(file: IO[bytes], path: Path) -> _Walker:
    walker = _Walker(file, path)
    _load(walker)
    return walker


def _load(walker: _Walker) -> Any:
    try:
        return walker.load()
    except MemoryError as error:
        raise CheckpointError(f'The checkpoint {str(walker.path)!r} asks for more memory than there is.') from error


def _product(sizes: Any) -> int:
    return math.prod(size for size in sizes if isinstance(size, int)) if isinstance(sizes, tuple | list) else 0
