"""`visionssm completion`: the script, run in bash itself."""
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip('shtab')

from visionssm import cli  # noqa: E402
from visionssm.commands import completion  # noqa: E402

ROOT = Path(__file__).parents[2]
LIGHT = ('list', 'info', 'bench', 'download', 'export', 'doctor', 'completion')
ASK = r"""
source "$1"
ask() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    "$(complete -p visionssm | sed 's/.*-F \([^ ]*\).*/\1/')"
    echo "${COMPREPLY[@]}"
}
while read -r line; do eval "ask $line"; done
"""


@pytest.fixture(scope='module')
def script(tmp_path_factory) -> Path:
    """The script of bash, with the commands that load quickly and one whose extra is missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, 'COMMANDS', {**{name: cli.COMMANDS[name] for name in LIGHT},
                                        'dream': cli.Entry('commands.nothing:dream', 'dream', 'dream')})
        path = tmp_path_factory.mktemp('completion') / 'visionssm.bash'
        path.write_text(completion.shtab.complete(completion.build_parser(), 'bash'))
    return path


def complete(script: Path, *lines: str) -> list[list[str]]:
    """What bash offers for the last word of each line."""
    done = subprocess.run(['bash', '-c', ASK, 'bash', str(script)], input='\n'.join(lines) + '\n', text=True,
                          capture_output=True, check=True, cwd=ROOT)
    assert done.stderr == ''
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which('bash') is None, reason='needs bash')
def test_bash_completes_commands_options_models_and_files(script):
    found = complete(
        script, "visionssm ''", 'visionssm inf', 'visionssm info vssd_t', 'visionssm info vim_tiny vmamba_pi',
        'visionssm bench --dtype bf', 'visionssm bench --dtype float32 vmamba_pi',
        'visionssm download mask-rcnn_vssd-small_', 'visionssm list --family mambair', 'visionssm list --task seg',
        'visionssm export vim_tiny --format tor', 'visionssm export vim_tiny --checkpoint READ',
        'visionssm doctor --no', 'visionssm completion ba')
    assert set(found[0]) >= {*LIGHT, 'dream'}
    assert found[1:] == [
        ['info'], ['vssd_tiny', 'vssd_tiny.in1k', 'vssd_tiny.mesa_in1k'], ['vmamba_pico'], ['bfloat16'],
        ['vmamba_pico'], ['mask-rcnn_vssd-small_fpn_1x_coco'], ['mambair', 'mambairv2'], ['segmentation'],
        ['torch-export'], ['README.md'], ['--no-selftest'], ['bash']]


@pytest.mark.skipif(shutil.which('bash') is None, reason='needs bash')
def test_bash_knows_the_command(script):
    done = subprocess.run(['bash', '-c', 'source "$1"; complete -p visionssm', 'bash', str(script)],
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith('visionssm')


def test_a_command_whose_extra_is_missing_is_named(monkeypatch, run):
    monkeypatch.setattr(cli, 'COMMANDS', {'completion': cli.COMMANDS['completion'],
                                          'dream': cli.Entry('commands.nothing:dream', 'dream', 'dream')})
    done = run('completion', 'bash')
    assert done.code == 0 and done.err.startswith('the options of dream are left out: ') and 'dream' in done.out


@pytest.mark.parametrize('shell', ['zsh', 'fish', 'tcsh'])
def test_other_shells_get_scripts_that_they_can_read(monkeypatch, run, tmp_path, shell):
    monkeypatch.setattr(cli, 'COMMANDS', {name: cli.COMMANDS[name] for name in ('completion', 'info', 'bench')})
    done = run('completion', shell)
    assert done.code == 0 and 'vssd_tiny' in done.out
    if shell == 'tcsh' or not shutil.which(shell):
        return
    (tmp_path / 'script').write_text(done.out)
    subprocess.run([shell, '-n', str(tmp_path / 'script')], check=True)
    if shell == 'fish':
        asked = f'source {tmp_path}/script; complete -C "visionssm info vssd_t"'
        offered = subprocess.run(['fish', '-c', asked], capture_output=True, text=True, check=True).stdout
        assert {line.split()[0] for line in offered.splitlines()} == {
            'vssd_tiny', 'vssd_tiny.in1k', 'vssd_tiny.mesa_in1k'}


def test_the_script_goes_to_a_file_whose_folder_is_made(monkeypatch, run, tmp_path):
    monkeypatch.setattr(cli, 'COMMANDS', {name: cli.COMMANDS[name] for name in ('completion', 'info')})
    done = run('completion', 'bash', '-o', tmp_path / 'completions' / 'visionssm')
    assert done.code == 0 and str(tmp_path) in done.out
    assert 'vssd_tiny' in (tmp_path / 'completions' / 'visionssm').read_text()
    assert run('completion', 'bash', '-o', tmp_path).code == 1


def test_an_unknown_shell_is_refused(run):
    done = run('completion', 'cmd')
    assert done.code == 2 and "invalid choice: 'cmd'" in done.err
