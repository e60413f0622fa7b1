"""The page: what its events do, what its server gives out, and the command that shows it."""
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip('gradio', reason='needs the extra [demo]')

import gradio as gr  # noqa: E402
import httpx  # noqa: E402

from visionssm.cli import load_command  # noqa: E402
from visionssm.demo import app as app_module  # noqa: E402
from visionssm.demo.app import UNDERSTAND, _distinct, _lay_out_results, _Page, _problem, build_app, serve  # noqa: E402
from visionssm.demo.choices import all_choices  # noqa: E402
from visionssm.demo.tool import _workspace, check_port, demo  # noqa: E402
from visionssm.demo.understand import VIEWS  # noqa: E402

pytestmark = pytest.mark.demo

NO_VIEW = {'view': VIEWS[1], 'block': 0, 'place': (0.5, 0.5), 'noise': True}


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@pytest.fixture
def page(engine, classifier, restorer):
    return _Page(engine, all_choices([classifier.key, restorer.key]), {})


@pytest.fixture
def results():
    with gr.Blocks(analytics_enabled=False):
        return _lay_out_results()


def run(page, results, task, key, photo, view=NO_VIEW):
    return page.run(task, key, photo, 0.3, lambda done, total: None, dict(view), results)


def test_the_first_models_offered_are_those_whose_weights_are_here(page, classifier, restorer):
    assert page.first_task() == 'Classify'
    assert page.offered('Classify')[0][1] == classifier.key and page.offered('Restore')[0][1] == restorer.key
    for task in app_module.TASKS:
        assert not any(key.startswith('random:') for _, key in page.offered(task))
    looked_at = [key for _, key in page.offered(UNDERSTAND)]
    assert 'random:mamba_yolo_pico' in looked_at and 'mask-rcnn_mamba2d-nano_fpn_1x_coco' not in looked_at


def test_classes_are_shown_as_bars_with_the_time(page, results, classifier, photo):
    updates = run(page, results, 'Classify', classifier.key, photo)
    bars = updates[results.classes]
    assert bars['visible'] and len(bars['value']) == 5 and sum(bars['value'].values()) <= 1.0001
    assert all(word in updates[results.status] for word in ('small-vim0', 's', 'cpu'))


def test_a_restored_picture_is_shown_beside_the_old_one_and_can_be_fetched(page, results, restorer, photo):
    updates = run(page, results, 'Restore', restorer.key, photo)
    before, after = updates[results.slider]['value']
    assert before.size == after.size == (112, 80) and Path(updates[results.download]['value']).is_file()
    assert '56 × 40 → 112 × 80 pixels' in updates[results.status]


def test_routes_need_no_picture_and_say_whose_weights_they_are_of(page, results, classifier):
    updates = run(page, results, UNDERSTAND, 'random:vim_pico', None)
    assert updates[results.picture]['visible'] and 'Block 0 of' in updates[results.status]


@pytest.mark.parametrize('task, key, wanted', [
    ('Classify', None, 'no model'), ('Classify', 'no such key', 'no model'), ('Classify', 'first', 'no picture')])
def test_what_is_missing_is_said(page, results, classifier, task, key, wanted):
    with pytest.raises(ValueError, match=wanted):
        run(page, results, task, classifier.key if key == 'first' else key, None)


def test_a_preview_stands_for_its_file(page, photo_file, tmp_path):
    assert page.read(None, None) is None
    shown = {'path': str(photo_file), 'orig_name': 'mine.png'}
    assert page.read(shown, None).name == 'mine.png'
    other = ('preview-1.png', str(photo_file), 'deep.tif')
    assert page.read({'path': str(tmp_path / 'preview-1.png')}, other).name == 'deep.tif'
    assert page.read(shown, other).name == 'mine.png'


def test_names_from_files_are_no_markup():
    assert '<img' not in _problem('<img src=x onerror=alert(1)>.png is no picture')
    assert '<b>' not in app_module._swatch((1, 2, 3), '<b>cat</b>')


def test_two_classes_of_one_name_are_both_shown():
    assert _distinct(['crane', 'crane', 'dog'], [0.5, 0.3, 0.2]) == {'crane': 0.5, 'crane (2)': 0.3, 'dog': 0.2}


def test_tables_say_when_there_is_nothing():
    assert 'No object' in app_module._table(('a',), [], 'No object') and 'class="hint"' in app_module._table((), [], '')


@pytest.fixture
def served(engine, classifier, monkeypatch):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(engine.folder))
    app = build_app(engine, all_choices([classifier.key]))
    yield app, serve(app, '127.0.0.1', free_port(), 0.01)
    app.close(verbose=False)


def test_the_server_keeps_to_itself(served, photo_file):
    app, url = served
    html = httpx.get(url).text
    config = httpx.get(f'{url}config').json()
    assert config['analytics_enabled'] is False and not app.share and app.share_url is None
    assert not any(part in html for part in ('fonts.googleapis', 'fonts.gstatic', 'cdnjs', 'jsdelivr'))
    for path in (photo_file, '/etc/passwd', Path(app_module.__file__)):
        assert httpx.get(f'{url}gradio_api/file={path}').status_code in (403, 404)
    assert httpx.get(f'{url}gradio_api/info').json()['named_endpoints'] == {}
    assert httpx.post(f'{url}gradio_api/upload', files={'files': ('big.png', bytes(20_000))}).status_code == 413
    small = httpx.post(f'{url}gradio_api/upload', files={'files': ('small.png', photo_file.read_bytes()[:5000])})
    assert small.status_code == 200


def test_uploads_and_results_are_removed_at_the_end():
    with _workspace() as folder:
        assert os.environ['GRADIO_TEMP_DIR'] == str(folder) and os.environ['GRADIO_ANALYTICS_ENABLED'] == 'False'
        (folder / 'upload.png').write_bytes(b'x')
    assert not folder.exists() and 'GRADIO_TEMP_DIR' not in os.environ


def test_a_port_in_use_is_an_error_with_a_way_out(capsys):
    with closing(socket.socket()) as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert demo(['--port', str(port), '--no-browser']) == 1
        with pytest.raises(OSError, match='Give another --port'):
            check_port('127.0.0.1', port)
    assert f'port {port}' in capsys.readouterr().err
    check_port('127.0.0.1', port)
    with pytest.raises(OSError, match='no-such-host'):
        check_port('no-such-host.invalid', port)


@pytest.mark.parametrize('options', [['--port', '0'], ['--port', '70000'], ['--max-size', '0'],
                                     ['--max-megapixels', '-1']])
def test_impossible_options_are_refused(options, capsys):
    with pytest.raises(SystemExit, match='2'):
        demo(options)
    assert options[0] in capsys.readouterr().err


def test_a_wrong_weight_file_is_one_line(tmp_path, capsys):
    (tmp_path / 'bad.safetensors').write_bytes(b'nothing')
    assert demo(['--port', str(free_port()), '--no-browser', '--checkpoint', str(tmp_path / 'bad.safetensors')]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and 'bad.safetensors' in error and error.count('\n') == 1
    assert load_command('demo') is demo


@pytest.mark.skipif(os.name != 'posix', reason='processes are asked for otherwise')
def test_folders_of_pages_that_were_killed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    gone = subprocess.Popen([sys.executable, '-c', ''])
    gone.wait()
    for name in (f'visionssm-demo-{gone.pid}-a', f'visionssm-demo-{os.getpid()}-b', 'visionssm-demo-x', 'other'):
        (tmp_path / name).mkdir()
    with _workspace() as folder:
        assert sorted(path.name for path in tmp_path.iterdir() if path != folder) == [
            'other', f'visionssm-demo-{os.getpid()}-b', 'visionssm-demo-x']
    assert not folder.exists()
