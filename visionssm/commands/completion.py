"""`visionssm completion`: scripts that let a shell complete commands, options and names of models."""
import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import shtab

from .. import cli
from ..checkpoints import list_weights
from ..checkpoints.catalogue import families
from ..utils.command import Command
from ..utils.files import atomic_write
from .cards import tasks

__all__ = ['build_parser', 'completion']

MODELS = {('info', 'names'), ('bench', 'names'), ('list', 'pattern'), ('export', 'name'), ('visualize', 'name'),
          ('convert', 'name'), ('predict', 'model'), ('test', 'model')}
WEIGHTS = {('info', 'names'), ('download', 'names'), ('export', 'name')}
FILES = ('checkpoint', 'config', 'images', 'file', 'from_file', 'classes', 'out')
FOLDERS = ('work_dir', 'cache_dir', 'show_dir', 'data')


def _choices(command: str, dest: str) -> list[str]:
    """Return the names that stand for an argument of a command; none where they are not models, weights or families."""
    if dest == 'family':
        return families()
    names: set[str] = set()
    if (command, dest) in MODELS:
        names |= tasks().keys()
    if (command, dest) in WEIGHTS:
        names |= set(list_weights())
    return sorted(names)


def _mark(command: str, actions: Iterable[argparse.Action]) -> None:
    """Say of every argument what completes it."""
    for action in actions:
        names = _choices(command, action.dest)
        if names:
            action.choices = names
        elif action.choices is None and action.dest in (*FILES, *FOLDERS) and action.nargs != 0:
            setattr(action, 'complete', shtab.FILE if action.dest in FILES else shtab.DIRECTORY)  # noqa: B010


def build_parser() -> argparse.ArgumentParser:
    """Build one parser of all commands, for completion alone; a command whose extra is missing keeps its name."""
    parser = argparse.ArgumentParser('visionssm', description='The model zoo of visual state-space models.')
    parser.add_argument('-V', '--version', action='store_true', help='show the version')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND')
    for name, entry in cli.COMMANDS.items():
        own = commands.add_parser(name, help=entry.about, description=entry.about)
        try:
            command = cli.load_command(name)
        except ImportError as error:
            sys.stderr.write(f'the options of {name} are left out: {str(error).splitlines()[0]}\n')
            continue
        command.add_all_options(own)
        _mark(name, own._actions)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('shell', choices=shtab.SUPPORTED_SHELLS)
    parser.add_argument('-o', '--out', metavar='FILE', help='write the script there instead of to the standard output')


def _completion(args: argparse.Namespace) -> int:
    script = shtab.complete(build_parser(), args.shell) + '\n'
    if args.out is None:
        sys.stdout.write(script)
        return 0
    out = Path(args.out).expanduser()
    if out.is_dir():
        raise IsADirectoryError(f'--out {out} is a folder; give a file')
    atomic_write(script, out)
    sys.stdout.write(f'{out}: it counts in new shells\n')
    return 0


completion = Command('Write a script that lets a shell complete commands, options and names of models. In bash: '
                     'visionssm completion bash -o ~/.local/share/bash-completion/completions/visionssm', _add_options,
                     _completion)
