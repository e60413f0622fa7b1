"""Reading image files for detection and segmentation: all usual kinds, in the orientation of the annotations.

Cameras store pixels as the sensor lies and note in the EXIF data how to turn them. Not every program obeys, so
annotations may refer to either picture. `LoadImage` compares the sizes and takes the one that the annotations name.
"""
import io
import logging
from typing import Any, Literal

import numpy as np
from mmengine import fileio
from PIL import Image, ImageOps

from ..registry import TRANSFORMS
from ..utils.suggest import check_choice
from .data import READ_ERRORS, convert_mode

__all__ = ['LoadImage', 'decode_image', 'flatten', 'open_image', 'orient']

logger = logging.getLogger('visionssm')

ORIENTATION = 0x0112
Orientation = Literal['auto', 'follow', 'ignore']


class ImageSizeError(ValueError):
    """An image has another size than its annotations say."""


def open_image(path: str, backend_args: dict[str, Any] | None = None) -> Image.Image:
    """Reads and decodes an image file.

    Args:
        path: Path or address.
        backend_args: Arguments of MMEngine's file backend.

    Returns:
        The image as it is stored: any mode, not turned.
    """
    return decode_image(fileio.get(path, backend_args=backend_args), path)


def decode_image(content: bytes, path: str) -> Image.Image:
    """Decodes an image.

    Args:
        content: What its file holds.
        path: Its name for messages.

    Returns:
        The image as it is stored: any mode, not turned.
    """
    if not content:
        raise ValueError(f'{path} is empty: it holds 0 bytes')
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except READ_ERRORS as error:
        raise ValueError(f'{path} cannot be decoded as an image ({error}); repair the file, or take it out of the data '
                         'set') from error
    return image


def orient(
        image: Image.Image,
        path: str,
        size: tuple[int, int] | None = None,
        source: str = 'the annotations',
        orientation: Orientation = 'auto',
) -> Image.Image:
    """Turns an image by its EXIF data, if its annotations refer to the turned image.

    Args:
        image: The image as it is stored.
        path: Its name for messages.
        size: (width, height) that the annotations are made for; None where there are none.
        source: Where that size stands, for messages.
        orientation: 'auto' follows the EXIF data unless only the stored image has the annotations' size. Where both
            have it (square images, mirrored ones, those turned by half a turn) they are followed, as OpenCV and so
            MMDetection do. 'follow' and 'ignore' do so always.

    Returns:
        The image, turned or not; of the size of the annotations.
    """
    stored = image
    turned = image if orientation == 'ignore' else ImageOps.exif_transpose(image)
    if size is None or turned.size == size:
        return turned
    if orientation == 'auto' and stored.size == size:
        return stored
    sizes = f'{stored.width} x {stored.height}'
    if turned.size != stored.size:
        sizes += f' ({turned.width} x {turned.height} after the rotation in its EXIF data)'
    hint = " with orientation='ignore'" if orientation == 'ignore' else ''
    raise ImageSizeError(f'{path} has {sizes} pixels{hint}, and {size[0]} x {size[1]} according to {source}: the '
                         'annotations belong to another version of the image')


def flatten(image: Image.Image) -> Image.Image:
    """Puts transparent images on white, as a viewer on white paper would show them."""
    if not image.has_transparency_data:
        return image
    layer = image.convert('RGBA')
    ground = Image.new('RGBA', layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, layer).convert('RGB')


@TRANSFORMS.register_module()
class LoadImage:
    """Loads the image of a sample for MMDetection and MMSegmentation: uint8, BGR, as their own loaders give it.

    Beyond those it reads greys of 16 bits (their upper 8), CMYK and palettes, puts transparent images on white, refuses
    damaged and cut-off files by name, and turns photographs exactly if their annotations are made for the turned ones.
    The size of the annotations is `height` and `width` of the sample, as MMDetection's datasets have them, else that of
    the label file `seg_map_path`; without either the EXIF data are followed.

    Args:
        to_float32: Convert to float32, in 0..255.
        color_type: 'color' for three channels, 'grayscale' for one (H, W, 1).
        orientation: See `orient`.
        backend_args: Arguments of MMEngine's file backend.
    """

    def __init__(
            self,
            to_float32: bool = False,
            color_type: Literal['color', 'grayscale'] = 'color',
            orientation: Orientation = 'auto',
            backend_args: dict[str, Any] | None = None,
    ) -> None:
        check_choice('color_type', color_type, ('color', 'grayscale'))
        check_choice('orientation', orientation, ('auto', 'follow', 'ignore'))
        self.to_float32 = to_float32
        self.color_type = color_type
        self.orientation: Orientation = orientation
        self.backend_args = backend_args

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds `img` (H, W, C), `img_shape` and `ori_shape` (both (H, W)) to a sample with `img_path`."""
        path = results['img_path']
        size, source = self._annotated_size(results)
        image = orient(open_image(path, self.backend_args), path, size, source, self.orientation)
        if image.mode == 'F':
            raise ValueError(f'{path} holds floating-point numbers, whose range is unknown: convert it to 8 or 16 bits')
        if self.color_type == 'color':
            pixels = np.ascontiguousarray(np.asarray(convert_mode(flatten(image), 'RGB'))[..., ::-1])
        else:
            pixels = np.array(convert_mode(flatten(image), 'L'))[..., None]
        results['img'] = pixels.astype(np.float32) if self.to_float32 else pixels
        results['img_shape'] = results['ori_shape'] = pixels.shape[:2]
        return results

    def _annotated_size(self, results: dict[str, Any]) -> tuple[tuple[int, int] | None, str]:
        if results.get('height') and results.get('width'):
            return (int(results['width']), int(results['height'])), 'the annotation file'
        labels = results.get('seg_map_path')
        if labels is None:
            return None, ''
        with io.BytesIO(fileio.get(labels, backend_args=self.backend_args)) as file:
            try:
                with Image.open(file) as image:
                    return image.size, labels
            except READ_ERRORS as error:
                raise ValueError(f'{labels} cannot be decoded as a label map: {error}') from error

    def __repr__(self) -> str:
        return (f'{type(self).__name__}(to_float32={self.to_float32}, color_type={self.color_type!r}, '
                f'orientation={self.orientation!r}, backend_args={self.backend_args})')
