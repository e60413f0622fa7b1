"""The command line: its table of commands, what a command does with errors, and that nothing loads before its time."""
import importlib
import os
import subprocess
import sys

import pytest

from visionssm import cli
from visionssm.utils.command import Command, run_command
from visionssm.utils.files import atomic_write


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_every_command_of_the_table_has_options_and_help(name, capsys):
    pytest.importorskip('mmengine')
    for package in ('diffusers', 'torch_fidelity'):
        pytest.importorskip(package)
    with pytest.raises(SystemExit) as ended:
        cli.main([name, '--help'])
    assert ended.value.code == 0
    assert f'usage: visionssm {name} ' in capsys.readouterr().out


def test_help_names_every_command_and_wrong_ones_get_a_suggestion(capsys):
    assert cli.main(['--help']) == 0
    shown = capsys.readouterr().out
    assert all(f'  {name} ' in shown for name in cli.COMMANDS)
    assert cli.main(['--version']) == 0
    assert cli.main([]) == 2
    capsys.readouterr()
    assert cli.main(['donwload']) == 2
    assert "no command 'donwload'. Did you mean 'download'?" in capsys.readouterr().err


def test_a_missing_package_names_the_extra_and_debug_shows_where(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, 'dream', cli.Entry('commands.nothing:dream', 'dream', 'mm,dream'))
    assert cli.main(['dream']) == 1
    assert "pip install 'visionssm[mm,dream]'" in capsys.readouterr().err
    with pytest.raises(ImportError):
        cli.main(['dream', '--debug'])


def test_the_training_engine_names_its_extra_where_it_is_missing(monkeypatch):
    engine = pytest.importorskip('visionssm.openmmlab')
    monkeypatch.setitem(sys.modules, 'mmengine', None)
    with pytest.raises(ImportError, match=r'mmengine is not installed: pip install "visionssm\[mm\]"'):
        importlib.reload(engine)


def test_errors_end_in_one_line_and_interrupts_in_130(capsys):
    def work(args):
        raise {'value': ValueError('7 is odd'), 'stop': KeyboardInterrupt, 'bug': AssertionError}[args.how]

    command = Command('Work.', lambda parser: parser.add_argument('how'), work, stopped='stopped; go on')
    assert command(['value']) == 1 and capsys.readouterr().err == 'error: 7 is odd\n'
    assert command(['stop']) == 130 and capsys.readouterr().err == '\nstopped; go on\n'
    with pytest.raises(AssertionError):
        command(['bug'])
    with pytest.raises(ValueError, match='7 is odd'):
        command(['value', '--debug'])


@pytest.mark.parametrize(('lines', 'unbuffered'), [(3, ''), (100_000, '1')])
def test_a_reader_of_the_output_that_goes_away_ends_a_command_quietly(lines, unbuffered):
    code = ("import sys; from visionssm.utils.command import run_command; sys.stdin.read(); "
            f"sys.exit(run_command(lambda: [sys.stdout.write('a line' * 9) for _ in range({lines})] and 0))")
    environment = {**os.environ, 'PYTHONUNBUFFERED': unbuffered}
    with subprocess.Popen([sys.executable, '-c', code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, b'')


def test_a_broken_pipe_of_another_kind_stays_an_error(capsys):
    def work():
        raise BrokenPipeError('a worker is gone')

    assert run_command(work) == 1 and capsys.readouterr().err == 'error: a worker is gone\n'


def test_a_file_that_cannot_be_written_is_explained_for_any_command(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match=r'cannot write .*run the command again, with --resume if it has that option'):
        atomic_write('text', tmp_path / 'file' / 'new.json')


def test_the_table_of_commands_needs_no_extra(run_python):
    code = ("import sys; from visionssm import cli; cli.main(['--help']); "
            "bad = {'mmengine', 'cv2', 'matplotlib', 'diffusers', 'gradio'} & set(sys.modules); assert not bad, bad")
    done = run_python('-c', code)
    assert done.returncode == 0, done.stderr
