"""What every command-line tool does: with errors and interrupts, and with the folder that its results go to."""
import os
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ['check_folder', 'run_command']


def check_folder(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be made or written to, before long work whose results go there.

    Args:
        folder: The folder, which need not exist yet.
        option: The option that names it, with its value.

    Raises:
        NotADirectoryError: It, or what should hold it, is a file.
        PermissionError: It cannot be written.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f'{option}: {place} is a file, and is no folder')
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f'{option}: the folder {place} cannot be written')


def run_command(
        command: Callable[[], int],
        debug: bool = False,
        stopped: str = 'stopped',
        errors: tuple[type[BaseException], ...] = (OSError, ValueError, ImportError),
) -> int:
    """Run what a tool does; what its user can mend ends in one line on the standard error and an exit code.

    Args:
        command: The work; returns the exit code.
        debug: Show tracebacks instead.
        stopped: What to say after an interrupt from the keyboard.
        errors: The errors that a user can mend.

    Returns:
        The command's own code, 1 after an error, 130 after an interrupt.
    """
    try:
        return command()
    except errors as error:
        if debug:
            raise
        sys.stderr.write(f'error: {error}\n')
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        sys.stderr.write(f'\n{stopped}\n')
        return 130
