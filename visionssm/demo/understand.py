"""Looking into the model that the page offers: receptive field, scan routes, and what its scans carry on."""
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from ..analysis import (
    BlockRoutes,
    draw_attention,
    draw_receptive_field,
    draw_routes,
    effective_receptive_field,
    scan_attention,
    scan_routes,
)
from ..analysis.tool import Subject, legible_size
from ..openmmlab.predict import Predictor
from ..openmmlab.predict_restoration import Restorer
from .choices import Choice
from .engine import DemoError, Engine, Photo, Progress

__all__ = ['VIEWS', 'View', 'look', 'place_on_crop']

BELOW = 480
VIEWS = ('Effective receptive field', 'Scan routes', 'Implicit attention')


class View(NamedTuple):
    """A picture for understanding."""
    picture: Image.Image
    note: str


def _subject(engine: Engine, choice: Choice) -> tuple[Subject, tuple[int, int]]:
    """Return a model with its preprocessing, and the size of image that it is made for."""
    if not choice.analysable:
        raise DemoError(f'{choice.label} is a detector or segmentor of a config; look at its backbone instead')
    loaded: Any = engine.load(choice)[0]
    model = {Predictor: 'model', Restorer: 'net'}.get(type(loaded))
    model = getattr(loaded, model) if model else loaded
    cfg = {'mean': (0.,) * 3, 'std': (1.,) * 3, **(getattr(model, 'pretrained_cfg', None) or {})}
    if isinstance(loaded, Predictor):
        cfg.update(loaded.data_config)
    weights = 'random weights' if choice.source == 'random' else 'trained weights'
    subject = Subject(model, choice.title, weights, cfg['mean'], cfg['std'])
    size = cfg['input_size'][1:] if isinstance(loaded, Predictor) else subject.size()
    return subject, (int(size[0]), int(size[1]))


def place_on_crop(
        place: tuple[float, float],
        photo_size: tuple[int, int],
        size: tuple[int, int],
) -> tuple[int, int]:
    """Find a place of a photo on its middle, as the model sees it.

    Args:
        place: From the left and from the top, as shares of the photo.
        photo_size: Width and height of the photo.
        size: Height and width of the image that the model sees.

    Returns:
        Row and column on that image; the nearest one for what was cut off.
    """
    width, height = photo_size
    scale = max(size[1] / width, size[0] / height)
    column = place[0] * width * scale - (width * scale - size[1]) / 2
    row = place[1] * height * scale - (height * scale - size[0]) / 2
    return min(max(int(row), 0), size[0] - 1), min(max(int(column), 0), size[1] - 1)


def look(
        engine: Engine,
        choice: Choice,
        view: str,
        photo: Photo | None = None,
        block: int = 0,
        place: tuple[float, float] = (0.5, 0.5),
        progress: Progress | None = None,
) -> View:
    """Draw one of `VIEWS` of a model.

    Args:
        engine: Loads the model.
        choice: The model.
        view: One of `VIEWS`.
        photo: The picture; without one the receptive field is that of noise, and the routes are drawn on paper.
        block: Number of the block among those that scan, from the end if negative.
        place: Of the pixel whose attention is shown, as shares of width and height of the photo.
        progress: Called with the number of images done and of all images.

    Returns:
        The picture with a sentence about it.
    """
    subject, size = _subject(engine, choice)
    title = f'{view} of {subject.name}, {subject.weights}'
    fitted, image = subject.fit(photo.rgb, size) if photo is not None else (None, None)
    if view == VIEWS[0]:
        field = effective_receptive_field(subject.model, image, size=size,
                                          progress=lambda items: engine.steps(items, progress))
        what = f'on {photo.name}' if photo is not None else f'mean over {field.images} images of noise'
        return View(draw_receptive_field(field, title, fitted), f'{size[0]} × {size[1]} pixels, {what}')
    if view == VIEWS[1]:
        return _routes(subject, photo, block, title)
    if photo is None or image is None or fitted is None:
        raise DemoError('Implicit attention needs a photo: drop one first')
    query = place_on_crop(place, photo.rgb.size, size)
    attention = scan_attention(subject.model, image[0], block, query)
    return View(draw_attention(attention, fitted, title), f'What row {query[0]}, column {query[1]} of the '
                f'{size[0]} × {size[1]} pixels reads in block {attention.block}')


def _routes(subject: Subject, photo: Photo | None, block: int, title: str) -> View:
    size = legible_size(subject)
    image = subject.fit(photo.rgb, size)[1] if photo is not None else None
    found = scan_routes(subject.model, size, image)
    chosen = _choose(found, block)
    below = None
    if photo is not None:  # sharper than what the model sees
        scale = BELOW / max(size)
        below = ImageOps.fit(photo.rgb, (round(size[1] * scale), round(size[0] * scale)), Image.Resampling.BICUBIC)
    return View(draw_routes(chosen, title, below), f'Block {block} of {len(found)} that scan ({chosen.block}), drawn '
                f'at {size[0]} × {size[1]} pixels, where lines can be told apart')


def _choose(found: Sequence[BlockRoutes], block: int) -> BlockRoutes:
    if not -len(found) <= block < len(found):
        raise DemoError(f'There is no block {block}: {len(found)} blocks scan, from 0')
    return found[block]
