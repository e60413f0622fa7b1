"""Every command line of README and documentation is one: tools read its options, configs it names can be trained.

The quick ones, those that RUN matches, are run.
"""
import argparse
import configparser
import itertools
import re
import runpy
import shlex
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser

from visionssm.cli import COMMANDS, load_command, main

pytestmark = [pytest.mark.mm, pytest.mark.det, pytest.mark.seg, pytest.mark.diffusion, pytest.mark.export]
for package in ('mmengine', 'mmdet', 'mmseg', 'diffusers', 'onnx'):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = [ROOT / 'README.md', ROOT / 'kernels' / 'README.md', *sorted(ROOT.glob('docs/**/*.md'))]
PAGES = [path.relative_to(ROOT).as_posix() for path in FILES if '```bash' in path.read_text()]
ELSEWHERE = {'apt', 'ruff', 'mypy', 'gradio', 'cd', 'export', 'tensorboard'}  # programs that are not ours
RUN = re.compile(r'download --list$|predict (photo\.jpg|noisy\.png) --checkpoint checkpoints/mambair_pico')


class Parsed(Exception):
    """Raised in the place of what comes after reading the options."""


def command_lines(source: str, variables: dict[str, str]) -> Iterator[list[str]]:
    """The commands of a block as words, without comments; `NAME=value` is kept for the lines that follow."""
    for line in source.replace('\\\n', ' ').splitlines():
        line = string.Template(line).safe_substitute(variables)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=';&|')
        lexer.whitespace_split = True
        for joint, group in itertools.groupby(lexer, lambda word: word in ('&&', ';', '|')):
            words = [] if joint else list(group)
            while words and re.match(r'[A-Z_]+=', words[0]):
                name, _, variables[name] = words.pop(0).partition('=')
            if words:
                yield words


def read_options(tool: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a tool until it has read its options."""
    def parse_args(parser: argparse.ArgumentParser, *args) -> None:
        original(parser, *args)
        raise Parsed
    original = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
        patch.setattr(sys, 'argv', [str(tool), *arguments])
        patch.setattr(sys, 'path', [str(tool.parent), *sys.path])
        runpy.run_path(str(tool), run_name='__main__')


def check_command(name: str, arguments: list[str]) -> None:
    """Read the options of a command; a config that it trains is checked with the overrides, a quick one runs."""
    if name not in COMMANDS:
        assert name in ('--help', '--version'), f'there is no command {name}'
        return
    args = load_command(name).parse(arguments)
    if name == 'train' and args.config != 'CONFIG':
        from visionssm.openmmlab.cli import train_config
        train_config(args)
    if RUN.search(' '.join([name, *arguments])):
        assert main([name, *arguments]) == 0


def check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    match arguments:
        case ['-m', 'visionssm', name, *rest]:
            check_command(name, rest)
        case ['-m', 'pytest' | 'visionssm.openmmlab' | 'http.server', *_]:
            pass
        case ['-c', code]:
            compile(code, 'command line', 'exec')
        case [script, *rest] if script.startswith('tools/'):
            name = Path(script).stem.replace('_', '-')
            assert (ROOT / script).is_file(), f'{script} is not there'
            if name in COMMANDS:
                check_command(name, rest)
            else:
                read_options(ROOT / script, rest, monkeypatch)
        case [script, *_]:
            assert (ROOT / script).is_file(), f'{script} is not there'


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a command line cannot be run as it stands."""
    missing = [word for word in words if re.match('(configs|tools|tests)/', word) and not (ROOT / word).exists()]
    assert not missing, f'{missing} are not there'
    match words:
        case ['python', *arguments]:
            check_python(arguments, monkeypatch)
        case ['visionssm', name, *arguments]:
            check_command(name, arguments)
        case ['tools/dist_train.sh', config, number, *arguments] if number.isdigit():
            check_command('train', [config, *arguments])
        case ['make', *targets]:
            known = re.findall(r'^([a-z]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
            assert set(targets) <= set(known), f'make has {known}'
        case ['pip', *arguments]:
            setup = configparser.ConfigParser()
            setup.read(ROOT / 'setup.cfg')
            for extras in re.findall(r'^(?:\.|visionssm)\[(.*)\]$', '\n'.join(arguments), re.MULTILINE):
                assert set(extras.split(',')) <= set(setup['options.extras_require']), f'unknown extras: {extras}'
        case [program, *_]:
            assert program in ELSEWHERE, f'what is {program}?'


@pytest.mark.parametrize('page', PAGES)
def test_the_command_lines_are_read(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    wrong, variables = [], {}

    def check_block(example: Example) -> None:
        for words in command_lines(str(example.parsed), variables):
            try:
                check(words, monkeypatch)
            except (AssertionError, OSError, ValueError, ImportError, SystemExit) as error:
                wrong.append(f'{page}:{example.line}: {shlex.join(words)}: {type(error).__name__}: {error}')

    for example in Document.parse(str(ROOT / page), CodeBlockParser('bash', check_block)):
        example.evaluate()
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('line', [
    'python tools/trian.py CONFIG', 'visionssm trian', 'python tools/predict.py photo.jpg --modell vim_tiny',
    'python tools/make_composed_data.py --seeds 1', 'make demoo', "pip install '.[mm,sge]'", 'frobnicate',
    'python tools/train.py configs/classification/vim-nano.py',
    'python tools/train.py configs/classification/vim-pico_fashion-mnist.py --cfg-options model.modle.name=vim_tiny'])
def test_wrong_lines_are_found(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    [words] = command_lines(line, {})
    with pytest.raises((AssertionError, OSError, ValueError, ImportError, SystemExit)):
        check(words, monkeypatch)
