"""The pictures, and the command that draws them."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visionssm
from visionssm.analysis import (
    ReceptiveField,
    draw_attention,
    draw_receptive_field,
    draw_routes,
    save_picture,
    scan_attention,
    scan_routes,
    to_picture,
)
from visionssm.analysis.pictures import HEAT, colours
from visionssm.analysis.tool import visualize
from visionssm.checkpoints import save_safetensors


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    return str(tmp_path / 'photo.png')


def has_colour(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(picture) == colour).all(-1)


def test_colours_meet_their_points_and_grow_lighter():
    ends = colours(np.linspace(0, 1, len(HEAT)))
    assert np.abs(ends.astype(int) - HEAT).max() <= 2  # 256 shades
    assert ends[[0, -1]].tolist() == [list(HEAT[0]), list(HEAT[-1])]
    lightness = colours(np.linspace(0, 1, 99)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness) > -0.5).all()


def test_an_image_becomes_the_picture_that_it_was():
    pixels = torch.arange(2 * 4 * 3).view(2, 4, 3).to(torch.uint8)
    image = (pixels.permute(2, 0, 1) / 255 - 0.25) / 0.5
    assert np.array_equal(np.asarray(to_picture(image, (0.25,) * 3, (0.5,) * 3)), pixels.numpy())
    assert to_picture(torch.zeros(1, 2, 4)).size == (4, 2)
    with pytest.raises(ValueError, match=r'image is \(2, 4, 4\)'):
        to_picture(torch.zeros(2, 4, 4))


def test_the_brightest_pixel_of_a_field_stands_where_it_is():
    gradient = torch.full((20, 40), 1e-6, dtype=torch.float64)
    gradient[5, 30] = 1
    drawn = draw_receptive_field(ReceptiveField(gradient, (10., 20.), (1, 1), 1), side=400)
    dark_rows, dark_columns = has_colour(drawn, HEAT[0]).nonzero()
    top, left = dark_rows.min(), dark_columns.min()
    rows, columns = has_colour(drawn, HEAT[-1])[:top + 200].nonzero()  # the colour bar is below
    assert rows.min() - top == 50 and columns.min() - left == 300


def test_an_attention_is_drawn_for_all_routes_and_each():
    model = visionssm.create_model('vmamba_pico')
    found = scan_attention(model, torch.randn(3, 32, 64), 0, (0, 63))
    drawn = draw_attention(found, Image.new('RGB', (64, 32)), side=128)
    assert drawn.width >= 3 * 128 and drawn.height >= 2 * 64
    marks = has_colour(drawn, (60, 255, 120))
    assert len(np.unique((marks.nonzero()[1] - 14) // (128 + 14))) == 3  # one in each column of panels


@pytest.mark.parametrize(('name', 'options', 'panels'), [
    ('vmamba_pico', {}, 4), ('mhs_vm_pico', {}, 16), ('mamba2d_pico', {}, 1), ('vssd_pico', {}, 1),
    ('vmamba_pico', {'routes': 'cascade'}, 4)], ids=str)
def test_every_kind_of_route_is_drawn(name: str, options: dict, panels: int):
    found = scan_routes(visionssm.create_model(name, **options), (32, 48))
    drawn = draw_routes(found[0], 'title', side=96)
    assert len(found[0].routes) == panels
    assert drawn.width > min(panels, 4) * 90 and len(drawn.getcolors(2 ** 24)) > 20


def test_an_image_shines_through_its_routes():
    block = scan_routes(visionssm.create_model('vmamba_pico'), 32)[0]
    plain, over = (draw_routes(block, 'title', picture, 96) for picture in (None, Image.new('RGB', (64, 64))))
    assert plain.size == over.size and np.asarray(over).mean() < np.asarray(plain).mean() - 20


def test_several_blocks_share_a_sheet():
    found = scan_routes(visionssm.create_model('vim2_pico'), 32)
    together = draw_routes(found[:3], side=96)
    assert together.height > 2 * 96 and draw_routes([found[0], found[2]], side=96).height < 2 * 96 + 80
    assert draw_routes(found[2], side=160).height < 240  # words alone
    with pytest.raises(ValueError, match='no routes to draw'):
        draw_routes([])


@pytest.mark.parametrize('arguments', [
    ['vmamba_pico', 'erf', '--noise', '1'], ['vim_pico', 'erf', 'PHOTO'], ['vmamba_pico', 'routes'],
    ['mambairv2_pico', 'routes', 'PHOTO', '--block', '-1'], ['mamba2d_pico', 'attention', 'PHOTO', '--query', '3', '4'],
    ['vssd_pico', 'attention', 'PHOTO', '--size', '32', '64', '--block', 'stages.1.blocks.0'],
    ['dis_pico', 'attention', 'PHOTO']], ids=' '.join)
def test_the_command_draws(arguments: list[str], photo: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / 'folder' / 'picture.png'
    given = [photo if argument == 'PHOTO' else argument for argument in arguments]
    assert visualize([*given, '-o', str(out), '--json']) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts['model'] == arguments[0] and facts['weights'] == 'random weights' and facts['file'] == str(out)
    with Image.open(out) as picture:
        assert picture.format == 'PNG' and min(picture.size) > 150
    assert [path.name for path in out.parent.iterdir()] == ['picture.png']
    first = out.read_bytes()
    assert visualize([*given, '-o', str(out)]) == 0
    assert out.read_bytes() == first
    assert 'weights: random weights' in capsys.readouterr().out


def test_weights_of_a_file_are_used_with_its_arguments(photo: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.manual_seed(5)
    model = visionssm.create_model('mambair_pico', d_state=2, upscale=1, upsampler='residual')
    config = {'architecture': 'mambair_pico', 'model_args': {'d_state': 2, 'upscale': 1, 'upsampler': 'residual'}}
    path = save_safetensors(model.state_dict(), tmp_path / 'w.safetensors', {'config': json.dumps(config)})
    out = ['-o', str(tmp_path / 'e.png')]
    assert visualize(['mambair_pico', 'erf', photo, '--size', '16', '--checkpoint', str(path), '--json', *out]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts['weights'] == 'weights w.safetensors' and facts['feature_size'] == [16, 16]
    assert visualize(['vim_pico', 'erf', '--checkpoint', str(path), *out]) == 1
    assert 'holds weights of mambair_pico, not of vim_pico' in capsys.readouterr().err


@pytest.mark.parametrize(('arguments', 'message'), [
    (['nope_pico', 'erf'], "Unknown model 'nope_pico'"),
    (['vim_pico', 'attention', 'missing.png'], 'missing.png cannot be read'),
    (['vim_pico', 'erf', '--checkpoint', 'missing.safetensors'], 'missing.safetensors does not exist'),
    (['vim_pico', 'routes', '--block', '9'], 'no block 9 that scans. There are 4: 0 blocks.0'),
    (['dis_small_patch2', 'erf', 'PHOTO'], 'takes 4 channels: latents'),
    (['mambairv2_pico', 'routes'], 'give an image'),
    (['test_resnet.r160_in1k', 'routes'], 'ResNet has no scans'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_what_cannot_be_drawn_is_one_line(
        arguments: list[str],
        message: str,
        photo: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture,
):
    given = [photo if argument == 'PHOTO' else argument for argument in arguments]
    assert visualize([*given, '-o', str(tmp_path / 'out.png')]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not (tmp_path / 'out.png').exists()


@pytest.mark.parametrize('arguments', [
    ['attention'], ['routes', 'a.png', 'b.png'], ['erf', '--query', '1', '1'], ['erf', '--block', '0'],
    ['erf', '--size', '0'], ['erf', '--noise', '0'], ['erf', '--side', '9'], ['erf', '-o', 'a.jpg'],
    ['erf', '--pretrained', '--checkpoint', 'x'], ['dream']], ids=' '.join)
def test_options_that_do_not_go_together_end_at_once(arguments: list[str]):
    with pytest.raises(SystemExit) as caught:
        visualize(['vim_pico', *arguments])
    assert caught.value.code == 2


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / 'picture.png'
    target.write_bytes(b'old')

    def full(descriptor: int) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(OSError, match='No space left'):
        save_picture(Image.new('RGB', (4, 4)), target)
    assert target.read_bytes() == b'old' and list(tmp_path.iterdir()) == [target]
