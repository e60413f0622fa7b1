"""tools/predict.py with detectors and segmentors: pictures, folders, videos, and what cannot be read."""
import json
from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='needs the extra [det]')
pytest.importorskip('mmseg', reason='needs the extra [seg]')

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402
from PIL import Image  # noqa: E402
from pycocotools.mask import decode  # noqa: E402

from visionssm.checkpoints import CheckpointError, load_state_dict, save_safetensors  # noqa: E402
from visionssm.openmmlab.evaluate import evaluate  # noqa: E402
from visionssm.openmmlab.portable import read_config  # noqa: E402
from visionssm.openmmlab.predict import predict  # noqa: E402
from visionssm.openmmlab.predict_dense import objects  # noqa: E402
from visionssm.openmmlab.video import VideoFrames, VideoSink  # noqa: E402


@pytest.fixture(scope='module')
def detector(det_config, export):
    """A detector's config and its export."""
    cfg = det_config()
    return cfg, export(cfg)


@pytest.fixture(scope='module')
def segmentor(seg_config, export):
    """A segmentor's config and its export."""
    cfg = seg_config()
    return cfg, export(cfg)


@pytest.fixture
def film(tmp_path):
    """A video of five frames of 64 x 48 pixels."""
    rng = np.random.default_rng(0)
    with VideoSink(tmp_path / 'film.mp4', 10, (64, 48)) as sink:
        for _ in range(5):
            sink.write(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    return tmp_path / 'film.mp4'


def error_of(capsys, *argv):
    assert predict([str(arg) for arg in argv]) == 1
    message = capsys.readouterr().err.partition('error: ')[2]
    assert message and 'Traceback' not in message and 'error: ' not in message
    return message


def test_objects_on_pictures_are_those_of_the_test(detector, coco_tree, on_disk, tmp_path, capsys):
    cfg, weights = detector
    assert evaluate([on_disk(cfg), weights, '--out', str(tmp_path / 'test.json')]) == 0
    assert predict([str(coco_tree / 'val2017'), '--checkpoint', weights, '--score-thr', '0', '--out',
                    str(tmp_path / 'out')]) == 0
    found = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    expected = json.loads((tmp_path / 'test.bbox.json').read_text())
    assert [category['name'] for category in found['categories']] == ['cat', 'dog', 'bird']
    assert len(found['annotations']) == len(expected) > 10

    def rows(values):
        ordered = sorted(values, key=lambda row: (row['image_id'], -row['score'], row['bbox']))
        return np.array([[row['image_id'], row['score'], *row['bbox']] for row in ordered])

    np.testing.assert_allclose(rows(found['annotations']), rows(expected), atol=0.01)
    picture = Image.open(tmp_path / 'out' / '000000000001_prediction.jpg')
    assert picture.size == (64, 64)
    assert '000000000003.jpg: ' in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['detector', 'segmentor'])
def test_json_is_a_line_for_each_file_alone_on_standard_output(kind, film, tmp_path, request, capsys):
    _, weights = request.getfixturevalue(kind)
    Image.new('RGB', (40, 30)).save(tmp_path / 'a.png')
    (tmp_path / 'b.png').write_bytes(b'')
    out = tmp_path / 'out'
    assert predict([*(str(tmp_path / name) for name in ('a.png', 'b.png', film.name)), '--checkpoint', weights, '--out',
                    str(out), '--score-thr', '0', '--json']) == 0
    good, bad, video = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (good['path'], good['width'], good['height']) == (str(tmp_path / 'a.png'), 40, 30)
    assert good['picture'] == str(out / 'a_prediction.jpg') and bad.keys() == {'path', 'error'}
    if kind == 'detector':
        assert {'category', 'score', 'bbox'} <= good['objects'][0].keys()
    else:
        assert sum(good['shares'].values()) == pytest.approx(100, abs=0.1) and good['map'] == str(out / 'a.png')
    assert video['frames'] == 5 and video['lines'] == str(out / 'film.jsonl')


def test_a_config_goes_before_the_one_in_the_checkpoint(detector, coco_tree, on_disk, tmp_path):
    cfg, weights = detector
    bare = save_safetensors(load_state_dict(weights), tmp_path / 'bare.safetensors')
    picture = str(next((coco_tree / 'val2017').iterdir()))
    assert predict([picture, '--config', on_disk(cfg), '--checkpoint', str(bare), '--out', str(tmp_path / 'out')]) == 0
    assert (tmp_path / 'out' / 'predictions.json').is_file()


def test_a_training_checkpoint_needs_no_config(segmentor, ade_tree, tmp_path):
    cfg, weights = segmentor
    state = load_state_dict(weights)
    meta = {'cfg': cfg.pretty_text, 'mmengine_version': '0',
            'dataset_meta': {'classes': ('x', 'y', 'z'), 'palette': [(1, 2, 3)] * 3}}
    torch.save({'meta': meta, 'state_dict': state}, tmp_path / 'iter_1.pth')
    picture = str(next((ade_tree / 'images/validation').iterdir()))
    assert predict([picture, '--checkpoint', str(tmp_path / 'iter_1.pth'), '--out', str(tmp_path / 'out')]) == 0
    found = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert set(found['images'][0]['shares']) <= {'x', 'y', 'z'}


def test_a_segmentor_writes_class_maps_and_overlays(segmentor, ade_tree, tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for name, mode in (('grey.png', 'L'), ('alpha.png', 'RGBA'), ('photo.jpg', 'RGB')):
        Image.fromarray(rng.integers(0, 255, (30, 50, 4), dtype=np.uint8), 'RGBA').convert(mode).save(folder / name)
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(rng.integers(0, 255, (30, 50, 3), dtype=np.uint8)).save(folder / 'turned.jpg', exif=turned)
    assert predict([str(folder), '--checkpoint', segmentor[1], '--out', str(tmp_path / 'out')]) == 0
    sizes = {name: Image.open(tmp_path / 'out' / f'{name}.png').size for name in ('grey', 'alpha', 'photo', 'turned')}
    assert sizes == {'grey': (50, 30), 'alpha': (50, 30), 'photo': (50, 30), 'turned': (30, 50)}
    assert Image.open(tmp_path / 'out' / 'turned_prediction.jpg').size == (30, 50)
    found = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    for record in found['images']:
        labels = np.asarray(Image.open(tmp_path / 'out' / record['map']))
        assert labels.dtype == np.uint8 and labels.max() < 3
        assert sum(record['shares'].values()) == pytest.approx(100, abs=0.05)


@pytest.mark.parametrize('kind', ['detector', 'segmentor'])
def test_a_video_gives_a_video_and_a_line_a_frame(kind, film, tmp_path, request):
    weights = request.getfixturevalue(kind)[1]
    assert predict([str(film), '--checkpoint', weights, '--score-thr', '0.4', '--out', str(tmp_path / 'out')]) == 0
    lines = [json.loads(line) for line in (tmp_path / 'out' / 'film.jsonl').read_text().splitlines()]
    assert [line['frame'] for line in lines] == [0, 1, 2, 3, 4]
    assert [line['time'] for line in lines] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    if kind == 'detector':
        scores = [row['score'] for line in lines for row in line['objects']]
        assert scores and min(scores) >= 0.4
    else:
        assert all(sum(line['shares'].values()) == pytest.approx(100, abs=0.05) for line in lines)
    video = VideoFrames(tmp_path / 'out' / 'film_prediction.mp4')
    assert (len(list(video)), video.size, video.rate) == (5, (64, 48), 10)
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'film.jsonl', 'film_prediction.mp4'}


def test_pictures_that_cannot_be_read_are_skipped_by_name(detector, coco_tree, tmp_path, caplog):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    whole = next((coco_tree / 'val2017').iterdir())
    (folder / 'whole.jpg').write_bytes(whole.read_bytes())
    (folder / 'cut.jpg').write_bytes(whole.read_bytes()[:200])
    (folder / 'text.jpg').write_text('no picture')
    assert predict([str(folder), '--checkpoint', detector[1], '--out', str(tmp_path / 'out')]) == 0
    messages = ' '.join(record.getMessage() for record in caplog.records)
    assert all(name in messages for name in ('cut.jpg', 'text.jpg', '2 of 3 images could not be read'))
    assert len(json.loads((tmp_path / 'out' / 'predictions.json').read_text())['images']) == 1


def test_nothing_readable_is_a_failure(detector, tmp_path):
    (tmp_path / 'text.jpg').write_text('no picture')
    assert predict([str(tmp_path / 'text.jpg'), '--checkpoint', detector[1], '--out', str(tmp_path / 'out')]) == 1
    assert not (tmp_path / 'out').exists()


def test_a_video_that_is_none_is_refused(detector, tmp_path, capsys):
    (tmp_path / 'empty.mp4').write_bytes(b'')
    (tmp_path / 'text.avi').write_text('no video')
    options = ('--checkpoint', detector[1], '--out', tmp_path / 'out')
    assert 'empty.mp4 is empty: 0 bytes' in error_of(capsys, tmp_path / 'empty.mp4', *options)
    assert 'text.avi cannot be read as a video' in error_of(capsys, tmp_path / 'text.avi', *options)
    assert not (tmp_path / 'out').exists()


def test_a_video_that_is_cut_off_is_said_to_be(film, tmp_path, caplog):
    video = VideoFrames(film)
    video.length = 9
    assert len(list(video)) == 5
    assert 'only 5 of 9 frames could be read' in caplog.text


def test_a_frame_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match='a frame is 64 x 48 pixels and the video .* 50 x 40'), VideoSink(
            tmp_path / 'film.mp4', 10, (50, 40)) as sink:
        sink.write(np.zeros((48, 64, 3), dtype=np.uint8))


def test_an_interrupt_leaves_no_half_video(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoSink(tmp_path / 'film.mp4', 10, (64, 48)) as sink:
        sink.write(np.zeros((48, 64, 3), dtype=np.uint8))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('argv', 'problem'), [
    (['{empty}', '--checkpoint', '{weights}'], 'no images in the folder'),
    (['{picture}', '--config', '{config}'], '--config needs --checkpoint'),
    (['{picture}', '--config', '{config}', '--checkpoint', '{weights}', '--model', 'x'], 'give one'),
    (['{picture}', '--config', 'classification/vim-pico_fashion-mnist.py', '--checkpoint', '{weights}'],
     'is of the scope visionssm'),
    (['{picture}', '--config', '{config}', '--checkpoint', '{other}'], 'does not fit RetinaNet'),
    (['{picture}', '--model', 'test_vit', '--checkpoint', '{weights}'], 'holds a detector or segmentor'),
], ids=['empty', 'no-weights', 'both', 'classifier', 'other-model', 'as-classifier'])
def test_wrong_requests_end_with_one_clear_error(argv, problem, detector, segmentor, on_disk, coco_tree, tmp_path,
                                                 capsys):
    (tmp_path / 'empty').mkdir()
    places = {'empty': tmp_path / 'empty', 'weights': detector[1], 'other': segmentor[1],
              'config': on_disk(detector[0]), 'picture': next((coco_tree / 'val2017').iterdir())}
    assert problem in error_of(capsys, *(word.format(**places) for word in argv), '--out', tmp_path / 'out')


def test_a_classifier_takes_no_video(weights, film, capsys, tmp_path):
    assert 'film.mp4 is a video' in error_of(capsys, film, '--model', 'test_vit', '--checkpoint', weights)


@pytest.mark.parametrize('text', ["model = dict(type='os.system')", "model = __import__('os').system('true')",
                                  "custom_imports = dict(imports=['os'])", 'model = dict(', "model = open('x')"])
def test_a_config_in_a_checkpoint_runs_nothing(text):
    with pytest.raises(CheckpointError, match=r'a\.pth: the config in it .*--config'):
        read_config(text, 'a.pth')


def test_a_config_in_a_checkpoint_keeps_its_values():
    model = dict(type='visionssm.X', size=(64, -1), low=-0.5, high=float('inf'), parts=[dict(type='Y', on=True), None])
    text = Config(dict(model=model, default_scope='mmdet', max_epochs=3)).pretty_text
    assert read_config(text, 'a.pth').to_dict() == dict(model=model, default_scope='mmdet')


def test_masks_are_written_as_run_lengths():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[1, 4:9, 5:15] = True
    found = InstanceData(bboxes=torch.tensor([[0., 0, 1, 1], [5, 4, 15, 9]]), scores=torch.tensor([0.2, 0.9]),
                         labels=torch.tensor([0, 1]), masks=masks)
    row, = objects(type('Sample', (), {'pred_instances': found}), ['cat', 'dog'], 0.5)
    assert (row['category'], row['bbox']) == ('dog', [5, 4, 10, 5])
    assert np.array_equal(decode(row['segmentation']), masks[1].numpy())


def test_frames_are_read_again_from_the_start(film):
    video = VideoFrames(film)
    first, second = (np.stack(list(video)) for _ in range(2))
    assert np.array_equal(first, second) and first.shape == (5, 48, 64, 3)
    assert Path(film).is_file() and cv2.VideoCapture(str(film)).isOpened()
