"""tools/predict.py with restoration models: any picture and model, pieces, failures, and what checkpoints say."""
import json
import logging

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import visionssm
from visionssm.checkpoints import CheckpointError, save_safetensors
from visionssm.openmmlab import predict_restoration
from visionssm.openmmlab.facts import RestorerFacts, describe_restorer
from visionssm.openmmlab.image_files import FORMATS, Picture, read_picture, write_picture
from visionssm.openmmlab.predict import predict
from visionssm.openmmlab.predict_restoration import Restorer
from visionssm.openmmlab.restoration.restorer import ImageRestorer

PICO = {'name': 'mambair_pico', 'depths': (1,), 'd_state': 1}
KINDS = {
    'sr': (PICO, 2),
    'x3': (dict(PICO, upscale=3), 3),
    'real-sr': ({'name': 'mambair_realsr_x4', 'embed_dim': 30, 'depths': (1,), 'd_state': 1, 'upscale': 4,
                 'upsampler': 'nearest+conv'}, 4),
    'denoising': ({'name': 'mambair_dn_color', 'embed_dim': 30, 'depths': (1,), 'd_state': 1}, 1),
    'artefacts': ({'name': 'mambair_car_gray', 'embed_dim': 30, 'depths': (1,), 'd_state': 1}, 1),
    'unet': ({'name': 'mambair_unet_realdn', 'dim': 32, 'depths': (1, 1), 'refinement': 1, 'd_state': 1}, 1),
    'windows': ({'name': 'mambairv2_pico', 'depths': (1,)}, 2),
}


class Enlarge(torch.nn.Module):
    """Stands in for a network: the picture itself, enlarged."""

    def __init__(self, upscale: int = 2, in_chans: int = 3):
        super().__init__()
        self.upscale, self.in_chans = upscale, in_chans

    def forward(self, x):
        return F.interpolate(x, scale_factor=self.upscale)


@pytest.fixture
def stand_in(monkeypatch):
    """A function that puts a network in the place of every model."""
    def put(net: torch.nn.Module):
        monkeypatch.setattr(predict_restoration, '_load', lambda facts: net)
        return RestorerFacts('mambair_pico', None)
    return put


def export(model, folder):
    restorer = ImageRestorer(dict(model))
    return str(restorer.export(restorer.state_dict(), folder, {}))


def noise(height, width, channels=3, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def save(pixels, path):
    write_picture(Picture(pixels), path, FORMATS['png'])


def run(*arguments):
    return predict([*map(str, arguments), '--device', 'cpu'])


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_model_takes_pictures_of_any_size(kind, tmp_path):
    model, scale = KINDS[kind]
    restorer = Restorer(describe_restorer(export(model, tmp_path)))
    for shape in ((1, 1, 3), (1, 19, 1), (9, 1, 4), (13, 17, 2)):
        for dtype in (np.uint8, np.uint16):
            out = restorer.restore(noise(*shape, dtype=dtype))
            assert out.shape == (scale * shape[0], scale * shape[1], shape[2]) and out.dtype == dtype


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('model_channels', [1, 3])
def test_a_network_that_changes_nothing_returns_the_picture(stand_in, channels, dtype, model_channels):
    pixels = noise(50, 70, channels, dtype)
    restorer = Restorer(stand_in(Enlarge(1, model_channels)), tile=32)
    np.testing.assert_array_equal(restorer.restore(pixels), pixels)
    larger = Restorer(stand_in(Enlarge(2, 3)), tile=32).restore(pixels)
    color = channels - (channels % 2 == 0)
    np.testing.assert_array_equal(larger[..., :color], pixels[..., :color].repeat(2, 0).repeat(2, 1))


def test_a_gray_model_keeps_the_chroma_of_colours(stand_in):
    class Brighter(Enlarge):
        def forward(self, x):
            return x + 20 / 255

    pixels = noise(20, 30) // 2
    np.testing.assert_array_equal(Restorer(stand_in(Brighter(1, 1))).restore(pixels), pixels + 20)


def test_pieces_give_what_the_whole_gives(tmp_path):
    torch.manual_seed(0)
    facts = describe_restorer(export(PICO, tmp_path))
    pixels, seen = noise(70, 80), []
    pieces = Restorer(facts, tile=56, overlap=32)
    out = pieces.restore(pixels, lambda done, total: seen.append((done, total)))
    whole = Restorer(facts, tile=0).restore(pixels)
    assert np.abs(out.astype(int) - whole).max() <= 1 and whole.std() > 20
    assert seen[-1] == (4, 4) == (pieces.count(70, 80),) * 2
    np.testing.assert_array_equal(Restorer(facts, tile=56, ensemble=True).restore(pixels[:9, :8, :]).shape, (18, 16, 3))


def test_pieces_are_multiples_of_what_the_model_needs(tmp_path):
    facts = describe_restorer(export(KINDS['windows'][0], tmp_path))
    assert Restorer(facts, tile=33).tile == 40


def test_what_overflows_in_half_precision_is_computed_again(stand_in, caplog):
    class Overflows(Enlarge):
        def forward(self, x):
            return x * torch.inf if torch.is_autocast_enabled('cpu') else x

    pixels = noise(9, 9)
    restorer = Restorer(stand_in(Overflows(1)), precision='bf16')
    np.testing.assert_array_equal(restorer.restore(pixels), pixels)
    assert 'overflows' in caplog.text
    with pytest.raises(ValueError, match='fp16 needs an accelerator'):
        Restorer(stand_in(Enlarge()), precision='fp16')

    class Broken(Enlarge):
        def forward(self, x):
            return x * torch.nan

    with pytest.raises(ValueError, match='weights are damaged'):
        Restorer(stand_in(Broken())).restore(pixels)


def test_an_export_alone_is_enough_and_the_picture_keeps_its_kind(tmp_path, capsys):
    photos = tmp_path / 'photos'
    (photos / 'deeper').mkdir(parents=True)
    save(noise(9, 8, 4, np.uint16), photos / 'a.png')
    Image.fromarray(noise(9, 8)).save(photos / 'deeper' / 'a.jpg')
    Image.fromarray(noise(9, 8, 1)[..., 0]).save(photos / 'deeper' / 'b.tif')
    out = tmp_path / 'out'
    assert run(photos, '--checkpoint', export(PICO, tmp_path / 'best'), '--out', out, '--compare') == 0
    assert {path.name for path in out.iterdir()} == {
        'a_restored.png', 'a_compare.png', 'a-2_restored.png', 'a-2_compare.png', 'b_restored.tif', 'b_compare.png'}
    found = read_picture(out / 'a_restored.png').pixels
    assert found.shape == (18, 16, 4) and found.dtype == np.uint16
    assert read_picture(out / 'b_restored.tif').pixels.shape == (18, 16, 1)
    assert read_picture(out / 'a-2_compare.png').pixels.shape == (18, 36, 3)
    assert '8 x 9 -> 16 x 18 pixels' in capsys.readouterr().out


def test_training_checkpoints_and_bare_files_say_their_model(tmp_path, monkeypatch, caplog):
    restorer = ImageRestorer(dict(PICO))
    meta = {'cfg': f'model = {dict(type="ImageRestorer", model=PICO)!r}', 'mmengine_version': '0'}
    torch.save({'meta': meta, 'state_dict': restorer.state_dict()}, tmp_path / 'iter_1.pth')
    pixels = noise(6, 7)
    expected = Restorer(describe_restorer(export(PICO, tmp_path / 'best')))
    expected.net.load_state_dict(restorer.model.state_dict())
    found = Restorer(describe_restorer(str(tmp_path / 'iter_1.pth')))
    np.testing.assert_array_equal(found.restore(pixels), expected.restore(pixels))

    monkeypatch.setattr(visionssm, 'list_models', lambda task=None: ['mambair_pico', 'mambairv2_pico'])
    caplog.set_level(logging.INFO, 'visionssm')
    bare = str(save_safetensors(visionssm.create_model('mambairv2_pico').state_dict(), tmp_path / 'bare.safetensors'))
    assert describe_restorer(bare).name == 'mambairv2_pico' and 'does not say what it holds' in caplog.text
    with pytest.raises(CheckpointError, match='holds weights of mambairv2_pico, not of mambair_pico: give --model'):
        Restorer(describe_restorer(bare, 'mambair_pico'))
    with pytest.raises(CheckpointError, match='holds mambair_pico, not mambairv2_pico'):
        describe_restorer(str(tmp_path / 'iter_1.pth'), 'mambairv2_pico')


@pytest.mark.parametrize('arguments,problem', [
    (['--model', 'mambair_pico'], '--checkpoint FILE'),
    (['--model', 'mambair_sr_x5'], "'mambair_sr_x"),
    (['--model', 'mambair_pico', '--checkpoint', 'nowhere.pth'], 'nowhere.pth does not exist'),
    (['--model', 'test_vit', '--checkpoint', '{export}'], 'holds a restoration model'),
    (['--checkpoint', '{export}', '--tile', '16', '--overlap', '16'], '--tile 16 and --overlap 16'),
    (['--checkpoint', '{export}', '--quality', '0'], '--quality is 0'),
    (['--checkpoint', '{export}', '--out', '{picture}'], 'is a file'),
], ids=['no-weights', 'misspelt', 'no-file', 'other-task', 'overlap', 'quality', 'out'])
def test_wrong_requests_end_with_one_clear_error(arguments, problem, tmp_path, capsys):
    save(noise(4, 4), tmp_path / 'a.png')
    places = {'export': export(PICO, tmp_path), 'picture': tmp_path / 'a.png'}
    assert run(tmp_path / 'a.png', *(argument.format(**places) for argument in arguments)) == 1
    errors = capsys.readouterr().err.partition('error: ')[2]
    assert problem in errors and 'Traceback' not in errors


def test_files_that_fail_do_not_stop_the_others(stand_in, tmp_path, caplog, monkeypatch, capsys):
    class Hungry(Enlarge):
        def forward(self, x):
            if x.shape[-1] == 13:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().forward(x)

    stand_in(Hungry())
    photos = tmp_path / 'photos'
    photos.mkdir()
    save(noise(8, 8), photos / 'good.png')
    save(noise(8, 13), photos / 'large.png')
    save(noise(80, 80), photos / 'cut.png')
    (photos / 'cut.png').write_bytes((photos / 'cut.png').read_bytes()[:3000])
    (photos / 'empty.png').write_bytes(b'')
    (photos / 'film.mp4').write_text('no film')
    out = tmp_path / 'out'
    assert run(photos, '--model', 'mambair_pico', '--out', out, '--max-megapixels', '0.01') == 0
    assert [path.name for path in out.iterdir()] == ['good_restored.png']
    capsys.readouterr()
    summary = caplog.messages[-1]
    for part in ('4 of 5 files', 'large.png: not enough memory', 'cut.png: is damaged', 'empty.png: is empty',
                 'film.mp4: cannot be read as a video'):
        assert part in summary
    assert run(photos / 'empty.png', '--model', 'mambair_pico', '--out', tmp_path / 'none') == 1
    assert not (tmp_path / 'none').exists()

    def walk(path, onerror):
        onerror(PermissionError(13, 'Permission denied', f'{path}/locked'))
        return [(str(photos), [], ['good.png'])]

    monkeypatch.setattr('os.walk', walk)
    assert run(photos, '--model', 'mambair_pico', '--out', out) == 0
    assert f'{photos}/locked: Permission denied' in caplog.messages[-1]
    capsys.readouterr()
    assert run(photos, '--model', 'mambair_pico', '--out', out, '--json') == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{'path': f'{photos}/locked', 'error': 'Permission denied'},
                    {'path': f'{photos}/good.png', 'restored': f'{out}/good_restored.png', 'width': 16, 'height': 16}]


def test_inputs_are_never_overwritten_and_results_not_restored_again(stand_in, tmp_path):
    stand_in(Enlarge())
    for name in ('a', 'a_restored'):
        save(noise(4, 4), tmp_path / f'{name}.png')
    before = (tmp_path / 'a_restored.png').read_bytes()
    assert run(tmp_path / 'a.png', tmp_path / 'a_restored.png', '--model', 'mambair_pico', '--out', tmp_path) == 0
    assert (tmp_path / 'a_restored.png').read_bytes() == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {'a.png', 'a_restored.png', 'a-2_restored.png', 'a_restored_restored.png'}
    (tmp_path / 'a_restored.png').unlink()
    assert run(tmp_path, '--model', 'mambair_pico', '--out', tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_interrupt_leaves_no_half_files(stand_in, tmp_path, capsys):
    class Interrupted(Enlarge):
        def forward(self, x):
            raise KeyboardInterrupt

    stand_in(Interrupted())
    save(noise(8, 8), tmp_path / 'a.png')
    film(tmp_path / 'film.avi', 2)
    for name in ('a.png', 'film.avi'):
        assert run(tmp_path / name, '--model', 'mambair_pico', '--out', tmp_path / 'out') == 130
    assert capsys.readouterr().err.split() == ['stopped', 'stopped']
    assert not (tmp_path / 'out').exists() or not list((tmp_path / 'out').iterdir())


def film(path, frames):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'MJPG'), 5, (32, 24))
    for number in range(frames):
        writer.write(np.full((24, 32, 3), 40 * number + 40, np.uint8))
    writer.release()


def test_videos_are_restored_frame_by_frame(stand_in, tmp_path, capsys):
    stand_in(Enlarge())
    film(tmp_path / 'film.avi', 3)
    assert run(tmp_path / 'film.avi', '--model', 'mambair_pico', '--out', tmp_path / 'out', '--tile', '16') == 0
    assert '3 frames, 32 x 24 -> 64 x 48 pixels' in capsys.readouterr().out
    capture = cv2.VideoCapture(str(next((tmp_path / 'out').glob('film_restored.*'))))
    frames = [capture.read()[1] for _ in range(3)]
    assert [abs(float(frame.mean()) - 40 * number - 40) < 6 for number, frame in enumerate(frames)] == [True] * 3
    assert frames[0].shape == (48, 64, 3)


def test_jpeg_and_its_quality_on_request(stand_in, tmp_path):
    stand_in(Enlarge())
    save(noise(16, 16), tmp_path / 'a.png')
    for quality in (20, 90):
        assert run(tmp_path / 'a.png', '--model', 'mambair_pico', '--out', tmp_path / str(quality), '--format', 'jpg',
                   '--quality', quality) == 0
    low, high = ((tmp_path / name / 'a_restored.jpg').stat().st_size for name in ('20', '90'))
    assert low < high / 2
