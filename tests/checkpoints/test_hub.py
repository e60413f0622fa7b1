"""`visionssm push` and `pull`: what they write is what timm's loaders, and ours, read; no network is used."""
import json
import types
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from timm.models import _hub

import visionssm
from visionssm.checkpoints import CheckpointError, load_state_dict, save_safetensors
from visionssm.checkpoints.load import read_metadata
from visionssm.cli import main
from visionssm.conversion import read_source
from visionssm.hub import pack
from visionssm.models._describe import timm_config

CLASSES = ('bee', 'fly', 'owl')


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return visionssm.create_model('vmamba_pico', num_classes=3).eval()


@pytest.fixture
def best(model, tmp_path: Path) -> Path:
    """What a training here leaves."""
    config = timm_config(model, CLASSES, {'mean': (0.1, 0.2, 0.3), 'input_size': (3, 48, 48)})
    notes = {'accuracy/top1': 71.5, 'epoch': 3, 'licence': 'mit'}
    return save_safetensors(model.state_dict(), tmp_path / 'best.safetensors',
                            {'config': json.dumps(config), 'notes': json.dumps(notes)})


@pytest.fixture
def restorer(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = {'architecture': 'mambair_pico', 'task': 'restoration', 'model_args': {'upscale': 3}}
    weights = visionssm.create_model('mambair_pico', upscale=3).state_dict()
    return save_safetensors(weights, tmp_path / 'sr.safetensors', {'config': json.dumps(config)})


class Hub:
    """Stands in for the hub: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []

    def __call__(self, **options) -> 'Hub':
        self.options = options
        return self

    def create_repo(self, name: str, private: bool = False, exist_ok: bool = False) -> types.SimpleNamespace:
        assert exist_ok
        self.private.setdefault(name, private)
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(repo_id=name)

    def file_exists(self, name: str, file: str) -> bool:
        return (self.root / name / file).exists()

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
        for path in Path(folder_path).iterdir():
            (self.root / repo_id / path.name).write_bytes(path.read_bytes())
        self.commits.append(commit_message)
        return f'commit {len(self.commits)}'

    def download(self, repo_id: str, filename: str, **options: object) -> str:
        path = self.root / repo_id / filename
        if not path.exists():
            raise huggingface_hub.errors.EntryNotFoundError(f'{path.name} is not there')
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / 'hub')
    monkeypatch.setattr(huggingface_hub, 'HfApi', found)
    monkeypatch.setattr(_hub, 'hf_hub_download', found.download)
    return found


def test_timm_reads_the_folder(best: Path, model, tmp_path: Path, capsys):
    folder = tmp_path / 'shared'
    assert main(['push', str(best), str(folder)]) == 0
    assert capsys.readouterr().out == f'vmamba_pico  {folder}\n'
    assert {path.name for path in folder.iterdir()} == {'config.json', 'model.safetensors', 'README.md'}
    for create in (timm.create_model, visionssm.create_model):
        again = create(f'local-dir:{folder}', pretrained=True).eval()
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(again(x), model(x))
        cfg = again.pretrained_cfg
        assert (tuple(cfg['mean']), tuple(cfg['input_size'])) == ((0.1, 0.2, 0.3), (3, 48, 48))
        assert tuple(cfg['label_names']) == CLASSES


def test_timm_reads_the_repository(best: Path, model, hub: Hub, capsys):
    assert main(['push', str(best), 'hf-hub:bird/net', '--private']) == 0
    assert 'vmamba_pico  commit 1' in capsys.readouterr().out and hub.private == {'bird/net': True}
    assert hub.options['library_name'] == 'visionssm' and 'token' not in hub.options
    again = timm.create_model('hf-hub:bird/net', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), model(x))
    card = hub.root / 'bird' / 'net' / 'README.md'
    card.write_text('mine')
    assert main(['push', str(best), 'hf-hub:bird/net']) == 0
    assert card.read_text() == 'mine' and hub.commits == ['Add vmamba_pico'] * 2


@pytest.mark.parametrize('kind', ['folder', 'repository'])
def test_pull_gives_one_file_that_says_what_it_holds(kind: str, best: Path, model, hub: Hub, tmp_path: Path, capsys):
    place = str(tmp_path / 'shared') if kind == 'folder' else 'hf-hub:bird/net'
    assert main(['push', str(best), place]) == 0
    out = tmp_path / 'one.safetensors'
    assert main(['pull', place, '-o', str(out)]) == 0
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in load_state_dict(out).items())
    assert json.loads(read_metadata(out)['config']) == json.loads(read_metadata(best)['config'])
    assert json.loads(read_metadata(out)['notes'])['accuracy/top1'] == 71.5
    assert main(['pull', place, '-o', str(out)]) == 1
    assert 'is there already; --force replaces it' in capsys.readouterr().err
    assert pack(read_source(out)).config['architecture'] == 'vmamba_pico'


def test_models_of_other_tasks_have_the_same_layout(restorer: Path, hub: Hub, tmp_path: Path):
    folder = tmp_path / 'shared'
    assert main(['push', str(restorer), str(folder), '--licence', 'apache-2.0']) == 0
    assert main(['push', str(restorer), 'hf-hub:bird/sr']) == 0
    wanted = load_state_dict(restorer)
    for place in (f'local-dir:{folder}', 'hf-hub:bird/sr'):
        again = visionssm.create_model(place, pretrained=True)
        assert again.upscale == 3 and all(torch.equal(value, wanted[key]) for key, value in again.state_dict().items())
        fresh = visionssm.create_model(place).state_dict()
        assert fresh.keys() == wanted.keys() and not all(torch.equal(fresh[key], wanted[key]) for key in wanted)
    card = (folder / 'README.md').read_text()
    assert 'pipeline_tag: image-to-image' in card and 'library_name: visionssm' in card
    assert "visionssm.create_model('local-dir:shared', pretrained=True)" in card


def test_the_card_states_licence_and_metrics(best: Path, tmp_path: Path, capsys):
    card = pack(read_source(best)).card('bird/net')
    assert card.startswith('---\ntags:\n- image-classification\n- timm\n- visionssm\n')
    for line in ('license: mit', '# Model card for net', '- **Architecture:** vmamba_pico', '- **Input:** 3 x 48 x 48',
                 '  - accuracy/top1: 71.5', "model = timm.create_model('hf-hub:bird/net', pretrained=True).eval()"):
        assert f'{line}\n' in card
    assert 'epoch' not in card
    assert 'license: cc-by-4.0\n' in pack(read_source(best)).card('bird/net', 'cc-by-4.0')


def test_a_licence_that_nobody_stated_is_not_invented(restorer: Path, tmp_path: Path, capsys):
    assert main(['push', str(restorer), str(tmp_path / 'shared')]) == 0
    assert 'the file states no licence' in capsys.readouterr().err
    assert 'license: other\nlicense_name: not-stated\n' in (tmp_path / 'shared' / 'README.md').read_text()


def test_a_folder_with_a_model_is_left_alone(best: Path, tmp_path: Path, capsys):
    folder = tmp_path / 'shared'
    assert main(['push', str(best), str(folder)]) == 0
    (folder / 'README.md').write_text('mine')
    assert main(['push', str(best), str(folder)]) == 1
    assert 'has config.json and model.safetensors already; --force' in capsys.readouterr().err
    assert main(['push', str(best), str(folder), '--force']) == 0
    assert (folder / 'README.md').read_text() == 'mine'


def test_bare_weights_need_no_name_where_their_keys_tell_it(model, tmp_path: Path):
    path = save_safetensors(model.state_dict(), tmp_path / 'bare.safetensors')
    config = pack(read_source(path)).config
    assert (config['architecture'], config['num_classes']) == ('vmamba_pico', 3)
    with pytest.raises(CheckpointError, match='does not fit'):
        pack(read_source(path), 'vim_pico')
    official = save_safetensors(visionssm.to_official('vmamba', model), tmp_path / 'theirs.safetensors')
    with pytest.raises(CheckpointError, match='give --name, or bring a file of the authors into our layout'):
        pack(read_source(official))


@pytest.mark.parametrize(('config', 'kind'), [
    ({'scope': 'mmdet', 'cfg': ''}, 'a detector or segmenter of OpenMMLab'),
    ({'task': 'backbone', 'architecture': 'vmamba_pico'}, 'a backbone without its classifier')])
def test_what_no_loader_builds_is_refused(config: dict, kind: str, model, tmp_path: Path, capsys):
    path = save_safetensors(model.state_dict(), tmp_path / 'd.safetensors', {'config': json.dumps(config)})
    assert main(['push', str(path), str(tmp_path / 'shared')]) == 1
    assert f'holds {kind}' in capsys.readouterr().err and not (tmp_path / 'shared').exists()


def test_weights_of_another_model_are_refused(best: Path, tmp_path: Path, capsys):
    assert main(['push', str(best), str(tmp_path / 'shared')]) == 0
    path = tmp_path / 'shared' / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'architecture': 'vim_pico'}))
    assert main(['pull', str(tmp_path / 'shared'), '-o', str(tmp_path / 'x.safetensors')]) == 1
    assert 'does not fit' in capsys.readouterr().err
    path.write_text('{')
    assert main(['pull', str(tmp_path / 'shared')]) == 1
    assert 'is damaged' in capsys.readouterr().err
    path.write_text('{"architecture": "no_such_model"}')
    assert main(['pull', str(tmp_path / 'shared')]) == 1
    assert "names the model 'no_such_model'" in capsys.readouterr().err


def test_places_that_are_not_there_are_told(best: Path, hub: Hub, tmp_path: Path, monkeypatch, capsys):
    assert main(['pull', str(tmp_path / 'gone')]) == 1
    assert 'There is no file' in capsys.readouterr().err
    assert main(['pull', 'hf-hub:bird/gone']) == 1
    assert 'config.json is not there' in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match='visionssm push writes such a folder'):
        visionssm.create_model(f'local-dir:{tmp_path / "gone"}')
    with pytest.raises(SystemExit):
        main(['push', str(best), 'hf-hub:bird'])
    with pytest.raises(SystemExit):
        main(['push', str(best), 'folder', '--private'])
    monkeypatch.setenv('VISIONSSM_OFFLINE', '1')
    assert main(['push', str(best), 'hf-hub:bird/net']) == 1
    assert 'no network may be used' in capsys.readouterr().err
