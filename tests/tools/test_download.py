"""`visionssm download`: what it lists, fetches, takes from files, and how it fails."""
import json
from pathlib import Path

import pytest
import torch

import visionssm
from visionssm import cli
from visionssm.checkpoints import catalogue, download
from visionssm.commands.download import download as download_command

ROOT = Path(__file__).resolve().parent.parent.parent
HEAD = 'repository: r\ncommit: c\npaper: p\nlicence: mit\ntask: classification\ntrained_on: d\nweights:\n'


@pytest.fixture(autouse=True)
def small_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'catalogue'
    folder.mkdir()
    (folder / 'vim.yaml').write_text(
        HEAD + '- {name: vim_pico, keys: k, page: "https://drive.example/1"}\n'
        '- {name: vim_pico.net, keys: k, file: n.pth, size: 3000000, sources: ["https://weights.invalid/n.pth"]}\n')
    monkeypatch.setattr(catalogue, 'FOLDER', folder)
    monkeypatch.setenv('VISIONSSM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('VISIONSSM_MIRROR', raising=False)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    path = tmp_path / 'mine.pth'
    torch.save({'model': visionssm.to_official('vim', visionssm.create_model('vim_pico'))}, path)
    return path


def test_the_list_says_what_is_here_and_what_is_not(official: Path, capsys):
    assert download_command(['--list']) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ['vim_pico', 'classification', 'mit', 'by', 'hand']
    assert rows[2] == ['vim_pico.net', 'classification', '3', 'MB', 'mit', 'to', 'fetch']
    assert download_command(['vim_pico', '--from-file', str(official)]) == 0
    assert download_command(['--list', '--json', 'vim_pico']) == 0
    facts = json.loads(capsys.readouterr().out.partition('[')[2].join(['[', '']))
    assert facts[0]['name'] == 'vim_pico' and Path(facts[0]['path']).is_file() and len(facts[0]['sha256']) == 64


def test_a_file_of_one_s_own_becomes_the_pretrained_weights(official: Path, capsys):
    assert cli.main(['download', 'vim_pico', '--from-file', str(official)]) == 0
    assert 'vim_pico.pth  sha256 ' in capsys.readouterr().out
    model = visionssm.create_model('vim_pico', pretrained=True)
    expected = torch.load(official, weights_only=True)['model']
    assert torch.equal(visionssm.to_official('vim', model)['head.weight'], expected['head.weight'])


def test_a_file_of_another_model_is_refused_with_every_key(tmp_path: Path, capsys):
    other = visionssm.create_model('vim_pico', embed_dim=32)
    torch.save(visionssm.to_official('vim', other), tmp_path / 'o.pth')
    assert download_command(['vim_pico', '--from-file', str(tmp_path / 'o.pth')]) == 1
    assert 'The file is not of vim_pico' in capsys.readouterr().err
    assert not list((tmp_path / 'cache').rglob('*.pth'))


def test_weights_to_be_fetched_by_hand_fail_by_name_and_are_skipped_otherwise(capsys, monkeypatch):
    assert download_command(['vim_pico']) == 1
    assert 'https://drive.example/1' in capsys.readouterr().err
    monkeypatch.setattr(download, 'fetch_file', lambda url, place, *args: place.write_bytes(b'x') and 'a' * 64)
    assert download_command(['--family', 'vim', '--json']) == 0
    out = capsys.readouterr()
    assert 'skipped, to be fetched by hand: vim_pico\n' in out.err
    assert [(facts['name'], facts['sha256']) for facts in json.loads(out.out)] == [('vim_pico.net', 'a' * 64)]


def test_failures_are_reported_in_json_too(capsys):
    assert download_command(['vim_pico.net', '--offline', '--json']) == 1
    out = capsys.readouterr()
    assert 'no network may be used' in json.loads(out.out)[0]['error'] and 'no network may be used' in out.err


@pytest.mark.parametrize(('arguments', 'message'), [
    ([], 'give a NAME, --family, --all or --list'),
    (['--from-file', 'f'], '--from-file takes exactly one NAME'),
    (['vim_pico', '--all', '--from-file', 'f'], '--from-file takes exactly one NAME'),
    (['vim_pico', '--workers', '0'], '--workers must be at least 1, got 0')])
def test_wrong_options_are_told(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as caught:
        download_command(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize('arguments', [['vim_pco'], ['--family', 'vimm']])
def test_unknown_names_end_in_one_line(arguments: list[str], capsys):
    assert download_command(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith('error: Unknown') and 'Did you mean' in err and err.count('\n') == 1


@pytest.mark.parametrize('command', [['tools/download.py'], ['-m', 'visionssm', 'download']])
def test_the_scripts_run(run_python, command: list[str]):
    done = run_python(*command, '--list', 'vmamba_tiny')
    assert done.returncode == 0 and done.stdout.splitlines()[1].startswith('vmamba_tiny.in1k')
