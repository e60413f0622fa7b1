"""Files that are never half-written: a name shows either the old content or all of the new."""
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['atomic_write', 'replacing']


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a name to write to; what is there at the end takes the place of a file in one step.

    Args:
        path: The file; missing folders are made.

    Yields:
        A name in the same folder. After an error nothing of it remains, and the file is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}-{threading.get_ident()}.tmp')
    try:
        # some writers make files private; these follow the user's umask like any other file
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(content: bytes | memoryview | str, path: str | os.PathLike) -> None:
    """Write a file by :func:`replacing`.

    Args:
        content: What to write; text becomes UTF-8.
        path: Where; missing folders are made.

    Raises:
        OSError: The disk is full or not writable; what was there is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with replacing(path) as temporary, open(temporary, 'wb') as file:
            file.write(data)
    except OSError as error:
        raise OSError(error.errno, f'cannot write {path} ({len(data) / 2**20:.1f} MiB): {error.strerror}; '
                      'files that were there are untouched. Free some space or give another place, then run the '
                      'command again, with --resume if it has that option') from error
