"""The cache: one download for all, checked each time; mirrors, hub, offline, and errors that name every reason."""
import errno
import hashlib
import json
import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from visionssm.checkpoints import CheckpointError, DownloadError, fetch, find_entry
from visionssm.checkpoints.download import add_file, cache_root, fetch_many, look_up

CONTENT = b'PK\x03\x04' + bytes(range(256)) * 99
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def entry(server, add_catalogue):
    server.files['w.pth'] = CONTENT
    add_catalogue('fam', f'weights:\n- {{name: m.a, file: w.pth, keys: k, sources: ["{server.url("w.pth")}"]}}\n'
                         '- {name: m.drive, keys: k, page: "https://drive.example/1"}\n'
                         f'- {{name: m.known, file: k.pth, keys: k, sha256: "{HASH}", sources: '
                         f'["{server.url("gone.pth")}", "{server.url("w.pth")}"]}}\n'
                         '- {name: m.hub, file: h.pth, keys: k, sources: ["hf://org/repo/sub/h.pth"]}\n')
    return find_entry('m.a')


def get(entry, **options):
    return fetch(entry, progress=False, **options)


def test_a_file_is_fetched_once_and_its_hash_recorded(server, entry, cache: Path):
    for _ in range(2):
        found = get(entry)
        assert (found.path, found.sha256, found.source) == (cache / 'fam' / 'w.pth', HASH, server.url('w.pth'))
    assert len(server.requests) == 1
    record = json.loads((cache / 'fam' / 'w.pth.json').read_text())
    assert record['sha256'] == HASH and record['size'] == len(CONTENT) and record['fetched'].startswith('20')


def test_a_damaged_file_is_noticed_and_fetched_again(server, entry, cache: Path, caplog):
    (get(entry).path).write_bytes(CONTENT[::-1])
    assert get(entry).path.read_bytes() == CONTENT
    assert 'was damaged' in caplog.text and len(server.requests) == 2


def test_a_file_that_changes_at_its_source_is_refused(server, entry):
    get(entry).path.unlink()
    server.files['w.pth'] = other = CONTENT + b'!'
    with pytest.raises(DownloadError, match=f'{hashlib.sha256(other).hexdigest()}, expected {HASH}') as caught:
        get(entry)
    assert "if the authors replaced the file, delete '" in str(caught.value) and 'w.pth.json' in str(caught.value)


def test_the_next_source_is_tried_and_the_hash_of_the_catalogue_counts(server, entry):
    assert get(find_entry('m.known')).source == server.url('w.pth')
    server.files['w.pth'] = b'PK other'
    shutil.rmtree(cache_root())
    with pytest.raises(DownloadError) as caught:
        get(find_entry('m.known'))
    message = str(caught.value)
    assert f'{server.url("gone.pth")}: the server answers 404' in message
    assert f'{server.url("w.pth")}: the file has the hash' in message and f'expected {HASH}' in message
    assert 'python -m visionssm download m.known --from-file FILE' in message


@pytest.mark.parametrize('pattern', ['{}/copies', '{}/proxy?{{url}}'])
def test_mirrors_come_first(server, entry, monkeypatch, pattern: str):
    monkeypatch.setenv('VISIONSSM_MIRROR', f'{server.address}/nothing ' + pattern.format(server.address))
    server.files['copies/fam/w.pth'] = server.files[f'proxy?{server.url("w.pth")}'] = CONTENT
    found = get(entry)
    assert server.requests[0][0] == '/nothing/fam/w.pth'
    assert found.source.startswith((f'{server.address}/copies/', f'{server.address}/proxy?http'))
    assert not server.asked('w.pth')


def test_the_proxy_of_the_environment_is_used(server, monkeypatch):
    monkeypatch.setenv('http_proxy', server.address)
    monkeypatch.setenv('no_proxy', 'localhost')
    monkeypatch.delenv('NO_PROXY')
    server.files['ttp://weights.invalid/w.pth'] = CONTENT  # a proxy is asked for the whole address
    assert get('http://weights.invalid/w.pth').sha256 == HASH


@pytest.mark.parametrize('name', ['VISIONSSM_OFFLINE', 'HF_HUB_OFFLINE'])
def test_offline_only_what_is_there_is_used(server, entry, monkeypatch, name: str):
    monkeypatch.setenv(name, '1')
    with pytest.raises(DownloadError, match='no network may be used'):
        get(entry)
    assert not server.requests
    monkeypatch.delenv(name)
    get(entry)
    monkeypatch.setenv(name, '1')
    assert get(entry).sha256 == HASH


def test_what_only_a_browser_gets_is_explained(entry):
    with pytest.raises(CheckpointError, match=r'https://drive.example/1\).*--from-file FILE.*create_model'):
        get(find_entry('m.drive'))


def fetch_in_child(name: str, queue) -> None:
    queue.put(get(find_entry(name)).sha256)


def test_two_processes_share_one_download(server, entry):
    gate = threading.Event()

    def slow(handler, content: bytes) -> None:
        gate.wait(0.5)
        handler.answer(content)

    server.faults['w.pth'] = [slow]
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    children = [context.Process(target=fetch_in_child, args=('m.a', queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=60) for _ in children] == [HASH, HASH]
    for child in children:
        child.join(10)
    assert len(server.asked('w.pth')) == 1


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(server, entry, tmp_path: Path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r'cannot be written .*VISIONSSM_CACHE.*--cache-dir') as caught:
        get(entry, cache_dir=tmp_path / 'file' / 'below')
    assert caught.value.errno == errno.ENOTDIR


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path: Path):
    monkeypatch.delenv('VISIONSSM_CACHE')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert cache_root() == tmp_path / 'hub' / 'checkpoints' / 'visionssm'
    assert cache_root('elsewhere') == Path('elsewhere')


@pytest.fixture
def hub(server, entry, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                        server.address + '/{repo_id}/resolve/{revision}/{filename}')
    server.files['org/repo/resolve/main/sub/h.pth'] = CONTENT
    return find_entry('m.hub'), tmp_path / 'mine'


def test_files_on_the_hub_stay_in_its_cache_and_are_recorded_here(server, hub):
    entry, folder = hub
    found = get(entry, cache_dir=folder)
    assert found.sha256 == HASH and found.source == 'hf://org/repo/sub/h.pth'
    assert found.path.is_relative_to(folder / 'hub') and found.path.name == 'h.pth'
    asked = len(server.requests)
    assert get(entry, cache_dir=folder, offline=True) == found and len(server.requests) == asked
    (folder / 'fam' / 'h.pth.json').unlink()
    assert get(entry, cache_dir=folder, offline=True).sha256 == HASH


def test_a_damaged_file_of_the_hub_is_fetched_again(server, hub):
    entry, folder = hub
    path = get(entry, cache_dir=folder).path
    path.resolve().write_bytes(b'damaged')
    assert get(entry, cache_dir=folder).path.read_bytes() == CONTENT


def test_what_the_hub_does_not_have_is_told(server, hub):
    entry, folder = hub
    server.files.clear()
    with pytest.raises(DownloadError, match=r'hf://org/repo/sub/h.pth: .*404'):
        get(entry, cache_dir=folder)


def test_several_files_come_at_once_and_failures_stay_apart(server, entry, add_catalogue):
    names = ['m.a', 'm.drive', 'm.known']
    results = dict(fetch_many([find_entry(name) for name in names], get, workers=3))
    kinds = {key.name: type(value).__name__ for key, value in results.items()}
    assert kinds == {'m.a': 'Cached', 'm.drive': 'CheckpointError', 'm.known': 'Cached'}


def test_a_file_fetched_by_hand_takes_its_place(entry, tmp_path: Path, cache: Path):
    (tmp_path / 'mine.bin').write_bytes(CONTENT)
    seen: list[str] = []
    drive = find_entry('m.drive')
    add_file(drive, tmp_path / 'mine.bin', lambda path: seen.append(path.name))
    assert seen == ['m.drive.pth'] and get(drive).sha256 == HASH
    assert {path.name for path in (cache / 'fam').glob('[!.]*')} == {'m.drive.pth', 'm.drive.pth.json'}


def test_a_wrong_file_is_not_put_in_place(entry, tmp_path: Path, cache: Path):
    (tmp_path / 'mine.bin').write_bytes(b'other')

    def refuse(path: Path) -> None:
        raise CheckpointError('of another model')

    with pytest.raises(CheckpointError, match='of another model'):
        add_file(find_entry('m.drive'), tmp_path / 'mine.bin', refuse)
    with pytest.raises(DownloadError, match=f'is not m.known: its hash is .* expected {HASH}'):
        add_file(find_entry('m.known'), tmp_path / 'mine.bin', refuse)
    with pytest.raises(FileNotFoundError, match='nothing.bin'):
        add_file(find_entry('m.drive'), tmp_path / 'nothing.bin', refuse)
    assert look_up(find_entry('m.drive')) is None
    assert not [path for path in cache.rglob('*') if path.is_file() and not path.name.endswith('.lock')]
