"""Fetching of one file over HTTP: resumed after a break, checked before it gets its name."""

import errno
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from visionssm._version import __version__
from visionssm.utils.files import atomic_write

__all__ = ['DownloadError', 'fetch_file', 'hash_file']

_logger = logging.getLogger('visionssm')
_BLOCK = 1 << 20
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class DownloadError(OSError):
    """A file that could not be fetched, or that is not the expected one."""


class _WrongError(DownloadError):
    """What came is not the expected file."""


class _BrokenError(Exception):
    """A transfer that broke off and may go on."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request: urllib.request.Request, fp: Any, code: int, message: str, headers: Any,
                         url: str) -> urllib.request.Request | None:
        if request.type == 'https' and not url.startswith('https:'):
            raise DownloadError(f'it redirects from https to {url}, where anyone between could change the file')
        return super().redirect_request(request, fp, code, message, headers, url)


def hash_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest() if sys.version_info >= (3, 11) else _hash_blocks(file)


def _hash_blocks(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def fetch_file(
        url: str,
        target: str | os.PathLike,
        size: int | None = None,
        sha256: str | None = None,
        progress: bool = True,
        timeout: float = 30.,
        attempts: int = 4,
        pause: float = 1.,
) -> str:
    """Fetch a file; what an earlier call left in `TARGET.part` is gone on with where the server can.

    Proxies are those of the environment (`HTTPS_PROXY`, `NO_PROXY`, ...).

    Args:
        url: Address.
        target: Where the file goes; its name appears when the file is complete and checked.
        size: Number of bytes that it must have; whatever the server states when None.
        sha256: Hash that it must have; any when None.
        progress: Show how much has come, how fast and how long it will take.
        timeout: Seconds without a byte after which the server counts as silent.
        attempts: How often in a row a broken transfer is taken up again without getting further.
        pause: Seconds before the first new attempt; doubled each time.

    Returns:
        The hash of the file.

    Raises:
        DownloadError: The server does not give the file, or gives another one, which is deleted.
        OSError: The disk is full or not writable. What has come is kept for the next call.
    """
    target = Path(target)
    part = target.with_name(f'{target.name}.part')
    failures, before = 0, _size(part)
    resumed = before > 0
    while True:
        try:
            _receive(url, part, size, sha256 is not None, progress, timeout)
            found = _check(part, size, sha256)
            break
        except _WrongError:
            if not resumed:
                raise
            # the part may have been of another file
            resumed, failures, before = False, 0, 0
        except _BrokenError as error:
            now = _size(part)
            failures = 1 if now > before else failures + 1
            before = now
            if failures >= attempts:
                kept = f'; {now} bytes are kept in {part}' if now else ''
                raise DownloadError(f'{error}, {attempts} times in a row{kept}') from error
            _logger.info('%s: %s; trying again', url, error)
            time.sleep(min(pause * 2 ** (failures - 1), 30.))
    _state(part).unlink(missing_ok=True)
    os.replace(part, target)
    return found


def _receive(url: str, part: Path, size: int | None, hashed: bool, progress: bool, timeout: float) -> None:
    """Read from the server once, from the start or from where the partial file ends."""
    have = _size(part)
    headers = {'User-Agent': f'visionssm/{__version__}', 'Accept-Encoding': 'identity'}
    validator = _read_state(part).get(url)
    if have and (validator or hashed):
        # without a validator the hash of the whole file tells whether the parts belong together
        headers['Range'] = f'bytes={have}-'
        if validator:
            headers['If-Range'] = validator
    with _opened(url, headers, timeout, part) as response:
        if response is None:
            return
        begin = _begin(response, have)
        rest = response.headers.get('Content-Length')
        total = begin + int(rest) if rest and rest.isdigit() else None
        if size is not None and total is not None and total != size:
            raise DownloadError(f'the server offers {total} bytes, the catalogue says {size}')
        _check_space(part, begin, total if total is not None else size)
        _write_state(part, url, response)
        with _bar(part, begin, total, progress) as bar:
            got = begin + _copy(response, part, begin, bar)
    if total is not None and got != total:
        raise _BrokenError(f'the connection ended after {got} of {total} bytes')


@contextmanager
def _opened(url: str, headers: Mapping[str, str], timeout: float, part: Path) -> Iterator[Any]:
    """Yield the response; None where the server says that the partial file is all there is."""
    opener = urllib.request.build_opener(_SafeRedirects)
    try:
        with opener.open(urllib.request.Request(url, headers=dict(headers)), timeout=timeout) as response:
            yield response
    except urllib.error.HTTPError as error:
        if error.code == 416:
            total = re.fullmatch(r'bytes \*/(\d+)', error.headers.get('Content-Range', ''))
            if total and int(total[1]) == _size(part):
                yield None
                return
            part.unlink(missing_ok=True)
            raise _BrokenError('the server has no such part of the file') from error
        if error.code in _BUSY:
            raise _BrokenError(f'the server answers {error.code} {error.reason}') from error
        raise DownloadError(f'the server answers {error.code} {error.reason}') from error
    except DownloadError:
        raise
    except urllib.error.URLError as error:
        raise _BrokenError(f'no connection ({error.reason})') from error
    except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise _BrokenError(f'the connection broke ({str(error) or type(error).__name__})') from error


def _begin(response: Any, have: int) -> int:
    """Return at which byte the answer begins."""
    if response.status != 206:
        return 0
    found = re.match(r'bytes (\d+)-', response.headers.get('Content-Range', ''))
    if not found or int(found[1]) != have:
        raise DownloadError(f'it was asked for the bytes from {have} on and sent others')
    return have


def _copy(response: Any, part: Path, begin: int, bar: tqdm) -> int:
    """Append what comes to the partial file; return the number of bytes."""
    count = 0
    with _disk(part), open(part, 'ab' if begin else 'wb') as file:
        while block := _next(response):
            file.write(block)
            count += len(block)
            bar.update(len(block))
    return count


def _next(response: Any) -> bytes:
    try:
        return response.read1(_BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(f'the connection broke ({str(error) or type(error).__name__})') from error


@contextmanager
def _disk(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = f'; {_size(part)} bytes are kept in {part}: make room and start again' if error.errno == errno.ENOSPC \
            else ''
        raise OSError(error.errno, f'Cannot write {str(part)!r}: {error.strerror}{kept}') from error


def _check_space(part: Path, begin: int, total: int | None) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - begin > free:
        raise OSError(errno.ENOSPC, f'No space for {part.name.removesuffix(".part")}: {total - begin} bytes are to '
                                    f'come, {free} are free in {str(part.parent)!r}')


def _check(part: Path, size: int | None, sha256: str | None) -> str:
    """Return the hash of what has come, or delete it and say what is wrong with it."""
    with open(part, 'rb') as file:
        first = file.read(64).lstrip()
    found = hash_file(part)
    wrong = ''
    if first.startswith(b'<'):
        wrong = 'the server sent a web page in the place of the file'
    elif size is not None and _size(part) != size:
        wrong = f'the file has {_size(part)} bytes, expected {size}'
    elif sha256 is not None and found != sha256:
        wrong = f'the file has the hash {found}, expected {sha256}'
    if wrong:
        part.unlink()
        _state(part).unlink(missing_ok=True)
        raise _WrongError(f'{wrong}; it was deleted')
    return found


def _bar(part: Path, begin: int, total: int | None, progress: bool) -> tqdm:
    # a log is no place for ten lines a second
    return tqdm(total=total, initial=begin, desc=part.name.removesuffix('.part'), unit='B', unit_scale=True,
                unit_divisor=1024, mininterval=0.2 if sys.stderr.isatty() else 30., disable=not progress)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _state(part: Path) -> Path:
    return part.with_name(f'{part.name}.json')


def _read_state(part: Path) -> dict[str, str]:
    try:
        return dict(json.loads(_state(part).read_text(encoding='utf-8')))
    except (OSError, ValueError):
        return {}


def _write_state(part: Path, url: str, response: Any) -> None:
    etag = response.headers.get('ETag', '')
    # a weak one does not promise equal bytes
    validator = etag if etag and not etag.startswith('W/') else response.headers.get('Last-Modified', '')
    with _disk(part):
        atomic_write(json.dumps({url: validator}), _state(part))
