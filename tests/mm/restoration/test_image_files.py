"""Picture files: what is read and written again is the same picture, with its profile and EXIF data."""
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from visionssm.openmmlab.image_files import FORMATS, Picture, choose_format, read_picture, write_picture

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


def noise(height, width, channels, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def some_exif(orientation=None):
    exif = Image.Exif()
    exif[271], exif[306] = 'Maker', '2024:01:02 03:04:05'
    exif.get_ifd(0x8769).update({33434: 0.01, 40962: 5})
    exif.get_ifd(0x8825)[2] = (1., 2., 3.5)
    if orientation:
        exif[274] = orientation
    return exif


@pytest.mark.parametrize('name', ['png', 'tiff'])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_what_is_written_is_read_again(tmp_path, name, dtype, channels):
    pixels = noise(37, 61, channels, dtype)
    write_picture(Picture(pixels, 'PNG', PROFILE, some_exif()), tmp_path / 'picture', FORMATS[name])
    found = read_picture(tmp_path / 'picture')
    if dtype is np.uint16 and channels == 2:
        pixels = pixels[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(found.pixels, pixels)
    assert found.pixels.dtype == dtype and found.icc == PROFILE and found.kind == FORMATS[name].name
    assert found.exif[271] == 'Maker' and found.exif.get_ifd(0x8769) == {33434: 0.01, 40962: 61}
    assert found.exif.get_ifd(0x8825) == {2: (1., 2., 3.5)}
    with Image.open(tmp_path / 'picture') as other:
        assert other.size == (61, 37)


@pytest.mark.parametrize('name', ['jpg', 'webp'])
def test_lossy_files_keep_profile_and_exif_data(tmp_path, name):
    write_picture(Picture(np.full((8, 9, 3), 90, np.uint8), 'PNG', PROFILE, some_exif()), tmp_path / 'a', FORMATS[name])
    found = read_picture(tmp_path / 'a')
    assert found.icc == PROFILE and found.exif[271] == 'Maker' and abs(found.pixels.astype(int) - 90).max() < 4


@pytest.mark.parametrize('orientation', range(1, 9))
def test_photographs_are_turned_once(tmp_path, orientation):
    Image.fromarray(noise(5, 7, 3)).save(tmp_path / 'a.png', exif=some_exif(orientation))
    found = read_picture(tmp_path / 'a.png')
    with Image.open(tmp_path / 'a.png') as image:
        np.testing.assert_array_equal(found.pixels, np.asarray(ImageOps.exif_transpose(image)))
    assert 274 not in found.exif and found.exif[271] == 'Maker'
    write_picture(found, tmp_path / 'b.png', FORMATS['png'])
    np.testing.assert_array_equal(read_picture(tmp_path / 'b.png').pixels, found.pixels)


@pytest.mark.parametrize('channels', [1, 3])
def test_deep_tiffs_are_turned_once(tmp_path, channels):
    pixels = noise(5, 7, channels, np.uint16)
    header = TiffImagePlugin.ImageFileDirectory_v2(prefix=b'II')
    for tag, value in {256: 7, 257: 5, 258: (16,) * channels, 259: 1, 262: 2 if channels == 3 else 1, 273: 0, 274: 6,
                       277: channels, 278: 5, 279: pixels.nbytes}.items():
        header[tag] = value
    with open(tmp_path / 'a.tif', 'wb') as file:
        header.save(file)
        file.write(pixels.tobytes())
    np.testing.assert_array_equal(read_picture(tmp_path / 'a.tif').pixels, np.rot90(pixels, -1))


def test_transparency_of_palettes_and_single_colours_becomes_alpha(tmp_path):
    image = Image.fromarray(noise(6, 8, 3)).quantize(16)
    image.info['transparency'] = 3
    image.save(tmp_path / 'a.png')
    found = read_picture(tmp_path / 'a.png').pixels
    assert found.shape == (6, 8, 4)
    np.testing.assert_array_equal(found[..., 3] == 0, np.asarray(image) == 3)
    Image.fromarray(noise(6, 8, 1)[..., 0]).save(tmp_path / 'gray.gif')
    assert read_picture(tmp_path / 'gray.gif').pixels.shape == (6, 8, 1)
    gray = noise(4, 5, 1, np.uint16)
    raw = b''.join(b'\0' + row.astype('>u2').tobytes() for row in gray[..., 0])
    chunks = ((b'IHDR', struct.pack('>IIBBBBB', 5, 4, 16, 0, 0, 0, 0)), (b'tRNS', gray[1, 2].astype('>u2').tobytes()),
              (b'IDAT', zlib.compress(raw)), (b'IEND', b''))
    (tmp_path / 'deep.png').write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        for kind, data in chunks))
    found = read_picture(tmp_path / 'deep.png').pixels
    np.testing.assert_array_equal(found[..., :1], gray)
    assert found[1, 2, 1] == 0 and (found[..., 1] == 65535).sum() == 19


def test_printed_colours_are_converted_with_a_word(tmp_path, caplog):
    Image.fromarray(noise(8, 8, 3)).convert('CMYK').save(tmp_path / 'a.tif')
    assert read_picture(tmp_path / 'a.tif').pixels.shape == (8, 8, 3)
    assert 'CMYK without a colour profile' in caplog.text
    Image.fromarray(noise(8, 8, 3)).convert('CMYK').save(tmp_path / 'b.tif', icc_profile=b'no profile at all' * 20)
    found = read_picture(tmp_path / 'b.tif')
    assert found.icc is None and 'profile that cannot be used' in caplog.text


def test_of_several_pictures_the_first_is_taken(tmp_path, caplog):
    pages = [Image.new('RGB', (4, 3), color) for color in ('red', 'blue')]
    pages[0].save(tmp_path / 'a.tif', save_all=True, append_images=pages[1:])
    assert read_picture(tmp_path / 'a.tif').pixels[0, 0].tolist() == [255, 0, 0]
    assert 'holds 2 pictures' in caplog.text


def test_bombs_are_refused_by_their_header(tmp_path):
    Image.new('1', (20000, 10000)).save(tmp_path / 'a.png')
    with pytest.raises(ValueError, match='20000 x 10000 pixels, 200 megapixels.*--max-megapixels'):
        read_picture(tmp_path / 'a.png')
    limit = Image.MAX_IMAGE_PIXELS
    Image.new('1', (2000, 1000)).save(tmp_path / 'b.png')
    assert read_picture(tmp_path / 'b.png', 0).pixels.shape == (1000, 2000, 1) and Image.MAX_IMAGE_PIXELS == limit


@pytest.mark.parametrize('deep', [False, True])
def test_cut_off_files_are_refused(tmp_path, deep):
    content = cv2.imencode('.png', noise(40, 40, 3, np.uint16 if deep else np.uint8))[1].tobytes()
    (tmp_path / 'a.png').write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match=r'a\.png is damaged'):
        read_picture(tmp_path / 'a.png')


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'')
    with pytest.raises(ValueError, match='is empty'):
        read_picture(tmp_path / 'a.png')
    (tmp_path / 'a.png').write_text('text')
    with pytest.raises(ValueError, match='no picture'):
        read_picture(tmp_path / 'a.png')
    Image.fromarray(np.ones((3, 3), np.float32)).save(tmp_path / 'a.tif')
    with pytest.raises(ValueError, match='floating-point'):
        read_picture(tmp_path / 'a.tif')
    Image.fromarray(np.full((3, 3), 70000, np.int32)).save(tmp_path / 'a.tif')
    with pytest.raises(ValueError, match='from 70000 to 70000'):
        read_picture(tmp_path / 'a.tif')


def test_formats_are_those_that_lose_nothing():
    rgb, rgba = noise(2, 2, 3), noise(2, 2, 4)
    found = [choose_format(Picture(pixels, kind), wanted).name for pixels, kind, wanted in (
        (rgb, 'PNG', None), (rgb, 'JPEG', None), (rgb, 'TIFF', None), (rgb, 'BMP', None), (rgba, 'BMP', None),
        (rgba, 'WEBP', None), (rgb, 'PNG', 'jpg'))]
    assert found == ['PNG', 'PNG', 'TIFF', 'BMP', 'PNG', 'PNG', 'JPEG']


def test_what_a_format_lacks_is_reduced_with_a_word(tmp_path, caplog):
    pixels = np.full((8, 8, 4), 257 * 100, np.uint16)
    pixels[:, :4, 3], pixels[:, 4:, 3] = 0, 65535
    write_picture(Picture(pixels), tmp_path / 'a.bmp', FORMATS['bmp'])
    found = read_picture(tmp_path / 'a.bmp').pixels
    assert (found[:, :4] == 255).all() and (found[:, 4:] == 100).all()
    assert '8 bits a channel' in caplog.text and 'no transparency' in caplog.text
    with pytest.raises(ValueError, match='16384 x 1 pixels do not fit in a WEBP file'):
        write_picture(Picture(np.zeros((1, 16384, 3), np.uint8)), tmp_path / 'a.webp', FORMATS['webp'])


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / 'a.png').write_text('old')

    def full(handle: int) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(OSError, match=r'cannot write .*a\.png: No space left on device'):
        write_picture(Picture(noise(4, 4, 3)), tmp_path / 'a.png', FORMATS['png'])
    assert [path.name for path in tmp_path.iterdir()] == ['a.png'] and (tmp_path / 'a.png').read_text() == 'old'
