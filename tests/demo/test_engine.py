"""What the page does, without a browser: reading, choosing, running, and words for what went wrong."""
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionssm.checkpoints import CheckpointError, DownloadError
from visionssm.demo import choices as choices_module
from visionssm.demo.choices import all_choices, file_choice, folder_choices
from visionssm.demo.engine import DemoError, Stopped, explain
from visionssm.demo.samples import write_samples
from visionssm.demo.understand import VIEWS, look, place_on_crop
from visionssm.openmmlab.image_files import read_picture
from visionssm.openmmlab.predict import Predictor
from visionssm.openmmlab.predict_restoration import Restorer

DETECTOR = 'detection/mamba-yolo-tiny-reduced_composed.py'
SEGMENTOR = 'segmentation/mhs-vm-unet-pico_composed.py'


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def bomb(path: Path) -> Path:
    """A file of a few bytes that says it has 2500 megapixels."""
    header = struct.pack('>IIBBBBB', 50000, 50000, 8, 2, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(99)))
                     + chunk(b'IEND', b''))
    return path


@pytest.mark.parametrize('kind, wanted', [
    ('text', 'notes.png is no picture'), ('empty', 'notes.png is empty'), ('cut', 'notes.png is damaged'),
    ('bomb', 'notes.png says that it has 50000 x 50000 pixels'), ('none', 'No such file')])
def test_what_is_no_picture_is_refused_by_the_name_that_its_user_gave_it(engine, photo_file, tmp_path, kind, wanted):
    path = tmp_path / '0a1b2c.png'
    if kind == 'bomb':
        bomb(path)
    elif kind != 'none':
        path.write_bytes({'text': b'hello', 'empty': b'', 'cut': photo_file.read_bytes()[:2000]}[kind])
    with pytest.raises(DemoError, match=wanted) as caught:
        engine.read(path, 'notes.png')
    assert str(tmp_path) not in str(caught.value) and explain(caught.value) == str(caught.value)


def test_alpha_gray_16_bits_and_turned_photos_are_read_as_they_look(engine, tmp_path):
    clear = np.zeros((4, 6, 4), np.uint8)
    clear[:, 3:] = (200, 10, 10, 255)
    Image.fromarray(clear).save(tmp_path / 'clear.png')
    read = engine.read(tmp_path / 'clear.png')
    assert read.rgb.getpixel((0, 0)) == (255, 255, 255) and read.rgb.getpixel((5, 0)) == (200, 10, 10)
    assert read.about == '6 × 4 pixels, RGB with alpha, 8 bits, PNG'
    Image.fromarray(np.full((4, 6), 257 * 77, np.uint16)).save(tmp_path / 'deep.tif')
    deep = engine.read(tmp_path / 'deep.tif')
    assert deep.rgb.getpixel((0, 0)) == (77, 77, 77) and deep.about == '6 × 4 pixels, gray, 16 bits, TIFF'
    turned = Image.Exif()
    turned[274] = 6
    Image.new('RGB', (6, 4)).save(tmp_path / 'turned.jpg', exif=turned)
    assert engine.read(tmp_path / 'turned.jpg').rgb.size == (4, 6)


def test_classes_are_those_of_the_predictor(engine, classifier, photo, photo_file):
    found = engine.classify(photo, classifier)
    expected, = Predictor(checkpoint=classifier.key, device='cpu').predict([photo_file])
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    assert len(found.names) == 5 and set(found.names) <= set(Predictor(checkpoint=classifier.key).classes)
    assert found.run.seconds > 0 and found.run.loading > 0 and found.run.device == 'cpu'


def test_a_model_is_loaded_once_and_makes_room_for_the_next(engine, classifier, restorer, photo):
    engine.classify(photo, classifier)
    assert engine.classify(photo, classifier).run.loading == 0
    engine.restore(photo, restorer)
    assert engine._loaded[0] == restorer.key and engine.classify(photo, classifier).run.loading > 0


def test_objects_have_boxes_and_colours(engine, exported, photo):
    pytest.importorskip('mmdet', reason='needs the extra [det]')
    choice = exported(DETECTOR)
    assert choice.task == 'detection'
    found = engine.detect(photo, choice, score_thr=0.)
    assert found.picture.shape == (40, 56, 3) and found.objects
    assert all(len(row['bbox']) == 4 and len(row['color']) == 3 for row in found.objects)
    none = engine.detect(photo, choice, score_thr=1.)
    assert not none.objects
    np.testing.assert_array_equal(none.picture, np.asarray(photo.rgb))


def test_shares_of_classes_add_up(engine, exported, photo):
    pytest.importorskip('mmseg', reason='needs the extra [seg]')
    found = engine.segment(photo, exported(SEGMENTOR))
    assert found.picture.shape == (40, 56, 3)
    assert sum(share for _, share, _ in found.shares) == pytest.approx(100, abs=0.1)


def test_the_restored_file_has_all_of_the_picture(engine, restorer, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (20, 28), dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / 'deep.png')
    photo = engine.read(tmp_path / 'deep.png')
    seen = []
    result = engine.restore(photo, restorer, lambda done, total: seen.append((done, total)))
    written = read_picture(result.file)
    assert written.pixels.shape == (40, 56, 1) and written.pixels.dtype == np.uint16
    np.testing.assert_array_equal(written.pixels, Restorer(
        choices_module.describe_restorer(restorer.key), 'cpu').restore(photo.picture.pixels))
    assert result.file.name == 'deep_restored.png' and engine.folder in result.file.parents
    assert result.before.size == result.after.size == (56, 40) and seen[-1][0] == seen[-1][1]


def test_of_a_large_restored_picture_the_middle_is_shown(engine, restorer, monkeypatch, photo):
    monkeypatch.setattr('visionssm.demo.engine.MAX_SHOWN', 32)
    result = engine.restore(photo, restorer)
    assert result.after.size == (32, 32) and 'the middle' in result.note
    assert read_picture(result.file).pixels.shape == (80, 112, 3)


def test_a_result_beyond_the_limit_is_refused_before_the_work(engine, restorer, photo, monkeypatch):
    monkeypatch.setattr('visionssm.demo.engine.MAX_RESULT', 8000)
    with pytest.raises(DemoError, match='56 × 40 pixels, and enlarged 2 times'):
        engine.restore(photo, restorer)


def test_a_run_can_be_stopped(engine, restorer, photo):
    model = engine.load(restorer)[0]
    model.tile, model.overlap = 16, 4
    seen = []

    def stop(done, total):
        seen.append((done, total))
        engine.stop()

    with pytest.raises(Stopped):
        engine.restore(photo, restorer, stop)
    assert len(seen) == 1 and seen[0][0] < seen[0][1]
    assert engine.restore(photo, restorer).after.size == (112, 80)  # and the next one runs


def test_random_weights_predict_nothing(engine, photo):
    choice = next(choice for choice in all_choices() if choice.key == 'random:vim_pico')
    with pytest.raises(DemoError, match='random weights'):
        engine.classify(photo, choice)
    assert 'random weights' in choice.label and 'random weights' in choice.card()


def test_a_model_of_another_task_is_refused(engine, classifier, photo):
    with pytest.raises(DemoError, match='a model of classification, not of restoration'):
        engine.restore(photo, classifier)


def test_given_files_come_first_and_those_that_cannot_be_shown_are_an_error(classifier, tmp_path, repo_root):
    found = all_choices([classifier.key])
    assert found[0].key == classifier.key and found[0].label == 'small-vim0 (vim_pico)'
    assert len({choice.key for choice in found}) == len(found)
    assert {choice.task for choice in found} == set(choices_module.TASKS)
    with pytest.raises(FileNotFoundError, match='does not exist'):
        all_choices([tmp_path / 'nothing.safetensors'])
    with pytest.raises(CheckpointError, match='diffusion'):
        file_choice(repo_root / 'checkpoints' / 'dis_pico_fashion_mnist.safetensors')
    tasks = [choice.task for choice in folder_choices(repo_root / 'checkpoints')]
    assert tasks == ['restoration', 'restoration']


def test_weights_are_marked_until_they_are_here(tmp_path, monkeypatch):
    monkeypatch.setenv('VISIONSSM_CACHE', str(tmp_path))
    found = choices_module.catalogue_choices()
    choice = next(choice for choice in found if choice.name == 'vim_tiny.in1k')
    assert choice.label == 'vim_tiny.in1k (to download, 115 MB)'
    for words in ('7.15 M parameters', 'licence: apache-2.0', 'downloaded on first use'):
        assert words in choice.card()
    assert not any('mambair_sr_x2.df2k' == choice.name for choice in found)  # to be had by hand alone
    monkeypatch.setattr(choices_module, 'look_up', lambda entry: object())
    assert choice.label == 'vim_tiny.in1k'
    assert any(choice.name == 'mambair_sr_x2.df2k' for choice in choices_module.catalogue_choices())


def test_weights_that_cannot_be_fetched_say_how_to_get_them(engine, photo, tmp_path, monkeypatch):
    monkeypatch.setenv('VISIONSSM_CACHE', str(tmp_path))
    monkeypatch.setenv('VISIONSSM_OFFLINE', '1')
    choice = next(choice for choice in choices_module.catalogue_choices() if choice.name == 'vim_tiny.in1k')
    with pytest.raises(DownloadError) as caught:
        engine.classify(photo, choice)
    assert '--from-file FILE' in explain(caught.value) and '--checkpoint FILE' in explain(caught.value)


@pytest.mark.parametrize('error, words', [
    (torch.OutOfMemoryError('out of memory'), 'not enough memory'), (MemoryError(), 'not enough memory'),
    (Stopped(), 'Stopped.'), (ImportError('no mmdet'), 'no mmdet'), (RuntimeError('sizes differ'), 'sizes differ'),
    (KeyError('a bug'), '')])
def test_errors_are_said_in_words_unless_they_are_ours(error, words):
    assert words in explain(error) and bool(explain(error)) == bool(words)


@pytest.mark.parametrize('view', VIEWS)
def test_views_of_a_trained_and_of_a_restoration_model(engine, classifier, restorer, photo, view):
    seen = []
    for choice in (classifier, restorer):
        drawn = look(engine, choice, view, photo, progress=lambda done, total: seen.append(total))
        assert min(drawn.picture.size) > 100 and drawn.note
    assert bool(seen) == (view == VIEWS[0])


def test_views_without_a_photo(engine, restorer):
    assert '8 images of noise' in look(engine, restorer, VIEWS[0]).note
    assert look(engine, restorer, VIEWS[1]).picture.size[0] > 100
    with pytest.raises(DemoError, match='needs a photo'):
        look(engine, restorer, VIEWS[2])
    with pytest.raises(DemoError, match='There is no block 99'):
        look(engine, restorer, VIEWS[1], block=99)


def test_a_place_of_the_photo_is_found_on_its_middle():
    assert place_on_crop((0.5, 0.5), (200, 100), (64, 64)) == (32, 32)
    assert place_on_crop((0., 1.), (200, 100), (64, 64)) == (63, 0)  # the left quarter is cut off
    assert place_on_crop((0.25, 0.25), (100, 100), (64, 32)) == (16, 0)


def test_pictures_to_begin_with_can_be_read(engine):
    files = write_samples(engine.folder)
    assert len(files) >= 3 and all(engine.read(path).rgb.size[0] >= 28 for path in files.values())
