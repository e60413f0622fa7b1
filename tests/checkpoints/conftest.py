"""A server that misbehaves on demand, and an empty cache for every test."""
import contextlib
import hashlib
import http.server
import re
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from visionssm.checkpoints import catalogue, transfer


@dataclass
class Server:
    """Serves `files`; `faults` maps a path to what is done in the place of a plain answer, one after the other."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Callable]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    etags: dict[str, str] = field(default_factory=dict)
    ranges: bool = True

    def url(self, name: str) -> str:
        return f'{self.address}/{name}'

    def asked(self, name: str) -> list[dict[str, str]]:
        return [headers for path, headers in self.requests if path == f'/{name}']

    def break_after(self, count: int) -> Callable:
        return lambda handler, content: handler.answer(content, stop_after=count)

    def claim(self, length: int) -> Callable:
        return lambda handler, content: handler.answer(content, claim=length)

    def status(self, code: int) -> Callable:
        return lambda handler, content: handler.send_error(code)

    def redirect(self, url: str) -> Callable:
        def answer(handler: 'Handler', content: bytes) -> None:
            handler.send_response(302)
            handler.send_header('Location', url)
            handler.send_header('Content-Length', '0')
            handler.end_headers()
        return answer

    def stall(self, handler: 'Handler', content: bytes) -> None:
        handler.close_connection = True
        handler.connection.settimeout(3)
        with contextlib.suppress(OSError):
            handler.connection.recv(1)  # until the other side gives up


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server_state: Server

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        state, name = self.server_state, self.path[1:]
        state.requests.append((self.path, dict(self.headers)))
        if state.faults.get(name):
            state.faults[name].pop(0)(self, state.files.get(name, b''))
        elif name in state.files:
            self.answer(state.files[name])
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        """What the hub says of a file before it sends it."""
        found = self.server_state.files.get(self.path[1:])
        if found is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header('X-Repo-Commit', '0' * 40)
        self.send_header('ETag', f'"{hashlib.sha256(found).hexdigest()}"')
        self.send_header('Content-Length', str(len(found)))
        self.end_headers()

    def answer(self, content: bytes, stop_after: int | None = None, claim: int | None = None) -> None:
        """Answer, from the byte that was asked for on; cut off or with a wrong length if told so."""
        etag = self.server_state.etags.get(self.path[1:], '"one"')
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        begin = int(asked[1]) if asked and self.server_state.ranges else 0
        if self.headers.get('If-Range', etag) != etag:
            begin = 0
        if begin >= len(content) > 0:
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(content)}')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header('Content-Range', f'bytes {begin}-{len(content) - 1}/{len(content)}')
        if etag:
            self.send_header('ETag', etag)
        self.send_header('Content-Length', str(claim if claim is not None else len(content) - begin))
        self.end_headers()
        self.wfile.write(content[begin:][:stop_after])
        if stop_after is not None or claim is not None:
            self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    handler = type('Bound', (Handler,), {})
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        handler.server_state = Server(f'http://127.0.0.1:{httpd.server_port}')
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        threading.Thread(target=httpd.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
        yield handler.server_state
        httpd.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the test, at a place of its own; nothing of the user's environment counts."""
    for name in ('VISIONSSM_MIRROR', 'VISIONSSM_OFFLINE', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('VISIONSSM_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, 'time', types.SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def add_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a file of entries in the place of the catalogue: (family, YAML)."""
    folder = tmp_path / 'catalogue'
    folder.mkdir()
    monkeypatch.setattr(catalogue, 'FOLDER', folder)

    def add(family: str, text: str) -> None:
        head = ('repository: https://example.org/r\ncommit: abc\npaper: p\nlicence: mit\ntask: classification\n'
                'trained_on: d\n')
        (folder / f'{family}.yaml').write_text(head + text)

    return add
