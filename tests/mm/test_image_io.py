"""Reading images: every usual kind of file becomes the BGR picture that its annotations are made for."""
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')

from PIL import Image  # noqa: E402

from visionssm.openmmlab.image_io import LoadImage  # noqa: E402
from visionssm.registry import TRANSFORMS  # noqa: E402

ORIENTATION = 0x0112
RGB = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)


def load(path: Path, options: dict | None = None, **sample: object) -> np.ndarray:
    return LoadImage(**(options or {}))({'img_path': str(path), **sample})['img']


def save(tmp_path: Path, image: Image.Image, name: str = 'image.png', **kwargs: object) -> Path:
    image.save(tmp_path / name, **kwargs)
    return tmp_path / name


@pytest.fixture
def photograph(tmp_path: Path):
    """A function that writes a JPEG of 40 x 24 stored pixels, white at the left, with an EXIF orientation."""

    def make(orientation: int, size: tuple[int, int] = (40, 24)) -> Path:
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        pixels[:, :8] = 255
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        return save(tmp_path, Image.fromarray(pixels), f'photo{orientation}.jpg', quality=95, exif=exif)

    return make


def test_the_transform_is_registered_and_gives_what_pipelines_expect(tmp_path):
    step = TRANSFORMS.build(dict(type='visionssm.LoadImage', to_float32=True))
    results = step({'img_path': str(save(tmp_path, Image.fromarray(RGB)))})
    assert results['img'].dtype == np.float32 and results['img'].flags['C_CONTIGUOUS']
    assert results['img_shape'] == results['ori_shape'] == (6, 9)
    assert (results['img'] == RGB[..., ::-1]).all()


@pytest.mark.parametrize('quality', [60, 95])
def test_jpegs_are_decoded_as_opencv_does(tmp_path, quality):
    cv2 = pytest.importorskip('cv2')
    pixels = np.clip(np.cumsum(np.random.default_rng(1).normal(0, 9, (64, 80, 3)), 1) + 120, 0, 255).astype(np.uint8)
    path = save(tmp_path, Image.fromarray(pixels), 'image.jpg', quality=quality)
    assert np.abs(load(path).astype(int) - cv2.imread(str(path))).max() <= 3


def test_greys_become_three_equal_channels_and_stay_one_if_asked(tmp_path):
    path = save(tmp_path, Image.fromarray(RGB[..., 0]))
    assert (load(path) == RGB[..., :1]).all() and load(path).shape == (6, 9, 3)
    assert load(path, dict(color_type='grayscale')).shape == (6, 9, 1)


def test_greys_of_16_bits_keep_their_upper_8(tmp_path):
    path = save(tmp_path, Image.fromarray((RGB[..., 0].astype(np.uint16) << 8) + 77))
    assert (load(path) == RGB[..., :1]).all()


def test_transparent_pixels_are_white(tmp_path):
    alpha = np.full((6, 9, 1), 255, np.uint8)
    alpha[:3] = 0
    image = load(save(tmp_path, Image.fromarray(np.concatenate([RGB, alpha], 2))))
    assert (image[:3] == 255).all() and (image[3:] == RGB[3:, :, ::-1]).all()


def test_palettes_are_resolved_with_their_transparency(tmp_path):
    indices = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), 'L').convert('P')
    indices.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert load(save(tmp_path, indices)).tolist() == [[[30, 20, 10], [60, 50, 40]], [[90, 80, 70], [60, 50, 40]]]
    assert load(save(tmp_path, indices, 'b.png', transparency=2))[1, 0].tolist() == [255, 255, 255]


def test_cmyk_jpegs_have_their_colours(tmp_path):
    pixels = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    path = save(tmp_path, Image.fromarray(pixels).convert('CMYK'), 'image.jpg', quality=95)
    assert np.abs(load(path).astype(int) - (90, 40, 200)).max() < 6


def test_a_photograph_without_annotations_is_turned(photograph):
    image = load(photograph(6))
    assert image.shape == (40, 24, 3) and image[2].mean() > 250 and image[20].mean() < 5


def test_annotations_of_the_turned_size_turn_it(photograph):
    image = load(photograph(6), width=24, height=40)
    assert image.shape == (40, 24, 3) and image[2].mean() > 250


def test_annotations_of_the_stored_size_leave_it(photograph):
    image = load(photograph(6), width=40, height=24)
    assert image.shape == (24, 40, 3) and image[:, 2].mean() > 250


def test_annotations_of_another_size_are_refused_with_both(photograph):
    with pytest.raises(ValueError, match=r'photo6\.jpg has 40 x 24 \(24 x 40 after.*and 41 x 24 according'):
        load(photograph(6), width=41, height=24)
    with pytest.raises(ValueError, match=r'photo1\.jpg has 40 x 24 pixels, and 24 x 40 according'):
        load(photograph(1), width=24, height=40)


def test_half_turns_and_squares_follow_the_file_unless_told_otherwise(photograph):
    assert load(photograph(3), width=40, height=24)[:, 37].mean() > 250
    path = photograph(6, (24, 24))
    assert load(path, width=24, height=24)[2].mean() > 250
    assert load(path, dict(orientation='ignore'), width=24, height=24)[:, 2].mean() > 250


def test_a_label_map_says_the_size_where_no_annotation_file_does(photograph, tmp_path):
    for shape in ((24, 40), (40, 24)):
        labels = save(tmp_path, Image.fromarray(np.zeros(shape, np.uint8)), 'labels.png')
        assert load(photograph(6), seg_map_path=str(labels)).shape[:2] == shape
    labels = save(tmp_path, Image.fromarray(np.zeros((5, 5), np.uint8)), 'labels.png')
    with pytest.raises(ValueError, match=r'and 5 x 5 according to .*labels\.png'):
        load(photograph(6), seg_map_path=str(labels))


@pytest.mark.parametrize('kind', ['cut off', 'empty', 'no image'])
def test_damaged_files_are_named(tmp_path, kind):
    path = save(tmp_path, Image.fromarray(np.tile(RGB, (9, 9, 1))), 'damaged.jpg')
    content = path.read_bytes()
    path.write_bytes({'cut off': content[:len(content) // 2], 'empty': b'', 'no image': b'hello' * 99}[kind])
    with pytest.raises(ValueError, match=r'damaged\.jpg (cannot be decoded|is empty)'):
        load(path)


def test_a_single_pixel_and_floating_point_values(tmp_path):
    assert load(save(tmp_path, Image.fromarray(RGB[:1, :1]))).shape == (1, 1, 3)
    with pytest.raises(ValueError, match='floating-point'):
        load(save(tmp_path, Image.fromarray(np.zeros((3, 3), np.float32)), 'float.tiff'))


@pytest.mark.parametrize('options', [dict(color_type='rgb'), dict(orientation='exif')])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match='allowed are'):
        LoadImage(**options)
