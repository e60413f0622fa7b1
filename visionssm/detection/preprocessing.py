"""Where an image lies on the canvas that a detector sees, and the way back for its boxes: numbers only, no pixels."""

from dataclasses import dataclass

import torch

from visionssm.layers.precision import widen

__all__ = ['Letterbox', 'letterbox_geometry']


@dataclass(frozen=True)
class Letterbox:
    """An image that was resized and padded.

    Attributes:
        image_size: Height and width of the image.
        resized: Height and width after resizing.
        pads: Pixels added left, top, right and bottom.
        scale: Factors of the resizing in x and y, before the size was rounded to whole pixels.
    """

    image_size: tuple[int, int]
    resized: tuple[int, int]
    pads: tuple[int, int, int, int]
    scale: tuple[float, float]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the canvas."""
        left, top, right, bottom = self.pads
        return self.resized[0] + top + bottom, self.resized[1] + left + right

    def forth(self, boxes: torch.Tensor) -> torch.Tensor:
        """Return boxes (..., 4) of the image, x1 y1 x2 y2 in pixels, as boxes of the canvas."""
        boxes = widen(boxes)
        return boxes * boxes.new_tensor(self.scale * 2) + boxes.new_tensor(self.pads[:2] * 2)

    def back(self, boxes: torch.Tensor) -> torch.Tensor:
        """Return boxes (..., 4) of the canvas, x1 y1 x2 y2 in pixels, as boxes of the image, clipped to it."""
        boxes = widen(boxes)
        boxes = (boxes - boxes.new_tensor(self.pads[:2] * 2)) / boxes.new_tensor(self.scale * 2)
        height, width = self.image_size
        return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def letterbox_geometry(
        height: int,
        width: int,
        size: int | tuple[int, int] = 640,
        stride: int = 32,
        minimal: bool = False,
        stretch: bool = False,
        scale_up: bool = True,
) -> Letterbox:
    """Return how an image is put into the middle of a canvas without changing its proportions.

    Args:
        height: Height of the image.
        width: Width of the image.
        size: Side, or height and width, of the canvas.
        stride: What the sides of a minimal canvas are multiples of.
        minimal: Pad only to multiples of `stride`, not to `size`.
        stretch: Fill the canvas, changing the proportions.
        scale_up: Enlarge images that are smaller than the canvas; else they are padded only.

    Returns:
        Sizes and pads; pixels of the pads are meant to be 114 of 255.
    """
    canvas_height, canvas_width = (size, size) if isinstance(size, int) else size
    for name, value in (('height', height), ('width', width), ('size', min(canvas_height, canvas_width)),
                        ('stride', stride)):
        if value < 1:
            raise ValueError(f'{name} is {value}; at least 1 is needed.')
    if stretch and not minimal:
        return Letterbox((height, width), (canvas_height, canvas_width), (0, 0, 0, 0),
                         (canvas_width / width, canvas_height / height))
    factor = min(canvas_height / height, canvas_width / width)
    if not scale_up:
        factor = min(factor, 1.)
    # very long images keep one pixel of their short side
    resized_height, resized_width = max(round(height * factor), 1), max(round(width * factor), 1)
    down, across = canvas_height - resized_height, canvas_width - resized_width
    if minimal:
        down, across = down % stride, across % stride
    pads = (round(across / 2 - 0.1), round(down / 2 - 0.1), round(across / 2 + 0.1), round(down / 2 + 0.1))
    return Letterbox((height, width), (resized_height, resized_width), pads, (factor, factor))
