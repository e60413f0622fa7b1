"""Pictures to begin with: garments that ship with the package, and photographs of installed packages."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.fashion import embedded_fashion_mnist
from ..data.photos import PHOTOGRAPHS, read_photograph
from ..restoration.degradations import add_gaussian_noise

__all__ = ['write_samples']

GARMENTS = {'ankle boot': 9, 'pullover': 2, 'trouser': 1}
PHOTOS = 2
SIDE = 320
SIGMA = 25  # as the denoiser of the checkout was trained for


def write_samples(folder: Path) -> dict[str, Path]:
    """Write pictures to begin with.

    Args:
        folder: Where; it exists.

    Returns:
        Caption to file. Without scikit-image there are garments alone.
    """
    pictures: dict[str, Image.Image] = {}
    images, labels = embedded_fashion_mnist('test')
    for name, label in GARMENTS.items():
        pictures[name] = Image.fromarray(images[int(np.argmax(labels == label))])
    installed = [(photo, photo.find()) for photo in PHOTOGRAPHS if photo.source == 'scikit-image'][::-1]
    for photo, path in [pair for pair in installed if pair[1] is not None][:PHOTOS]:
        picture = read_photograph(str(path))
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        pictures[photo.name] = picture
        pictures.setdefault('the same with noise', _noisy(picture))
    files = {name: folder / f'{name.replace(", ", "_").replace(" ", "_")}.png' for name in pictures}
    for name, picture in pictures.items():
        picture.save(files[name])
    return files


def _noisy(picture: Image.Image) -> Image.Image:
    clean = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    noisy = add_gaussian_noise(clean, SIGMA, torch.Generator().manual_seed(0)).clamp(0, 1)
    return Image.fromarray((255 * noisy).round().to(torch.uint8).permute(1, 2, 0).numpy())
