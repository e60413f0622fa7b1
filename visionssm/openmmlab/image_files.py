"""Picture files at full fidelity: depth, transparency, colour profile and EXIF data survive reading and writing.

Pillow decodes and encodes, except colours of 16 bits, which it cannot hold: those go through OpenCV, and their TIFF
files through Pillow's writer of TIFF headers.
"""
import io
import logging
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from ..utils.files import atomic_write
from .data import READ_ERRORS
from .image_io import ORIENTATION, decode_image

__all__ = ['FORMATS', 'PICTURE_SUFFIXES', 'Picture', 'choose_format', 'read_picture', 'to_rgb', 'write_picture']

logger = logging.getLogger('visionssm')

PICTURE_SUFFIXES = {'.avif', '.bmp', '.gif', '.jp2', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'}

# what says something about the picture; the rest of a TIFF's tags describes how its pixels lie in the file
KEPT_TAGS = {ExifTags.Base[name].value for name in (
    'ImageDescription', 'Make', 'Model', 'XResolution', 'YResolution', 'ResolutionUnit', 'Software', 'DateTime',
    'Artist', 'HostComputer', 'Copyright', 'Rating', 'XPTitle', 'XPComment', 'XPAuthor', 'XPKeywords', 'XPSubject')}
SUB_TAGS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
SIZE_TAGS = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)


class Format(NamedTuple):
    """A kind of file that can be written."""
    name: str
    """Pillow's name."""
    suffix: str
    deep: bool
    """Whether it holds 16 bits a channel."""
    alpha: bool
    """Whether it holds transparency."""
    side: int
    """Longest side in pixels."""


FORMATS = {
    'png': Format('PNG', '.png', True, True, 2 ** 31 - 1),
    'tiff': Format('TIFF', '.tif', True, True, 2 ** 31 - 1),
    'bmp': Format('BMP', '.bmp', False, False, 2 ** 31 - 1),
    'webp': Format('WEBP', '.webp', False, True, 16383),
    'jpg': Format('JPEG', '.jpg', False, False, 65500),
}


class Picture(NamedTuple):
    """A picture, upright, and what its file says besides the pixels."""
    pixels: np.ndarray
    """uint8 or uint16, (H, W, C): gray, gray and alpha, RGB, or RGB and alpha; alpha is not multiplied in."""
    kind: str = 'PNG'
    """Pillow's name of the file's format."""
    icc: bytes | None = None
    """Colour profile of the pixels."""
    exif: Image.Exif | None = None
    """EXIF data without the orientation, which the pixels have already."""


@contextmanager
def _any_size() -> Iterator[None]:
    """Let Pillow read pictures of any size: ours is the limit that counts."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(content: bytes, path: str | Path, max_megapixels: float) -> None:
    """Refuse a picture by its header, before any memory is taken for its pixels."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except UnidentifiedImageError as error:
        raise ValueError(f'{path} is no picture that Pillow can read' if content else f'{path} is empty') from error
    except READ_ERRORS as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if max_megapixels and width * height > 1e6 * max_megapixels:
        raise ValueError(f'{path} says that it has {width} x {height} pixels, {width * height / 1e6:.0f} megapixels, '
                         f'in {len(content) / 2 ** 20:.2f} MiB; more than {max_megapixels:g} are refused unless '
                         '--max-megapixels allows them (0: any)')


def read_picture(path: str | Path, max_megapixels: float = 150) -> Picture:
    """Reads a picture of any kind without losing depth, transparency or colours.

    Of files with several pictures the first one is taken. Palettes become RGB, and CMYK becomes sRGB by its colour
    profile. Gray with alpha of 16 bits is fully kept too.

    Args:
        path: The file.
        max_megapixels: Larger pictures are refused, unread; 0 for no limit.

    Returns:
        The picture, turned upright.
    """
    content = Path(path).read_bytes()
    with _any_size():
        _check_size(content, path, max_megapixels)
        image = _decode(content, path)
        frames = 1 if image.format == 'MPO' else getattr(image, 'n_frames', 1)
        if frames > 1:
            logger.warning('%s holds %d pictures; only the first one is taken', path, frames)
            image = _decode(content, path)
    try:
        exif = image.getexif()
    except READ_ERRORS as error:
        logger.warning('%s: its EXIF data cannot be read and are left out (%s)', path, error)
        exif = Image.Exif()
    icc = image.info.get('icc_profile')
    if image.mode not in ('I', 'F') and not image.mode.startswith('I;') and not _is_deep(image, content):
        image, icc = _plain(image, icc, path)
        pixels = np.asarray(image)
    else:
        pixels = _deep_pixels(image, content, path)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return Picture(np.ascontiguousarray(_turn(pixels, exif.get(ORIENTATION, 1))), str(image.format or 'PNG'), icc,
                   _kept(exif))


def _decode(content: bytes, path: str | Path) -> Image.Image:
    try:
        return decode_image(content, str(path))
    except ValueError as error:
        raise ValueError(f'{path} is damaged: {error.__cause__ or error}') from error


def _is_deep(image: Image.Image, content: bytes) -> bool:
    """Whether a file has colours of 16 bits, of which Pillow gives the upper 8."""
    if image.mode not in ('RGB', 'RGBA', 'LA'):
        return False
    if image.format == 'PNG':
        return content[24] == 16
    return image.format == 'TIFF' and set(getattr(image, 'tag_v2', {}).get(258, ())) == {16}


def _deep_pixels(image: Image.Image, content: bytes, path: str | Path) -> np.ndarray:
    if image.mode == 'F':
        raise ValueError(f'{path} holds floating-point numbers, whose range is unknown: convert it to 8 or 16 bits')
    if image.mode.startswith('I'):
        values = np.asarray(image)
        if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 65535):
            raise ValueError(f'{path} holds whole numbers from {values.min()} to {values.max()}, of unknown range: '
                             'convert it to 8 or 16 bits')
        gray = values.astype(np.uint16)
        clear = image.info.get('transparency')
        return gray if clear is None else np.dstack([gray, np.where(gray == clear, 0, 65535).astype(np.uint16)])
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(f'{path} cannot be decoded as a picture of 16 bits: {error}') from error
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise ValueError(f'{path} cannot be decoded as a picture of 16 bits: convert it to a PNG')
    if pixels.shape[2] == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    gray_alpha = image.format == 'PNG' and content[25] == 4
    return pixels[..., [0, 3]] if gray_alpha else cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA)


def _plain(image: Image.Image, icc: bytes | None, path: str | Path) -> tuple[Image.Image, bytes | None]:
    """Convert to gray or RGB of 8 bits, with alpha where there is any, and say which profile the result has."""
    kind, mode = image.format, image.mode
    clear = image.has_transparency_data
    if mode in ('1', 'L', 'LA', 'La'):
        image = image.convert('LA' if clear else 'L')
    elif mode in ('P', 'PA'):
        logger.info('%s has a palette; its result has full colours', path)
        image = image.convert('RGBA' if clear else 'RGB')
        bands = image.getchannel('R'), image.getchannel('G'), image.getchannel('B')
        if all(band.tobytes() == bands[0].tobytes() for band in bands):
            image = Image.merge('LA', (bands[0], image.getchannel('A'))) if clear else bands[0]
    elif mode in ('CMYK', 'LAB'):
        image, icc = _to_srgb(image, icc, path), None
    else:
        image = image.convert('RGBA' if clear else 'RGB')
    image.format = kind
    return image, icc


def _to_srgb(image: Image.Image, icc: bytes | None, path: str | Path) -> Image.Image:
    source: Any = ImageCms.createProfile('LAB') if image.mode == 'LAB' else None
    if icc and source is None:
        source = io.BytesIO(icc)
    try:
        if source is not None:
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile('sRGB'), outputMode='RGB')
        reason = 'without a colour profile'
    except (ImageCms.PyCMSError, OSError) as error:
        reason = f'with a colour profile that cannot be used ({error})'
    logger.warning('%s is %s %s; its colours are converted to RGB by a rough rule', path, image.mode, reason)
    return image.convert('RGB')


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror an array (H, W, C) as the EXIF orientation says."""
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 4):
        pixels = np.flip(pixels, 1 if orientation == 2 else 0)
    return np.rot90(pixels, {3: 2, 6: -1, 7: 2, 8: 1}.get(orientation, 0))


def _kept(exif: Image.Exif) -> Image.Exif | None:
    """Copy what EXIF data say about the picture, without orientation, thumbnail and layout of the file."""
    kept = Image.Exif()
    for tag in KEPT_TAGS & exif.keys():
        kept[tag] = exif[tag]
    for tag in SUB_TAGS:
        values = exif.get_ifd(tag)
        if values:
            kept.get_ifd(tag).update(values)
    return kept if kept or any(kept.get_ifd(tag) for tag in SUB_TAGS) else None


def choose_format(picture: Picture, wanted: str | None = None) -> Format:
    """Says as what a picture made of another is written.

    Args:
        picture: The picture that was read.
        wanted: A key of `FORMATS`, or None.

    Returns:
        What is wanted; else TIFF and BMP for themselves, and PNG for all other files, which loses nothing.
    """
    if wanted is not None:
        return FORMATS[wanted]
    alpha = picture.pixels.shape[2] in (2, 4)
    return FORMATS['tiff' if picture.kind == 'TIFF' else 'bmp' if picture.kind == 'BMP' and not alpha else 'png']


def write_picture(picture: Picture, path: str | Path, kind: Format, quality: int = 95) -> None:
    """Writes a picture with its colour profile and EXIF data; the file is either complete or untouched.

    Gray with alpha of 16 bits is written as RGB with alpha.

    Args:
        picture: The picture.
        path: Where; missing folders are made.
        kind: An entry of `FORMATS`. What it cannot hold is reduced with a warning: 16 bits to 8, alpha to white.
        quality: Of JPEG and WebP, 1 to 100; 100 makes WebP lossless.
    """
    pixels = _reduce(picture.pixels, kind, path)
    height, width, channels = pixels.shape
    if max(height, width) > kind.side:
        raise ValueError(f'{path}: {width} x {height} pixels do not fit in a {kind.name} file, whose sides have at '
                         f'most {kind.side}; take --format png')
    if pixels.dtype == np.uint16 and channels == 2:
        pixels = pixels[..., [0, 0, 0, 1]]
    exif = _sized(picture.exif, width, height, path)
    if kind.name == 'TIFF':
        content: bytes | memoryview = _tiff(pixels, picture.icc, exif)
    elif pixels.dtype == np.uint16 and channels > 1:
        content = _deep_png(pixels, picture.icc, exif)
    else:
        content = _by_pillow(pixels, kind, quality, picture.icc, exif)
    try:
        atomic_write(content, path)
    except OSError as error:
        reason = error.__cause__ or error
        raise OSError(f'cannot write {path}: {getattr(reason, "strerror", None) or reason}') from error


def _reduce(pixels: np.ndarray, kind: Format, path: str | Path) -> np.ndarray:
    if pixels.dtype == np.uint16 and not kind.deep:
        logger.warning('%s: %s holds 8 bits a channel, so the picture of 16 bits is rounded', path, kind.name)
        pixels = _to_bytes(pixels)
    if pixels.shape[2] in (2, 4) and not kind.alpha:
        logger.warning('%s: %s holds no transparency, so the picture is put on white', path, kind.name)
        pixels = _on_white(pixels)
    return pixels


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _on_white(pixels: np.ndarray) -> np.ndarray:
    wide: np.ndarray = pixels.astype(np.uint32)
    alpha = wide[..., -1:]
    return ((wide[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Reduces the pixels of a picture to what screens and classifiers take.

    Args:
        pixels: uint8 or uint16, (H, W, C), as in `Picture`.

    Returns:
        uint8, (H, W, 3); what was transparent is on white.
    """
    pixels = _to_bytes(pixels) if pixels.dtype == np.uint16 else pixels
    pixels = _on_white(pixels) if pixels.shape[2] in (2, 4) else pixels
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _sized(exif: Image.Exif | None, width: int, height: int, path: str | Path) -> Image.Exif | None:
    """Set the sizes in EXIF data, and leave out data that cannot be written."""
    if exif is None:
        return None
    for tag, value in zip(SIZE_TAGS, (width, height)):
        if tag in exif.get_ifd(ExifTags.IFD.Exif):
            exif.get_ifd(ExifTags.IFD.Exif)[tag] = value
    try:
        exif.tobytes()
    except (*READ_ERRORS, TypeError, AttributeError, KeyError, OverflowError) as error:
        logger.warning('%s: EXIF data that break their own rules are left out (%s)', path, error)
        return None
    return exif


def _by_pillow(
        pixels: np.ndarray,
        kind: Format,
        quality: int,
        icc: bytes | None,
        exif: Image.Exif | None,
) -> memoryview:
    options: dict[str, Any] = {}
    if kind.name != 'BMP':
        options = {'icc_profile': icc, **({'exif': exif} if exif is not None else {})}
    elif icc:
        logger.warning('BMP holds no colour profile: the one of the picture is lost')
    if kind.name == 'JPEG':
        # colours at full resolution: what was restored is not thrown away again
        options.update(quality=quality, subsampling=0)
    elif kind.name == 'WEBP':
        options.update(quality=quality, lossless=quality == 100, exact=True)
    buffer = io.BytesIO()
    with _any_size():
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, kind.name, **options)
    return buffer.getbuffer()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def _deep_png(pixels: np.ndarray, icc: bytes | None, exif: Image.Exif | None) -> bytes:
    """Encode colours of 16 bits by OpenCV, and put the profile and the EXIF data behind the header."""
    try:
        _, encoded = cv2.imencode('.png', cv2.cvtColor(
            pixels, cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA))
    except cv2.error as error:
        raise ValueError(f'OpenCV cannot encode {pixels.shape[1]} x {pixels.shape[0]} pixels of 16 bits as PNG '
                         f'({error}); take --format tiff') from error
    extra = _chunk(b'iCCP', b'ICC profile\0\0' + zlib.compress(icc)) if icc else b''
    if exif is not None:
        extra += _chunk(b'eXIf', exif.tobytes().removeprefix(b'Exif\0\0'))
    end = 33  # of the signature and the header
    view = encoded.data
    return b''.join((view[:end], extra, view[end:]))


def _tiff(pixels: np.ndarray, icc: bytes | None, exif: Image.Exif | None) -> bytes:
    """Encode as TIFF: strips with differences of neighbours, deflated."""
    height, width, channels = pixels.shape
    bits = 8 * pixels.dtype.itemsize
    rows = max(1, 2 ** 20 // (width * channels))
    strips = []
    for top in range(0, height, rows):
        part: np.ndarray = pixels[top:top + rows].astype(f'<u{bits // 8}')
        part[:, 1:] -= part[:, :-1].copy()
        strips.append(zlib.compress(part.tobytes()))
    starts = [0, *np.cumsum([len(strip) for strip in strips]).tolist()]
    header = TiffImagePlugin.ImageFileDirectory_v2(prefix=b'II')
    tags: Mapping[int, Any] = {
        256: width, 257: height, 258: (bits,) * channels, 259: 8, 262: 2 if channels > 2 else 1,
        273: tuple(starts[:-1]), 277: channels, 278: rows, 279: tuple(map(len, strips)), 284: 1, 317: 2,
        **({338: 2} if channels in (2, 4) else {}), **({34675: icc} if icc else {})}
    for tag, value in tags.items():
        header[tag] = value
    if exif is not None:
        for tag, value in [*exif.items(), *((tag, dict(exif.get_ifd(tag))) for tag in SUB_TAGS if exif.get_ifd(tag))]:
            header[tag] = value
    buffer = io.BytesIO()
    header.save(buffer)
    return b''.join((buffer.getvalue(), *strips))
