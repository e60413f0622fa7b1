"""What every command-line tool is made of: options, errors and interrupts, and the folder that its results go to."""
import argparse
import dataclasses
import os
import select
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ['Command', 'check_folder', 'run_command']


def _accept(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Find nothing wrong with any options."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command-line tool, called with its arguments (None for the process's); returns the exit code.

    What its user can mend ends in one line on the standard error; `--debug` shows the traceback instead.

    Args:
        description: What it does, in a sentence or two.
        add_options: Adds its options to a parser.
        run: The work; returns the exit code.
        check: Refuses options that do not go together, by `parser.error`, and may complete them.
        errors: The errors that a user can mend.
        stopped: What to say after an interrupt from the keyboard.
        intermixed: Options may stand between optional positional arguments.
    """

    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None] = _accept
    errors: tuple[type[BaseException], ...] = (OSError, ValueError, ImportError)
    stopped: str = 'stopped'
    intermixed: bool = False

    def add_all_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of this command, and those that every command has."""
        self.add_options(parser)
        parser.add_argument('--debug', action='store_true', help='show the traceback of an error')

    def parser(self, prog: str | None = None) -> argparse.ArgumentParser:
        """Return the parser of the options; `prog` is the name of the program in its messages."""
        parser = argparse.ArgumentParser(prog=prog, description=self.description)
        self.add_all_options(parser)
        return parser

    def parse(self, argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
        """Return the checked options; wrong ones end the process with exit code 2."""
        parser = self.parser(prog)
        args = parser.parse_intermixed_args(argv) if self.intermixed else parser.parse_args(argv)
        self.check(parser, args)
        return args

    def __call__(self, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
        args = self.parse(argv, prog)
        return run_command(lambda: self.run(args), args.debug, self.stopped, self.errors)


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
    try:
        # rights alone do not tell: of root, and in file systems that take no files
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise PermissionError(f'{option}: the folder {place} cannot be written ({error.strerror})') from error


def _reader_is_gone() -> bool:
    """Tell whether nobody reads the standard output any more, as behind `| head`; what is left for it is dropped."""
    try:
        number = sys.stdout.fileno()
    except OSError:
        return False
    # Windows has no poll
    if not hasattr(select, 'poll'):
        return False
    pipe = select.poll()
    pipe.register(number, 0)
    gone = any(event & select.POLLERR for _, event in pipe.poll(0))
    if gone:
        # Python writes the rest at its end, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return gone


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
        The command's own code, 1 after an error, 130 after an interrupt, 141 where the reader of the output went away.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code
    except errors as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 141
        if debug:
            raise
        sys.stderr.write(f'error: {error}\n')
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        sys.stderr.write(f'\n{stopped}\n')
        return 130
