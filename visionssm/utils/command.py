"""What every command-line tool does with errors and interrupts."""
import sys
from collections.abc import Callable

__all__ = ['run_command']


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
