"""What runs before the package is imported: the version without PyTorch, and interrupts from the keyboard."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from visionssm._version import __version__

LISTEN = 'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.path[:0] = '
PRESS = 'import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n'


@pytest.fixture
def launch(repo_root, tmp_path):
    """Runs Python code in a process where the package is what a test says, beside the launcher."""
    def call(package: str, code: str, *arguments: str) -> subprocess.CompletedProcess:
        folder = tmp_path / 'visionssm'
        folder.mkdir()
        (folder / '__init__.py').write_text(package)
        paths = [str(tmp_path), str(repo_root)]
        return subprocess.run([sys.executable, '-c', f'{LISTEN}{paths}; {code}', *arguments], capture_output=True,
                              text=True, timeout=60, check=False, env={**os.environ, 'PYTHONPATH': ''})

    return call


@pytest.mark.parametrize('how', ['main()', "run_tool('train')"])
@pytest.mark.skipif(os.name != 'posix', reason='needs signals of POSIX')
def test_an_interrupt_while_the_package_is_imported_ends_in_one_line(launch, how):
    done = launch(f'{PRESS}raise ValueError("it went on")', f'import visionssm_launcher as it; sys.exit(it.{how})')
    assert (done.returncode, done.stdout, done.stderr) == (130, '', '\nstopped\n')


@pytest.mark.skipif(os.name != 'posix', reason='needs signals of POSIX')
def test_interrupts_are_exceptions_again_afterwards_and_stay_off_where_a_shell_has_turned_them_off(launch):
    done = launch(PRESS, 'from visionssm_launcher import importing as i; s = signal\n'
                         'with i(): pass\nassert s.getsignal(s.SIGINT) is s.default_int_handler\n'
                         's.signal(s.SIGINT, s.SIG_IGN)\nwith i(): import visionssm\n'
                         'assert s.getsignal(s.SIGINT) is s.SIG_IGN; print("all")')
    assert (done.returncode, done.stdout) == (0, 'all\n'), done.stderr


def test_a_package_that_cannot_be_imported_ends_in_a_line_that_says_what_to_install(launch):
    done = launch('import not_there', 'import visionssm_launcher as it; sys.exit(it.main())', 'list')
    assert done.returncode == 1 and done.stderr.startswith("error: No module named 'not_there'\nInstall visionssm")


@pytest.mark.parametrize('option', ['--version', '-V'])
def test_the_version_is_told_without_importing_the_package(repo_root, option):
    code = 'import sys, visionssm_launcher as it; print(it.main(), {"visionssm", "torch"} & set(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code, option], capture_output=True, text=True, timeout=60, check=False,
                          cwd=repo_root)
    assert (done.returncode, done.stdout) == (0, f'visionssm {__version__}\n0 set()\n'), done.stderr


def test_every_tool_begins_with_the_launcher(repo_root: Path):
    wrong = []
    for path in sorted((repo_root / 'tools').glob('[!_]*.py')):
        tree = ast.walk(ast.parse(path.read_text()))
        nodes = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                 for node in sorted(nodes, key=lambda node: node.lineno)]
        first = next(name for name in names if name.partition('.')[0] not in sys.stdlib_module_names)
        if first != 'visionssm_launcher':
            wrong.append(f'{path.name} imports {first}')
    assert not wrong
