"""Downloads over HTTP: what breaks goes on, what is wrong is not kept, and every error says what happened."""
import builtins
import errno
import hashlib
import shutil
import time
import types
from pathlib import Path

import pytest

from visionssm.checkpoints.transfer import DownloadError, fetch_file

CONTENT = bytes(range(256)) * 400
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / 'w.pth'


def get(server, target: Path, **options) -> str:
    return fetch_file(server.url('w.pth'), target, **{'progress': False, **options})


def left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.glob(f'{target.name}*'))


def test_a_file_comes_whole_with_its_hash_and_leaves_nothing_else(server, target: Path):
    server.files['w.pth'] = CONTENT
    assert get(server, target, size=len(CONTENT), sha256=HASH) == HASH
    assert target.read_bytes() == CONTENT and left(target) == ['w.pth']


def test_a_broken_connection_is_taken_up_where_it_ended(server, target: Path):
    server.files['w.pth'] = CONTENT
    server.faults['w.pth'] = [server.break_after(30_000), server.break_after(50_000)]
    assert get(server, target) == HASH
    assert [headers.get('Range') for headers in server.asked('w.pth')] == [None, 'bytes=30000-', 'bytes=80000-']
    assert {headers['If-Range'] for headers in server.asked('w.pth')[1:]} == {'"one"'}


def test_other_bytes_than_those_that_were_asked_for_are_refused(server, target: Path):
    def send_others(handler, content: bytes) -> None:
        handler.send_response(206)
        handler.send_header('Content-Range', f'bytes 10-{len(content) - 1}/{len(content)}')
        handler.send_header('Content-Length', str(len(content) - 10))
        handler.end_headers()
        handler.wfile.write(content[10:])

    server.files['w.pth'] = CONTENT
    server.faults['w.pth'] = [server.break_after(30_000), send_others]
    with pytest.raises(DownloadError, match='asked for the bytes from 30000 on and sent others'):
        get(server, target)
    assert not target.exists()


def test_breaks_do_not_add_up_while_bytes_come(server, target: Path):
    server.files['w.pth'] = CONTENT
    server.faults['w.pth'] = [server.break_after(10_000) for _ in range(9)]
    assert get(server, target, attempts=2) == HASH


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server, target: Path):
    server.files['w.pth'] = CONTENT
    server.faults['w.pth'] = [server.break_after(30_000), *[server.status(503)] * 2]
    with pytest.raises(DownloadError, match=r'503 .*3 times in a row; 30000 bytes are kept in .*w\.pth\.part'):
        get(server, target, attempts=3)
    assert not target.exists()
    assert get(server, target) == HASH
    assert server.asked('w.pth')[-1]['Range'] == 'bytes=30000-'


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(server, target: Path):
    server.files['w.pth'] = CONTENT
    server.faults['w.pth'] = [server.break_after(30_000), server.status(404)]
    with pytest.raises(DownloadError):
        get(server, target)
    server.files['w.pth'], server.etags['w.pth'] = CONTENT[::-1], '"two"'
    get(server, target)
    assert target.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize('etag', ['', 'W/"weak"'], ids=['none', 'weak'])
def test_without_a_proof_of_sameness_a_part_is_only_kept_if_the_hash_is_known(server, target: Path, etag: str):
    server.files['w.pth'], server.etags['w.pth'] = CONTENT, etag
    server.faults['w.pth'] = [server.break_after(30_000)]
    assert get(server, target) == HASH
    assert 'Range' not in server.asked('w.pth')[-1]
    server.faults['w.pth'] = [server.break_after(30_000)]
    assert get(server, target, sha256=HASH) == HASH
    assert server.asked('w.pth')[-1]['Range'] == 'bytes=30000-'


def test_a_wrong_part_is_dropped_and_the_file_fetched_anew(server, target: Path):
    server.files['w.pth'] = CONTENT
    target.with_name('w.pth.part').write_bytes(b'other bytes')
    assert get(server, target, sha256=HASH) == HASH
    assert target.read_bytes() == CONTENT


def test_a_complete_part_needs_no_more_bytes(server, target: Path):
    server.files['w.pth'] = CONTENT
    target.with_name('w.pth.part').write_bytes(CONTENT)
    assert get(server, target, sha256=HASH) == HASH


def test_a_server_without_ranges_sends_everything_again(server, target: Path):
    server.files['w.pth'], server.ranges = CONTENT, False
    server.faults['w.pth'] = [server.break_after(30_000)]
    assert get(server, target) == HASH


def test_a_length_that_is_too_long_is_a_broken_connection(server, target: Path):
    server.files['w.pth'], server.ranges = CONTENT, False
    server.faults['w.pth'] = [server.claim(len(CONTENT) + 5)] * 9
    with pytest.raises(DownloadError, match=r'the connection (ended after \d+ of \d+ bytes|broke)'):
        get(server, target, attempts=2, sha256='0' * 64)
    assert not target.exists()


def test_a_length_that_is_too_short_is_a_wrong_file(server, target: Path):
    server.files['w.pth'] = CONTENT
    server.faults['w.pth'] = [server.claim(1000)]
    with pytest.raises(DownloadError, match=f'the hash .*expected {HASH}; it was deleted'):
        get(server, target, sha256=HASH)
    assert left(target) == []


def test_another_size_than_the_catalogue_s_is_refused_before_it_comes(server, target: Path):
    server.files['w.pth'] = CONTENT
    with pytest.raises(DownloadError, match=f'offers {len(CONTENT)} bytes, the catalogue says 7'):
        get(server, target, size=7)
    assert left(target) == []


def test_a_wrong_hash_is_named_beside_the_right_one_and_the_file_deleted(server, target: Path):
    server.files['w.pth'] = CONTENT
    with pytest.raises(DownloadError, match=f'has the hash {HASH}, expected {"0" * 64}; it was deleted'):
        get(server, target, sha256='0' * 64)
    assert left(target) == []


def test_a_web_page_in_the_place_of_the_file_is_told(server, target: Path):
    server.files['w.pth'] = b'\n<!DOCTYPE html><html>Sign in</html>'
    with pytest.raises(DownloadError, match='the server sent a web page'):
        get(server, target)
    assert left(target) == []


@pytest.mark.parametrize(('code', 'requests'), [(404, 1), (403, 1), (503, 3), (429, 3)])
def test_what_may_pass_is_tried_again_and_what_will_not_is_told_at_once(server, target: Path, code: int, requests: int):
    server.faults['w.pth'] = [server.status(code)] * 9
    with pytest.raises(DownloadError, match=f'the server answers {code}'):
        get(server, target, attempts=3)
    assert len(server.asked('w.pth')) == requests


def test_redirects_are_followed_with_the_range(server, target: Path):
    server.files['real.pth'] = CONTENT
    server.faults['w.pth'] = [server.redirect(server.url('real.pth')) for _ in range(2)]
    server.faults['real.pth'] = [server.break_after(30_000)]
    assert get(server, target) == HASH
    assert server.asked('real.pth')[-1]['Range'] == 'bytes=30000-'


def test_a_redirect_away_from_https_is_refused():
    from visionssm.checkpoints.transfer import _SafeRedirects
    request = types.SimpleNamespace(type='https')
    with pytest.raises(DownloadError, match='redirects from https to http://example.org/w'):
        _SafeRedirects().redirect_request(request, None, 302, 'Found', {}, 'http://example.org/w')


def test_a_silent_server_is_given_up(server, target: Path):
    start = time.perf_counter()
    server.faults['w.pth'] = [server.stall] * 9
    with pytest.raises(DownloadError, match='(timed out|broke).*2 times in a row'):
        get(server, target, timeout=0.2, attempts=2)
    assert time.perf_counter() - start < 20


def test_no_server_at_all_is_told(target: Path):
    with pytest.raises(DownloadError, match=r'no connection .*2 times in a row$'):
        fetch_file('http://127.0.0.1:9/w.pth', target, attempts=2, progress=False)


def test_too_little_space_is_told_before_anything_comes(server, target: Path, monkeypatch):
    server.files['w.pth'] = CONTENT
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=f'No space for w.pth: {len(CONTENT)} bytes are to come, 1000 are free') as caught:
        get(server, target)
    assert caught.value.errno == errno.ENOSPC and left(target) == []


def test_a_disk_that_fills_up_keeps_what_has_come(server, target: Path, monkeypatch):
    server.files['w.pth'] = CONTENT
    real = builtins.open

    class Full:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self) -> 'Full':
            return self

        def __exit__(self, *args) -> None:
            self.file.close()

        def write(self, block: bytes) -> None:
            self.file.write(block[:40_000])
            raise OSError(errno.ENOSPC, 'No space left on device')

    def full(path, mode='r', *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        return Full(file) if str(path).endswith('.part') and mode in ('wb', 'ab') else file

    monkeypatch.setattr(builtins, 'open', full)
    with pytest.raises(OSError, match=r'No space left on device; \d+ bytes are kept in .*: make room and start again'):
        get(server, target)
    monkeypatch.undo()
    kept = target.with_name('w.pth.part').stat().st_size
    assert 0 < kept <= 40_000 and not target.exists()
    assert get(server, target) == HASH
    assert server.asked('w.pth')[-1]['Range'] == f'bytes={kept}-'


def test_progress_names_the_file_and_how_much_there_is(server, target: Path, capsys):
    server.files['w.pth'] = CONTENT
    get(server, target, progress=True)
    shown = capsys.readouterr().err.strip()
    assert shown.startswith('w.pth:') and '100k' in shown and '100%' in shown
