"""Pictures of receptive fields, routes and implicit attention, drawn with Pillow alone."""

import io
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..utils.files import atomic_write
from .attention import ScanAttention
from .receptive_field import ReceptiveField
from .routes import BlockRoutes, ScanRoute

__all__ = ['draw_attention', 'draw_receptive_field', 'draw_routes', 'save_picture', 'to_picture']

GAP = 14
INK, FAINT, PAPER, GROUND = (32, 32, 36), (110, 110, 118), (255, 255, 255), (240, 240, 243)
# Colour maps of equal steps in lightness, between the given points: dark to light, and through the hues.
HEAT = ((4, 3, 18), (52, 16, 92), (115, 30, 129), (182, 54, 121), (237, 105, 94), (254, 176, 120), (252, 246, 190))
ORDER = ((58, 32, 120), (49, 85, 160), (30, 135, 150), (60, 170, 105), (165, 195, 45), (245, 190, 30))
DECADES = 4


class _Panel(NamedTuple):
    picture: Image.Image
    caption: str


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def colours(values: np.ndarray, points: Sequence[tuple[int, int, int]] = HEAT) -> np.ndarray:
    """Map numbers from 0 to 1 to colours.

    Args:
        values: Any shape; rounded to 256 shades, which keeps files small.
        points: Colours at equal distances, between which lies a straight line.

    Returns:
        uint8, of that shape and 3.
    """
    at, values = np.linspace(0, 1, len(points)), (values * 255).round() / 255
    channels = [np.interp(values, at, [point[channel] for point in points]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def to_picture(image: torch.Tensor, mean: Sequence[float] = (0.,), std: Sequence[float] = (1.,)) -> Image.Image:
    """Turn a normalised image back into a picture.

    Args:
        image: (C, H, W) with 1 or 3 channels.
        mean: What was subtracted from each channel.
        std: What each channel was divided by.

    Returns:
        RGB.
    """
    if image.ndim != 3 or len(image) not in (1, 3):
        raise ValueError(f'image is {tuple(image.shape)}; a picture has 1 or 3 channels, (C, H, W)')
    scale, shift = (torch.as_tensor(values, dtype=torch.float32)[:, None, None] for values in (std, mean))
    pixels = (image.detach().float().cpu() * scale + shift).clamp(0, 1).expand(3, -1, -1)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def save_picture(picture: Image.Image, path: str | os.PathLike) -> None:
    """Write a PNG file so that its name shows the old content or all of the new.

    Args:
        picture: The picture.
        path: Where; missing folders are made.
    """
    buffer = io.BytesIO()
    picture.save(buffer, 'PNG', optimize=True)
    atomic_write(buffer.getbuffer(), path)


class _Scale(NamedTuple):
    """How numbers become shades: logarithmic over DECADES, or from 0, each up to the largest number of a map."""
    linear: bool = False

    def shade(self, values: torch.Tensor) -> np.ndarray:
        """Return numbers from 0 to 1."""
        top = values.max().clamp(min=torch.finfo(values.dtype).tiny)
        if self.linear:
            return (values / top).double().numpy()
        return (1 + (values / top).clamp(min=10. ** -DECADES).log10() / DECADES).double().numpy()

    def ticks(self) -> list[str]:
        """Return what stands below the colour bar, at equal distances."""
        if self.linear:
            return ['0', '0.25', '0.5', '0.75', '1']
        return [*(f'1e-{decade}' for decade in range(DECADES, 0, -1)), '1']


def _enlarge(picture: Image.Image, side: int) -> Image.Image:
    """Enlarge in whole steps, or shrink, so that the longer side is near `side`."""
    longest = max(picture.size)
    if longest > side:
        size = tuple(max(1, round(length * side / longest)) for length in picture.size)
        return picture.resize((size[0], size[1]), Image.Resampling.BOX)
    factor = max(1, round(side / longest))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f'{lines[-1]} {word}') <= width:
            lines[-1] += f' {word}'
        else:
            lines.append(word)
    return lines


def _sheet(
        title: str,
        panels: Sequence[_Panel],
        columns: int,
        note: Sequence[str],
        scale: _Scale | None = None,
) -> Image.Image:
    """Put panels with captions under a title, and below them the colour bar of a scale and notes."""
    title_font, font = _font(17), _font(13)
    columns = min(columns, len(panels))
    cell = [max(panel.picture.size[axis] for panel in panels) for axis in (0, 1)]
    width = columns * (cell[0] + GAP) + GAP
    caption_lines = [_wrap(panel.caption, cell[0], font) for panel in panels]
    caption = 18 * max(map(len, caption_lines))
    head = _wrap(title, width - 2 * GAP, title_font)
    foot = [line for paragraph in note for line in _wrap(paragraph, width - 2 * GAP, font)]
    below = 36 if scale else 0
    rows = math.ceil(len(panels) / columns)
    top = GAP + 23 * len(head) + 4
    bottom = top + rows * (cell[1] + caption + GAP)
    height = bottom + below + 18 * len(foot) + GAP // 2
    sheet = Image.new('RGB', (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(head):
        draw.text((GAP, GAP + 23 * i), line, INK, title_font)
    for i, panel in enumerate(panels):
        x = GAP + i % columns * (cell[0] + GAP)
        y = top + i // columns * (cell[1] + caption + GAP)
        sheet.paste(panel.picture, (x, y))
        for j, line in enumerate(caption_lines[i]):
            draw.text((x, y + panel.picture.height + 3 + 18 * j), line, INK, font)
    if scale:
        _colour_bar(sheet, bottom, scale)
    for i, line in enumerate(foot):
        draw.text((GAP, bottom + below + 18 * i), line, FAINT, font)
    return sheet


def _colour_bar(sheet: Image.Image, y: int, scale: _Scale) -> None:
    draw, font = ImageDraw.Draw(sheet), _font(12)
    width = min(260, sheet.width - 2 * GAP)
    ramp = colours(np.linspace(0, 1, width))[None].repeat(9, 0)
    sheet.paste(Image.fromarray(ramp), (GAP, y))
    ticks = scale.ticks()
    for i, text in enumerate(ticks):
        anchor = 'la' if i == 0 else 'ra' if i == len(ticks) - 1 else 'ma'
        draw.text((GAP + width * i / (len(ticks) - 1), y + 11), text, FAINT, font, anchor)
    words = 'of the largest value'
    if width + 3 * GAP + font.getlength(words) < sheet.width:
        draw.text((2 * GAP + width, y - 3), words, FAINT, font)


def draw_receptive_field(
        field: ReceptiveField,
        title: str = 'Effective receptive field',
        picture: Image.Image | None = None,
        side: int = 448,
) -> Image.Image:
    """Draw a receptive field on a logarithmic scale, with the squares that hold 20, 50 and 99 % of the gradient.

    Args:
        field: The field.
        title: What stands above; say here which weights the model has.
        picture: The image, drawn beside it; None where there were several.
        side: Longer side of the field in pixels, about.

    Returns:
        RGB.
    """
    heat = _enlarge(Image.fromarray(colours(_Scale().shade(field.gradient))), side)
    scale = heat.height / field.gradient.shape[0]
    draw = ImageDraw.Draw(heat)
    sides = field.sides()
    y, x = (at * scale for at in field.centre)
    small = 0
    for share, length in reversed(sides.items()):
        half = length * scale / 2
        draw.rectangle((x - half, y - half, x + half - 1, y + half - 1), outline=(255, 255, 255), width=1)
        # inside of a large square, beside a small one
        corner = (x - half + 3, y - half + 1) if half > 24 else (x + half + 4, y - half - 8 + 14 * small)
        small += half <= 24
        corner = min(max(corner[0], 2), heat.width - 34), min(max(corner[1], 2), heat.height - 16)
        draw.text(corner, f'{share:.0%}', (255, 255, 255), _font(12), stroke_width=1, stroke_fill=(0, 0, 0))
    area = field.gradient.numel()
    held = ', '.join(f'{share:.0%} within {length} x {length}' for share, length in sides.items())
    count = 'one image' if field.images == 1 else f'{field.images} images'
    caption = (f'gradient of the middle of the {field.feature_size[0]} x {field.feature_size[1]} map, {count} of '
               f'{field.gradient.shape[0]} x {field.gradient.shape[1]} pixels')
    panels = [_Panel(heat, caption)]
    if picture is not None:
        panels.insert(0, _Panel(picture.resize(heat.size, Image.Resampling.BICUBIC), 'image'))
    wide = min(sides[0.5] ** 2 / area, 1)
    note = f'Of the gradient, in pixels: {held}. Half of it stems from {wide:.1%} of the image.'
    return _sheet(title, panels, 2, [note], _Scale())


def _on_image(values: torch.Tensor, scale: _Scale, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Lay a heat map over the gray image; what is behind the image was padding."""
    height, width = values.shape
    shade = scale.shade(values)[:min(height, picture.height), :min(width, picture.width)]
    heat = Image.fromarray(colours(shade)).resize(size, Image.Resampling.NEAREST)
    strength = Image.fromarray((shade * 215 + 25).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    base = picture.convert('L').resize(size, Image.Resampling.BICUBIC).point(lambda value: value * 0.75)
    return Image.composite(heat, base.convert('RGB'), strength)


def _mark(picture: Image.Image, query: tuple[int, int], map_size: tuple[int, int]) -> None:
    """Frame a pixel of a map."""
    draw = ImageDraw.Draw(picture)
    cell = [picture.size[1 - axis] / map_size[axis] for axis in (0, 1)]
    y, x = ((at + 0.5) * length for at, length in zip(query, cell))
    half = [max(length / 2, 4) + 1 for length in cell]
    for grow, colour in ((2, (0, 0, 0)), (1, (60, 255, 120)), (0, (60, 255, 120))):
        draw.rectangle((x - half[1] - grow, y - half[0] - grow, x + half[1] + grow, y + half[0] + grow),
                       outline=colour)


def draw_attention(
        attention: ScanAttention,
        picture: Image.Image,
        title: str = 'Implicit attention',
        side: int = 256,
) -> Image.Image:
    """Draw the image with the query, the attention of all routes together, and that of each route.

    Args:
        attention: The attention of one query.
        picture: The image, as the model saw it.
        title: What stands above; say here which weights the model has.
        side: Longer side of each panel in pixels.

    Returns:
        RGB.
    """
    ratio = side / max(picture.size)
    size = max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))
    shown = min(attention.merged.shape[0], picture.height), min(attention.merged.shape[1], picture.width)
    first = picture.convert('RGB').resize(size, Image.Resampling.BICUBIC)
    several = len(attention.routes) > 1
    maps = [('all routes', attention.merged), *zip(attention.labels, attention.routes)][0 if several else 1:]
    # without a decay along a route all weights are of one order
    scale = _Scale(linear=bool(attention.merged.min() > 0.02 * attention.merged.max()))
    panels = [_Panel(first, 'image and query'),
              *(_Panel(_on_image(values, scale, picture, size), label) for label, values in maps)]
    for panel in panels:
        _mark(panel.picture, attention.query, shown)
    columns = len(panels) if len(panels) <= 4 else 3 if len(panels) <= 6 else 6
    place = f'{attention.query[0]}, {attention.query[1]}'
    note = (f'{attention.block}, map of {attention.merged.shape[0]} x {attention.merged.shape[1]}; query at '
            f'{place} (green). Mean over channels of the absolute weight; every panel has a scale of its own.')
    return _sheet(title, panels, columns, [note], scale)


def draw_routes(
        routes: BlockRoutes | Sequence[BlockRoutes],
        title: str = 'Scan routes',
        picture: Image.Image | None = None,
        side: int = 240,
) -> Image.Image:
    """Draw every route of one or several blocks: a line from dark to light, from a ring to a square.

    Args:
        routes: The routes of a block, or of several with a map of the same size. One of about 8 x 8 is the most
            legible.
        title: What stands above.
        picture: The image in the shape of the map, drawn faintly below the routes; None for plain ground.
        side: Longer side of each panel in pixels, about; a single one is larger.

    Returns:
        RGB.
    """
    blocks = [routes] if isinstance(routes, BlockRoutes) else list(routes)
    if not blocks:
        raise ValueError('there are no routes to draw')
    drawn = [(block, route) for block in blocks for route in block.routes]
    side = side if len(drawn) > 1 else 3 * side // 2
    several = sum(bool(block.routes) for block in blocks) > 1
    panels = [_Panel(_draw_route(route, side, picture), f'{route.label} ({block.block})' if several else route.label)
              for block, route in drawn] or [_Panel(Image.new('RGB', (side, 40), GROUND), 'no route over the map')]
    note = [f'{block.block} ({block.op}), map of {block.size[0]} x {block.size[1]}.' for block in blocks]
    for text in dict.fromkeys(block.note for block in blocks):
        # behind the last block that it holds for
        last = max(i for i, block in enumerate(blocks) if block.note == text)
        note[last] = f'{note[last]} {text}'
    return _sheet(title, panels, 3 if len(panels) == 3 else 4, note)


def _draw_route(route: ScanRoute, side: int, picture: Image.Image | None) -> Image.Image:
    height, width = route.steps.shape
    cell = max(side // max(height, width), 3)
    over = 3  # drawn larger and shrunk, which smooths the lines
    step = cell * over
    large = Image.new('RGB', (width * step, height * step), GROUND)
    if picture is not None:
        below = picture.convert('L').resize(large.size, Image.Resampling.BICUBIC).convert('RGB')
        large = Image.blend(large, below, 0.45)
    draw = ImageDraw.Draw(large)
    if cell >= 10:
        for i in range(1, height):
            draw.line((0, i * step, width * step, i * step), (222, 222, 228), over)
        for j in range(1, width):
            draw.line((j * step, 0, j * step, height * step), (222, 222, 228), over)
    if route.kind in ('wavefront', 'unordered'):
        _draw_fronts(draw, route, step)
    for path in route.paths():
        _draw_path(draw, path, width, step)
    return large.resize((width * cell, height * cell), Image.Resampling.LANCZOS)


def _draw_path(draw: ImageDraw.ImageDraw, path: torch.Tensor, width: int, step: int) -> None:
    points = [((int(p) % width + 0.5) * step, (int(p) // width + 0.5) * step) for p in path]
    shades = [tuple(int(c) for c in colour) for colour in colours(np.linspace(0, 1, len(points)), ORDER)]
    jumps = [math.dist(a, b) > 1.5 * step for a, b in zip(points, points[1:])]
    # steps to a neighbour are drawn thick, above the thin ones across the map
    for thick in (False, True):
        for i, (a, b) in enumerate(zip(points, points[1:])):
            if jumps[i] != thick:
                draw.line((*a, *b), shades[i + 1], max(step // 9, 3) if thick else max(step // 30, 2))
                if thick and step >= 36:
                    _arrow(draw, a, b, shades[i + 1], step / 4)
    radius = max(step / 4.5, 6)
    (x, y), (end_x, end_y) = points[0], points[-1]
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), PAPER, shades[0], max(step // 10, 3))
    if len(points) > 1:
        draw.rectangle((end_x - radius, end_y - radius, end_x + radius, end_y + radius), shades[-1], INK,
                       max(step // 20, 2))


def _arrow(
        draw: ImageDraw.ImageDraw,
        start: tuple[float, float],
        end: tuple[float, float],
        colour: tuple[int, ...],
        length: float,
) -> None:
    """Put an arrow head on the middle of a line."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    x, y = ((a + b) / 2 for a, b in zip(start, end))
    tip = x + math.cos(angle) * length / 2, y + math.sin(angle) * length / 2
    wings = [(tip[0] - math.cos(angle + turn) * length, tip[1] - math.sin(angle + turn) * length)
             for turn in (0.5, -0.5)]
    draw.polygon([tip, *wings], colour)


def _draw_fronts(draw: ImageDraw.ImageDraw, route: ScanRoute, step: int) -> None:
    """Colour pixels by their step, and write it where there is room."""
    last = max(int(route.steps.max()), 1)
    shades = colours(route.steps.numpy() / last if route.kind == 'wavefront' else np.full(route.steps.shape, 0.45),
                     ORDER)
    font = _font(max(step // 3, 8))
    for i, row in enumerate(route.steps.tolist()):
        for j, number in enumerate(row):
            x, y, rim = j * step, i * step, step // 12
            draw.rectangle((x + rim, y + rim, x + step - rim, y + step - rim), tuple(int(c) for c in shades[i, j]))
            if route.kind == 'wavefront' and step >= 48:
                draw.text(((j + 0.5) * step, (i + 0.5) * step), str(number + 1), PAPER, font, 'mm')
