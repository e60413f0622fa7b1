"""Where pictures lie: in a folder, in an LMDB as BasicSR writes it, or in a MATLAB file of blocks as SIDD has it."""
import importlib.util
import io
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..data import READ_ERRORS, batches, convert_mode
from ..image_io import decode_image, flatten, open_image, orient

__all__ = ['BlockStore', 'FolderStore', 'LmdbStore', 'PictureStore', 'StoredPicture', 'list_pictures', 'make_lmdb',
           'open_store', 'read_pixels', 'resolve_folder']

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
PACKAGE = 'package:'
META = 'meta_info.txt'
# a key with its suffix, (height, width, channels), and how hard the PNG is compressed
META_LINE = re.compile(r'(.+)\.\w+ \((\d+), ?(\d+), ?(\d+)\)( \d+)?')
# fast to write, and little larger than the best
PNG_LEVEL = 1
# pages count when they are used, so a generous size costs nothing; it is doubled when it is full
MAP_SIZE = 2**30


def read_pixels(path: str | Path, mode: str = 'RGB') -> torch.Tensor:
    """Reads a picture of any kind as 8 bits a channel, turned as its EXIF data say, transparent parts on white.

    Args:
        path: The file.
        mode: 'RGB' or 'L'.

    Returns:
        uint8, (C, H, W).
    """
    return _to_pixels(open_image(str(path)), str(path), mode)


def _to_pixels(image: Image.Image, label: str, mode: str) -> torch.Tensor:
    """An image as uint8, (C, H, W)."""
    try:
        image = orient(image, label)
    except READ_ERRORS as error:
        raise ValueError(f'{label} cannot be read as an image: {error}') from error
    if image.mode == 'F':
        raise ValueError(f'{label} holds floating-point numbers, whose range is unknown: convert it to 8 or 16 bits')
    pixels = np.array(convert_mode(flatten(image), mode))
    return torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels).permute(2, 0, 1)


def resolve_folder(folder: str) -> Path:
    """Turns `package:NAME/FOLDER`, a folder inside an installed Python package, into a path; others stay."""
    if not folder.startswith(PACKAGE):
        return Path(folder)
    name, _, rest = folder.removeprefix(PACKAGE).partition('/')
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f'{folder}: the package {name} is not installed; install it, or name another folder')
    return Path(spec.submodule_search_locations[0], rest)


def list_pictures(place: Path) -> list[Path]:
    """Returns the pictures of a folder, in order of their names; a file is its own list."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise FileNotFoundError(f'there is no {place}')
    found = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES and not path.is_dir())
    if not found:
        raise FileNotFoundError(f'the folder {place} has no images ({", ".join(SUFFIXES)})')
    return found


class PictureStore(ABC):
    """Pictures at one place, numbered in order of their names.

    Args:
        place: Where they lie.
        names: Their names, without suffix.
    """

    def __init__(self, place: Path, names: Sequence[str]) -> None:
        self.place = place
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def label(self, index: int) -> str:
        """The place and name of a picture, for messages."""
        return f'{self.place}:{self.names[index]}'

    @abstractmethod
    def pixels(self, index: int, mode: str = 'RGB') -> torch.Tensor:
        """Read a picture, in the mode 'RGB' or 'L': uint8, (C, H, W)."""


class StoredPicture(NamedTuple):
    """One picture of a store."""
    store: PictureStore
    number: int

    @property
    def name(self) -> str:
        """Its name, without suffix."""
        return self.store.names[self.number]

    @property
    def label(self) -> str:
        """Its place and name, for messages."""
        return self.store.label(self.number)

    def pixels(self, mode: str = 'RGB') -> torch.Tensor:
        """Read it, in the mode 'RGB' or 'L': uint8, (C, H, W)."""
        return self.store.pixels(self.number, mode)


def open_store(place: Path) -> PictureStore:
    """Finds out what kind of place it is; nothing but the names is read.

    Args:
        place: A folder of pictures, one picture, an LMDB (a folder with `data.mdb`, or called `*.lmdb`), or a `*.mat`.

    Returns:
        The store.
    """
    if place.suffix == '.lmdb' or (place / 'data.mdb').is_file():
        return LmdbStore(place)
    return BlockStore(place) if place.suffix == '.mat' else FolderStore(place)


class FolderStore(PictureStore):
    """The pictures of a folder, or a single one."""

    def __init__(self, place: Path) -> None:
        self.paths = list_pictures(place)
        super().__init__(place, [path.stem for path in self.paths])

    def label(self, index: int) -> str:
        """The path of a picture."""
        return str(self.paths[index])

    def pixels(self, index: int, mode: str = 'RGB') -> torch.Tensor:
        """Read a picture, in the mode 'RGB' or 'L': uint8, (C, H, W)."""
        return read_pixels(self.paths[index], mode)


class BlockStore(PictureStore):
    """Blocks of pictures in a MATLAB file, such as SIDD's `ValidationNoisyBlocksSrgb.mat`: uint8, (..., H, W, 3).

    Each process reads the whole file when it first needs a block.
    """

    def __init__(self, place: Path) -> None:
        from scipy.io import matlab, whosmat
        if not place.is_file():
            raise FileNotFoundError(f'there is no {place}')
        try:
            found = [(name, shape) for name, shape, kind in whosmat(place) if kind == 'uint8' and shape[-1] == 3]
        except (ValueError, TypeError, OSError, NotImplementedError, matlab.MatReadError) as error:
            raise ValueError(f'{place} cannot be read as a MATLAB file up to version 7: {error}') from error
        if len(found) != 1 or len(found[0][1]) < 4:
            raise ValueError(f'{place} must hold one array of 8-bit colour blocks, (blocks, height, width, 3), as SIDD '
                             f'has them; it has {found or "none"}')
        self.variable, shape = found[0]
        self.blocks: np.ndarray | None = None
        super().__init__(place, [f'{number:05}' for number in range(int(np.prod(shape[:-3])))])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), 'blocks': None}

    def pixels(self, index: int, mode: str = 'RGB') -> torch.Tensor:
        """Read a block, in the mode 'RGB' or 'L': uint8, (C, H, W)."""
        if self.blocks is None:
            from scipy.io import loadmat
            blocks = loadmat(self.place, variable_names=[self.variable])[self.variable]
            self.blocks = blocks.reshape(-1, *blocks.shape[-3:])
        return _to_pixels(Image.fromarray(self.blocks[index]), self.label(index), mode)


def _import_lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ImportError('reading and writing LMDB needs the package lmdb: pip install "visionssm[restoration]"') \
            from error
    return lmdb


# LMDB can be open once in a process, and not be carried into a forked one: path -> (process, file's stamp, environment)
_open: dict[str, tuple[int, tuple[int, int], Any]] = {}


def _environment(place: Path) -> Any:
    """The LMDB's environment, opened once in each process, for reading and without locks."""
    lmdb, path = _import_lmdb(), str(place.resolve())
    facts = (place / 'data.mdb').stat()
    stamp = facts.st_ino, facts.st_mtime_ns
    owner, known, environment = _open.pop(path, (0, None, None))
    if environment is not None and (owner, known) != (os.getpid(), stamp):
        environment.close()
        environment = None
    if environment is None:
        try:
            environment = lmdb.open(path, readonly=True, create=False, lock=False, readahead=False, meminit=False)
        except lmdb.Error as error:
            raise ValueError(f'{place} cannot be opened as an LMDB: {error}') from error
        needed = (environment.info()['last_pgno'] + 1) * environment.stat()['psize']
        if facts.st_size < needed:
            # reading beyond the end would kill the process
            environment.close()
            raise ValueError(f'{place / "data.mdb"} is cut off: it has {facts.st_size} bytes and needs {needed}; copy '
                             'it again')
    _open[path] = os.getpid(), stamp, environment
    return environment


class LmdbStore(PictureStore):
    """An LMDB in BasicSR's form: `data.mdb` and `meta_info.txt`, whose lines are `KEY.png (h,w,c) LEVEL`.

    Keys are names without suffix and values are encoded images. The base is opened when a process first reads.
    """

    def __init__(self, place: Path) -> None:
        if not place.is_dir():
            raise FileNotFoundError(f'there is no {place}')
        _import_lmdb()
        lacking = [name for name in ('data.mdb', META) if not (place / name).is_file()]
        if lacking:
            raise ValueError(f'{place} lacks {" and ".join(lacking)}; an LMDB of pictures is a folder with both, as '
                             'BasicSR and tools/make_lmdb.py write it')
        keys = []
        for number, line in enumerate((place / META).read_text(encoding='utf-8').splitlines(), 1):
            found = META_LINE.fullmatch(line.strip())
            if found is None:
                raise ValueError(f'{place / META}, line {number}: {line!r} is not of the form "name.png (h,w,c) level"')
            keys.append(found.group(1))
        if not keys:
            raise ValueError(f'{place / META} names no pictures')
        super().__init__(place, keys)

    def pixels(self, index: int, mode: str = 'RGB') -> torch.Tensor:
        """Read a picture, in the mode 'RGB' or 'L': uint8, (C, H, W)."""
        label = self.label(index)
        with _environment(self.place).begin() as transaction:
            content = transaction.get(self.names[index].encode())
        if content is None:
            raise ValueError(f'{self.place} has no key {self.names[index]!r}, which its {META} names: write the LMDB '
                             'again')
        return _to_pixels(decode_image(content, label), label, mode)


class _Entry(NamedTuple):
    key: str
    content: bytes
    shape: tuple[int, int, int]


def _starts(length: int, crop: int, step: int) -> list[int]:
    """Where pieces begin: every `step` pixels, and one that ends with the picture."""
    starts = list(range(0, length - crop + 1, step))
    return starts if starts[-1] + crop == length else [*starts, length - crop]


def _entries(path: Path, crop: int | None, step: int, multiple: int, strip: str) -> list[_Entry]:
    """The entries that a picture becomes."""
    image, key = open_image(str(path)), path.stem.removesuffix(strip)
    width, height = (side // multiple * multiple for side in image.size)
    if crop is None and image.format == 'PNG' and image.size == (width, height):
        return [_Entry(key, path.read_bytes(), (height, width, len(image.getbands())))]
    image = orient(image, str(path))
    width, height = (side // multiple * multiple for side in image.size)
    if crop is None:
        return [_encode(key, image.crop((0, 0, width, height)))]
    if min(width, height) < crop:
        raise ValueError(f'{path} has {image.width} x {image.height} pixels, fewer than a piece of {crop} x {crop}; '
                         'take it out, or set --crop to less')
    corners = [(x, y) for y in _starts(height, crop, step) for x in _starts(width, crop, step)]
    return [_encode(f'{key}_s{number:03}', image.crop((x, y, x + crop, y + crop)))
            for number, (x, y) in enumerate(corners, 1)]


def _encode(key: str, image: Image.Image) -> _Entry:
    if image.mode not in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'):
        image = convert_mode(image, 'RGB')
    buffer = io.BytesIO()
    image.save(buffer, 'PNG', compress_level=PNG_LEVEL)
    return _Entry(key, buffer.getvalue(), (image.height, image.width, len(image.getbands())))


def _write(environment: Any, full: type[Exception], entries: Sequence[_Entry]) -> None:
    """Put entries into the LMDB in one go, which grows when it is full."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for entry in entries:
                    if not transaction.put(entry.key.encode(), entry.content, overwrite=False):
                        raise ValueError(f'two pictures are called {entry.key}; rename one of them, or give each '
                                         'folder an LMDB of its own')
            return
        except full:
            environment.set_mapsize(2 * environment.info()['map_size'])


def make_lmdb(
        folders: Sequence[str | Path],
        target: str | Path,
        crop: int | None = None,
        step: int | None = None,
        multiple: int = 1,
        strip: str = '',
        workers: int = 4,
        progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> int:
    """Writes the pictures of folders into an LMDB of BasicSR's form, which appears whole or not at all.

    PNG files are taken as they are, other kinds are encoded as PNG.

    Args:
        folders: Where the pictures lie.
        target: The LMDB, a folder that must not exist.
        crop: Side of the pieces that pictures are cut into, `NAME_s001` and so on; None keeps them whole.
        step: From one piece to the next; `crop` when None. The last piece ends with the picture.
        multiple: Pictures lose what is beyond a multiple of this many pixels. For good pictures it is the scale, so
            that pieces begin where those of the small ones do.
        strip: What the names lose at their end, such as 'x2', so that small pictures are called like the good ones.
        workers: Threads that read and encode.
        progress: Wraps the list of files, to show how far it is.

    Returns:
        The number of entries.
    """
    target, step = Path(target), crop if step is None else step
    for name, value in (('crop', crop), ('step', step), ('multiple', multiple), ('workers', workers)):
        if value is not None and value < 1:
            raise ValueError(f'{name} is {value}; it must be 1 or more')
    if target.suffix != '.lmdb':
        raise ValueError(f'{target} must end in .lmdb')
    if target.exists():
        raise FileExistsError(f'{target} exists already; remove it first, or choose another name')
    paths = [path for folder in folders for path in list_pictures(Path(folder))]
    lmdb = _import_lmdb()
    scratch = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    scratch.mkdir(parents=True)
    lines: list[str] = []
    try:
        with lmdb.open(str(scratch), map_size=MAP_SIZE, lock=False) as environment, \
                ThreadPoolExecutor(workers) as pool:
            for batch in batches(progress(paths), 2 * workers):
                jobs = [pool.submit(_entries, path, crop, step or 1, multiple, strip) for path in batch]
                entries = [entry for job in jobs for entry in job.result()]
                _write(environment, lmdb.MapFullError, entries)
                lines += [f'{entry.key}.png ({",".join(map(str, entry.shape))}) {PNG_LEVEL}' for entry in entries]
            environment.sync(True)
        (scratch / META).write_text('\n'.join(lines) + '\n', encoding='utf-8')
        os.rename(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return len(lines)
