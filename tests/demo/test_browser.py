"""The page in a browser, from the upload to the result."""
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip('gradio', reason='needs the extra [demo]')
pytest.importorskip('playwright', reason='needs playwright, of the extra [dev]')

from PIL import Image  # noqa: E402
from playwright.sync_api import expect, sync_playwright  # noqa: E402

from visionssm.demo.app import build_app, serve  # noqa: E402
from visionssm.demo.choices import all_choices  # noqa: E402
from visionssm.demo.engine import Engine  # noqa: E402

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
WAIT = 90_000  # ms; other tests may use the processor

pytestmark = [pytest.mark.demo, pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason='no Chromium: apt install chromium')]


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@pytest.fixture(scope='module')
def url(tmp_path_factory, classifier, restorer):
    folder = tmp_path_factory.mktemp('page')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('GRADIO_TEMP_DIR', str(folder))
        app = build_app(Engine(folder, 'cpu'), all_choices([classifier.key, restorer.key]))
        yield serve(app, '127.0.0.1', free_port(), 1.)
        app.close(verbose=False)


@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as playwright:
        # CI runs as root, for which there is no sandbox
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu'])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url, request):
    """The page in a browser without a network; its last test fails where it asked another machine for anything."""
    width, height = getattr(request, 'param', (1280, 900))
    context = browser.new_context(viewport={'width': width, 'height': height})
    context.set_default_timeout(WAIT)
    asked, errors = [], []

    def only_ours(route):
        if route.request.url.startswith((url, 'data:', 'blob:')):
            route.continue_()
        else:
            asked.append(route.request.url)
            route.abort()

    context.route('**/*', only_ours)
    page = context.new_page()
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.goto(url)
    page.get_by_role('button', name='Run', exact=True).wait_for()
    yield page
    context.close()
    assert not asked and not errors


def upload(page, path):
    page.locator('#photo input[type=file]').first.set_input_files(str(path))


def run(page):
    page.get_by_role('button', name='Run', exact=True).click()


def choose_model(page, label):
    name = label.split()[0]
    page.get_by_label('Model').first.click()
    page.get_by_label('Model').first.fill(label)
    page.get_by_role('option').filter(has_text=label).first.click()
    expect(page.locator('#card')).to_contain_text(name, timeout=WAIT)


def is_loaded(image):
    return image.evaluate('image => image.decode().then(() => image.naturalWidth)')


def test_a_photo_is_classified(page, photo_file):
    upload(page, photo_file)
    expect(page.locator('#about')).to_contain_text('56 × 40 pixels, RGB, 8 bits, PNG', timeout=WAIT)
    run(page)
    expect(page.locator('#classes')).to_contain_text('%', timeout=WAIT)
    assert len(re.findall(r'\d+%', page.locator('#classes').inner_text())) == 5
    expect(page.locator('#status')).to_contain_text('cpu')


def test_what_is_no_picture_is_an_alert_and_the_next_picture_works(page, photo_file, tmp_path):
    (tmp_path / 'notes.png').write_text('hello')
    upload(page, tmp_path / 'notes.png')
    expect(page.get_by_role('alert')).to_contain_text('notes.png is no picture', timeout=WAIT)
    upload(page, photo_file)
    expect(page.locator('#about')).to_contain_text('56 × 40', timeout=WAIT)
    expect(page.get_by_role('alert')).to_have_count(0)
    page.get_by_role('button', name='Remove Image').click()
    expect(page.locator('#about')).not_to_contain_text('56 × 40', timeout=WAIT)
    run(page)
    expect(page.get_by_role('alert')).to_contain_text('There is no picture', timeout=WAIT)


def test_a_file_that_is_too_large_is_refused(page, tmp_path):
    (tmp_path / 'large.png').write_bytes(bytes(2 ** 21))
    upload(page, tmp_path / 'large.png')
    expect(page.get_by_text('exceed the maximum allowed size').first).to_be_visible(timeout=WAIT)


def test_a_picture_that_browsers_do_not_show_is_restored_with_all_of_it(page, tmp_path):
    Image.effect_noise((24, 16), 60).save(tmp_path / 'scan.tif')
    page.get_by_role('radio', name='Restore').check()
    upload(page, tmp_path / 'scan.tif')
    expect(page.locator('#about')).to_contain_text('TIFF', timeout=WAIT)
    assert is_loaded(page.locator('#photo img').first) == 24
    run(page)
    expect(page.locator('#status')).to_contain_text('24 × 16 → 48 × 32 pixels', timeout=WAIT)
    for number in range(2):
        image = page.locator('#slider img').nth(number)
        image.wait_for()
        assert is_loaded(image) == 48
    with page.expect_download() as fetched:
        page.locator('#download').click()
    assert fetched.value.suggested_filename == 'scan_restored.tif'
    with Image.open(fetched.value.path()) as image:
        assert (image.size, image.mode, image.format) == ((48, 32), 'L', 'TIFF')


def test_routes_are_drawn_and_a_click_chooses_the_pixel_whose_attention_is_shown(page, tmp_path):
    Image.effect_noise((800, 400), 60).save(tmp_path / 'photo.png')
    page.get_by_role('radio', name='Understand').check()
    expect(page.get_by_role('radio', name='Scan routes')).to_be_visible(timeout=WAIT)
    choose_model(page, 'spatial_mamba_pico (random weights)')
    run(page)
    expect(page.locator('#status')).to_contain_text('Block 0 of', timeout=WAIT)
    choose_model(page, 'vim_pico (random weights)')
    upload(page, tmp_path / 'photo.png')
    expect(page.locator('#about')).to_contain_text('800 × 400', timeout=WAIT)
    page.get_by_role('radio', name='Implicit attention').check()
    page.get_by_label('Block').wait_for()
    photo = page.locator('#photo img').first
    box = photo.bounding_box()
    photo.click(position={'x': box['width'] * 0.25, 'y': box['height'] * 0.5})
    expect(page.locator('#across input').first).to_have_value(re.compile(r'2[45](\.\d)?'), timeout=WAIT)
    run(page)
    expect(page.locator('#status')).to_contain_text('reads in block', timeout=WAIT)
    assert is_loaded(page.locator('#picture img').first) > 100


def test_all_that_is_set_has_a_label_and_can_be_reached_by_keys(page):
    page.get_by_role('radio', name='Classify').focus()
    page.keyboard.press('Tab')
    page.keyboard.press('Space')
    expect(page.get_by_role('radio', name='Detect')).to_be_checked()
    expect(page.get_by_label('Lowest score').first).to_be_visible(timeout=WAIT)
    page.get_by_label('Model').first.focus()
    reached = set()
    for _ in range(12):
        page.keyboard.press('Tab')
        reached.add(page.evaluate('document.activeElement.innerText'))
    assert {'Run', 'Stop'} <= reached


@pytest.mark.parametrize('page', [(390, 844)], indirect=True)
def test_the_page_fits_on_a_phone(page):
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    run(page)  # without a picture
    expect(page.get_by_role('alert')).to_be_in_viewport(timeout=WAIT)
    run_button = page.get_by_role('button', name='Run', exact=True).bounding_box()
    assert run_button['x'] >= 0 and run_button['x'] + run_button['width'] <= 390


# a test that runs in the background of a script inherits deaf ears
DEMO = """if True:
    import runpy, signal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path('tools/demo.py', run_name='__main__')
"""


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A home without settings; what the first demo caches there, the second finds."""
    return tmp_path_factory.mktemp('home')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_when_it_is_told_to_and_leaves_nothing(start_python, home, tmp_path, number):
    work, out, err = tmp_path / 'tmp', tmp_path / 'out.txt', tmp_path / 'err.txt'
    work.mkdir()
    out.touch()
    process = start_python('-c', DEMO, '--no-browser', '--port', str(free_port()), '--device', 'cpu',
                           streams=(out, err), env=dict(PATH='/usr/bin:/bin', TMPDIR=str(work), HOME=str(home)))
    try:
        while process.is_alive() and not out.read_text().endswith('\n'):
            time.sleep(0.05)
        assert out.read_text().startswith('http://127.0.0.1:'), err.read_text()
        assert len(list(work.glob('visionssm-demo-*'))) == 1
        os.kill(process.pid, number)
        process.join(60)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == 0 and 'ended' in out.read_text() and 'Traceback' not in err.read_text()
    assert not list(work.glob('visionssm-demo-*')) and Path(tempfile.gettempdir()).exists()
