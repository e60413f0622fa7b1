"""The cache of weights: files are fetched once, checked by their hash, and put in place for all who ask by name.

A file lies in `ROOT/FAMILY/` under the name it is published under, beside a record of its hash and origin. ROOT is what
`VISIONSSM_CACHE` names, else `checkpoints/visionssm` in the folder of torch.hub (`TORCH_HOME`). Files on the hub of
Hugging Face lie in the cache of that hub (`HF_HOME`), and only their records here.
"""

import errno
import json
import logging
import os
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from visionssm._version import __version__
from visionssm.utils.files import atomic_write

from .catalogue import Entry, split_hub
from .load import CheckpointError
from .transfer import DownloadError, fetch_file, hash_file

__all__ = ['Cached', 'Remote', 'add_file', 'cache_root', 'fetch', 'fetch_many', 'is_offline', 'look_up']

_logger = logging.getLogger('visionssm')
_YES = ('1', 'ON', 'YES', 'TRUE')
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True)
class Remote:
    """A file to fetch.

    Attributes:
        name: What to call it in messages.
        folder: Folder in the cache.
        file: Name in the cache.
        sources: Addresses, `https://...` or `hf://OWNER/REPOSITORY/FILE`, in the order to try.
        size: Size in bytes, None where it is not known.
        sha256: Hash, None where it is not known: then that of the first download counts from then on.
        by_hand: What to do where there are no sources.
    """

    name: str
    folder: str
    file: str
    sources: tuple[str, ...]
    size: int | None = None
    sha256: str | None = None
    by_hand: str = ''

    @classmethod
    def of(cls, wanted: 'Entry | Remote | str') -> 'Remote':
        """Return what to fetch for an entry of the catalogue, or for an address that stands in none."""
        if isinstance(wanted, Remote):
            return wanted
        if isinstance(wanted, Entry):
            return cls(wanted.name, wanted.family, wanted.stored_name, wanted.sources, wanted.size, wanted.sha256,
                       wanted.by_hand())
        base = os.path.basename(urllib.parse.unquote(urllib.parse.urlsplit(wanted).path)) or 'weights.pth'
        # other addresses may end in the same name
        return cls(wanted, 'urls', f'{sha256(wanted.encode()).hexdigest()[:8]}-{base}', (wanted,))


@dataclass(frozen=True)
class Cached:
    """A file that is there: where, its hash (SHA-256), and the address or file that it came from."""

    path: Path
    sha256: str
    source: str


def cache_root(cache_dir: str | os.PathLike | None = None) -> Path:
    """Return the folder of the cache: the given one, that of `VISIONSSM_CACHE`, or one in torch.hub's."""
    if cache_dir is not None:
        return Path(cache_dir)
    if os.environ.get('VISIONSSM_CACHE'):
        return Path(os.environ['VISIONSSM_CACHE']).expanduser()
    return Path(torch.hub.get_dir()) / 'checkpoints' / 'visionssm'


def is_offline() -> bool:
    """Return whether `VISIONSSM_OFFLINE`, or `HF_HUB_OFFLINE`, forbids to use a network."""
    return any(os.environ.get(name, '').upper() in _YES for name in ('VISIONSSM_OFFLINE', 'HF_HUB_OFFLINE'))


def look_up(wanted: Entry | Remote | str, cache_dir: str | os.PathLike | None = None) -> Cached | None:
    """Return what the cache records of a file, without reading the file; None where it is not there.

    Args:
        wanted: Entry of the catalogue, or an address.
        cache_dir: Folder of the cache.
    """
    remote = Remote.of(wanted)
    place = _place(remote, cache_dir)
    record = _read_record(place)
    path = Path(record.get('path') or place)
    if not path.is_file() or 'sha256' not in record:
        return None
    return Cached(path, record['sha256'], record.get('source', ''))


def fetch(
        wanted: Entry | Remote | str,
        cache_dir: str | os.PathLike | None = None,
        progress: bool = True,
        offline: bool | None = None,
) -> Cached:
    """Return a file of weights from the cache, fetched before where it is not there; its hash is checked either way.

    Args:
        wanted: Entry of the catalogue, or an address.
        cache_dir: Folder of the cache, also of files from the hub; as the environment says when None.
        progress: Show how much has come.
        offline: Use no network; as `VISIONSSM_OFFLINE` and `HF_HUB_OFFLINE` say when None.

    Raises:
        CheckpointError: The file can only be had by hand; the error says how.
        DownloadError: No source gives the expected file, or it is not in the cache and no network may be used.
        OSError: The cache cannot be written.
    """
    remote = Remote.of(wanted)
    found = _verified(remote, cache_dir)
    if found:
        return found
    if remote.by_hand or not remote.sources:
        raise CheckpointError(remote.by_hand or f'{remote.name} has no address.')
    place = _place(remote, cache_dir)
    with _locked(place):
        found = _verified(remote, cache_dir)  # another process may have been faster
        return found or _fetch_first(remote, place, cache_dir, progress, is_offline() if offline is None else offline)


def fetch_many(
        wanted: Iterable[Entry],
        fetch_one: Callable[[Entry], Cached],
        workers: int = 4,
) -> Iterator[tuple[Entry, Cached | Exception]]:
    """Fetch several files at once.

    Args:
        wanted: Entries of the catalogue.
        fetch_one: What fetches one; `fetch` with the options of the caller.
        workers: How many at a time.

    Yields:
        Entry and result, or what went wrong with it, in the order of the entries.
    """
    wanted = list(wanted)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(fetch_one, entry) for entry in wanted]
        for entry, future in zip(wanted, futures):
            try:
                yield entry, future.result()
            except (OSError, ValueError) as error:
                yield entry, error


def add_file(
        entry: Entry,
        path: str | os.PathLike,
        check: Callable[[Path], Any],
        cache_dir: str | os.PathLike | None = None,
) -> Cached:
    """Put a file that was fetched by hand into the cache, as if it had been downloaded.

    Args:
        entry: What the file is.
        path: The file; it is copied.
        check: Raises where the file, already under its name in the cache's folder, is not what the entry says.
        cache_dir: Folder of the cache.

    Raises:
        FileNotFoundError: There is no such file.
        DownloadError: The catalogue knows the size or hash of the file, and this one has another.
        OSError: The cache cannot be written.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'There is no file {str(path)!r}.')
    found = hash_file(path)
    if entry.sha256 not in (None, found):
        raise DownloadError(f'{path} is not {entry.name}: its hash is {found}, expected {entry.sha256}')
    place = _place(Remote.of(entry), cache_dir)
    with _locked(place):
        # averaged weights are told by the name of the file, so the check sees the final one
        temporary = place.parent / f'.{os.getpid()}' / place.name
        try:
            temporary.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, temporary)
            check(temporary)
            os.replace(temporary, place)
        finally:
            shutil.rmtree(temporary.parent, ignore_errors=True)
        return _record(place, place, found, str(path.resolve()))


def _fetch_first(remote: Remote, place: Path, cache_dir: str | os.PathLike | None, progress: bool,
                 offline: bool) -> Cached:
    """Fetch from the first source that gives the expected file."""
    known = remote.sha256 or _read_record(place).get('sha256')
    reasons = []
    for source in [*_mirrors(remote), *remote.sources]:
        hub = split_hub(source)
        try:
            if hub:
                path = _fetch_hub(hub, cache_dir, offline)
                return _record(place, path, _check_hub(path, remote, known), source)
            if not offline:
                return _record(place, place, fetch_file(source, place, remote.size, known, progress), source)
            reasons.append(f'{source}: no network may be used (VISIONSSM_OFFLINE, HF_HUB_OFFLINE, --offline)')
        except DownloadError as error:
            reasons.append(f'{source}: {error}')
    if known and not remote.sha256:
        reasons.append(f'The expected hash is that of the first download; if the authors replaced the file, delete '
                       f'{str(_note(place))!r}.')
    if remote.folder != 'urls':
        reasons.append('A file that you have is put in place by '
                       f'`python -m visionssm download {remote.name} --from-file FILE`.')
    raise DownloadError(f'{remote.name} could not be fetched:\n  ' + '\n  '.join(reasons))


def _mirrors(remote: Remote) -> list[str]:
    """Return where `VISIONSSM_MIRROR` says that copies are: FOLDER/FAMILY/FILE, or its pattern with {url} filled in."""
    found = []
    for base in os.environ.get('VISIONSSM_MIRROR', '').split():
        if '{url}' in base:
            found += [base.replace('{url}', source) for source in remote.sources if not split_hub(source)]
        else:
            found.append(f'{base.rstrip("/")}/{remote.folder}/{urllib.parse.quote(remote.file)}')
    return found


def _fetch_hub(hub: tuple[str, str, str | None], cache_dir: str | os.PathLike | None, offline: bool) -> Path:
    # timm depends on this package, and it keeps, resumes and locks its own files
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    repository, file, revision = hub
    folder = cache_root(cache_dir) / 'hub' if cache_dir is not None else None
    # the bases of the hub's error are those of the HTTP library that it uses
    errors: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, EntryNotFoundError, ValueError)
    try:
        return Path(hf_hub_download(
            repository, file, revision=revision, cache_dir=folder, local_files_only=offline, library_name='visionssm',
            library_version=__version__))
    except errors as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, *_UNWRITABLE):
            raise
        reason = f'{error} ({error.__cause__})' if error.__cause__ else str(error)
        raise DownloadError(' '.join(reason.split())) from error


def _check_hub(path: Path, remote: Remote, known: str | None) -> str:
    found = hash_file(path)
    if known not in (None, found):
        # the hub's cache keeps the content under a name of its own and links to it
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DownloadError(f'the file has the hash {found}, expected {known}; it was deleted')
    return found


def _verified(remote: Remote, cache_dir: str | os.PathLike | None) -> Cached | None:
    """Return a file of the cache if it is what it was; a damaged one is removed."""
    found = look_up(remote, cache_dir)
    if found is None:
        return None
    actual = hash_file(found.path)
    if actual == found.sha256 and remote.sha256 in (None, actual):
        return found
    _logger.warning('%s in the cache was damaged (its hash is %s, expected %s) and is removed.', found.path, actual,
                    remote.sha256 or found.sha256)
    found.path.resolve().unlink(missing_ok=True)
    found.path.unlink(missing_ok=True)
    return None


def _place(remote: Remote, cache_dir: str | os.PathLike | None) -> Path:
    return cache_root(cache_dir) / remote.folder / remote.file


def _note(place: Path) -> Path:
    return place.with_name(f'{place.name}.json')


def _read_record(place: Path) -> dict[str, str]:
    try:
        return dict(json.loads(_note(place).read_text(encoding='utf-8')))
    except (OSError, ValueError):
        return {}


def _record(place: Path, path: Path, digest: str, source: str) -> Cached:
    record = {'sha256': digest, 'size': path.stat().st_size, 'source': source,
              'fetched': datetime.now(timezone.utc).isoformat(timespec='seconds')}
    if path != place:
        record['path'] = str(path.absolute())
    atomic_write(json.dumps(record, indent=1), _note(place))
    return Cached(path, digest, source)


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Let one process at a time work on a file of the cache."""
    from huggingface_hub.utils import WeakFileLock

    with ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(place.with_name(f'.{place.name}.lock')))
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise
            raise OSError(
                error.errno, f'The cache of weights {str(place.parent)!r} cannot be written ({error.strerror}); name '
                f'another folder with VISIONSSM_CACHE, or with --cache-dir and cache_dir=') from error
        yield
