"""What the console script and tools/*.py begin with: the package needs seconds to import PyTorch, and this does not.

It stands beside the package, because Python imports a package before any module in it.
"""
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, ModuleType

__all__ = ['importing', 'main', 'run_tool']


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b'\nstopped\n')
    os._exit(130)


@contextmanager
def importing() -> Iterator[None]:
    """Let an interrupt from the keyboard end the process at once: as an exception, modules that load would show it."""
    # otherwise somebody else listens, or a shell has turned interrupts off
    ours = (threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    if ours:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _version() -> str:
    spec = find_spec('visionssm')
    assert spec is not None and spec.origin is not None
    return runpy.run_path(str(Path(spec.origin).with_name('_version.py')))['__version__']


def _load() -> ModuleType:
    try:
        with importing():
            from visionssm import cli
    except ImportError as error:
        if '--debug' in sys.argv:
            raise
        sys.exit(f'error: {error}\nInstall visionssm with what it needs: pip install visionssm, or in a checkout '
                 'pip install -e .')
    return cli


def main() -> int:
    """Run `visionssm COMMAND` with the arguments of the process; return the exit code."""
    if sys.argv[1:2] in (['-V'], ['--version']):
        sys.stdout.write(f'visionssm {_version()}\n')
        return 0
    return _load().main()


def run_tool(name: str) -> int:
    """Run one command with the arguments of the process, as `tools/COMMAND.py` does; return the exit code."""
    return _load().run_tool(name)
