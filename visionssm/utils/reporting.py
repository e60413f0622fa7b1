"""What a command tells while it works: text for a person, or lines of JSON for a program."""
import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

__all__ = ['Report']


class Report:
    """A context in which a command says what it found, one thing at a time.

    As JSON, each thing is a line of its own on the standard output and nothing else is: all that is written there
    meanwhile, by whatever library, goes to the standard error.

    Args:
        as_json: Lines of JSON instead of text.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._stdout: TextIO = sys.stdout
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> 'Report':
        self._stdout = sys.stdout
        if self.as_json:
            self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def say(self, found: Mapping[str, Any], text: str) -> None:
        """Write one thing, below a progress bar that may be there.

        Args:
            found: What was found, as JSON takes it.
            text: The same in words.
        """
        tqdm.write(json.dumps(found) if self.as_json else text, file=self._stdout)
        self._stdout.flush()

    def fail(self, path: Any, reason: str) -> None:
        """Write as JSON that a file failed; a person reads it in the log.

        Args:
            path: The file.
            reason: Why.
        """
        if self.as_json:
            self.say({'path': str(path), 'error': reason}, '')
