"""The command line: `visionssm COMMAND`, also as `python -m visionssm COMMAND` and `tools/COMMAND.py`."""
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from visionssm_launcher import importing

from ._version import __version__
from .utils.command import Command
from .utils.suggest import did_you_mean

__all__ = ['COMMANDS', 'Entry', 'load_command', 'main', 'run_tool']


class Entry(NamedTuple):
    """Where a command is, loaded when it is asked for.

    Attributes:
        place: `module:attribute` of a :class:`Command`, below this package.
        about: What it does, in a few words.
        extra: The extras that it needs.
    """

    place: str
    about: str
    extra: str = ''


COMMANDS = {
    'list': Entry('commands.list:show_list', 'list the models and their weights'),
    'info': Entry('commands.info:info', 'show what is known about a model: sizes, numbers, weights, licence, citation'),
    'doctor': Entry('commands.doctor:doctor', 'show what is installed, which kernels run, and whether they are right'),
    'completion': Entry('commands.completion:completion', 'let a shell complete commands and names', 'completion'),
    'bench': Entry('commands.bench:bench', 'time models side by side'),
    'download': Entry('commands.download:download', 'fetch, check and list official weights'),
    'convert': Entry('commands.convert:convert', "bring weights from their authors' layout into ours, and back"),
    'push': Entry('commands.hub:push', 'share a model in a folder or on the hub, as timm reads it'),
    'pull': Entry('commands.hub:pull', 'bring a shared model into one file'),
    'train': Entry('openmmlab.cli:train', 'train a model as a config says', 'mm'),
    'test': Entry('openmmlab.evaluate:evaluate', 'evaluate a model', 'mm'),
    'predict': Entry('openmmlab.predict:predict', 'say what images show, or restore them', 'mm'),
    'sample': Entry('openmmlab.diffusion.sample:sample', 'draw pictures with a diffusion model', 'mm,diffusion'),
    'cache-latents': Entry('openmmlab.diffusion.latents:cache_latents', 'encode pictures for trainings on latents',
                           'mm,diffusion'),
    'fid': Entry('openmmlab.diffusion.fidelity:run_fid', 'compare drawn pictures with real ones', 'mm,diffusion'),
    'export': Entry('export.tool:export', 'write a model as ONNX, as an archive of torch.export, or as weights',
                    'export'),
    'visualize': Entry('analysis.tool:visualize', 'draw what a model sees, its scan routes, and what its scans carry'),
    'demo': Entry('demo.tool:demo', 'show a page in the browser to try models with pictures', 'demo'),
}


def load_command(name: str) -> Command:
    """Import a command.

    Args:
        name: One of `COMMANDS`.

    Returns:
        The command.

    Raises:
        ImportError: A package that it needs is not installed; the message names the extra.
    """
    entry = COMMANDS[name]
    module, attribute = entry.place.split(':')
    try:
        return getattr(importlib.import_module(f'{__package__}.{module}'), attribute)
    except ImportError as error:
        if not entry.extra:
            raise
        raise ImportError(f"{error}\n{name} needs the package with its extra: pip install 'visionssm[{entry.extra}]', "
                          f"or in a checkout pip install -e '.[{entry.extra}]'") from error


def run_tool(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command; one that cannot be imported ends in a line on the standard error.

    Args:
        name: One of `COMMANDS`.
        argv: Its arguments; None takes the process's.
        prog: Name of the program in messages; None takes the process's.

    Returns:
        Exit code.
    """
    try:
        with importing():
            command = load_command(name)
    except ImportError as error:
        if '--debug' in (sys.argv if argv is None else argv):
            raise
        sys.stderr.write(f'error: {error}\n')
        return 1
    return command(argv, prog)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f'  {name:<{width}}  {entry.about}' for name, entry in COMMANDS.items()]
    return '\n'.join(['usage: visionssm COMMAND [OPTIONS]', '', 'The model zoo of visual state-space models.', '',
                      'commands:', *rows, '', 'visionssm COMMAND --help tells the options of one.', ''])


def main(argv: Sequence[str] | None = None) -> int:
    """Run `visionssm COMMAND`.

    Args:
        argv: The arguments; None takes the process's.

    Returns:
        Exit code: the command's own, 2 for one that there is not.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ('-h', '--help', 'help'):
        (sys.stdout if given else sys.stderr).write(_usage())
        return 0 if given else 2
    if given[0] in ('-V', '--version'):
        sys.stdout.write(f'visionssm {__version__}\n')
        return 0
    if given[0] not in COMMANDS:
        sys.stderr.write(f'error: there is no command {given[0]!r}. {did_you_mean(given[0], list(COMMANDS))} '
                         'See visionssm --help.\n')
        return 2
    return run_tool(given[0], given[1:], f'visionssm {given[0]}')
