"""Running commands as the command line does."""
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from visionssm import cli


class Done(NamedTuple):
    """What a command left: exit code, standard output and standard error."""
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The standard output, all of which must be one JSON document."""
        return json.loads(self.out)


@pytest.fixture
def run(capsys) -> Callable[..., Done]:
    """Runs `visionssm ARGUMENTS`."""
    def call(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Done(code, *capsys.readouterr())

    return call
