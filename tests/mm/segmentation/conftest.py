"""Generated lesions in the folders of ISIC."""
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmseg', reason='needs the extra [seg]')

from PIL import Image  # noqa: E402


def lesion(seed: int, size: tuple[int, int] = (40, 36)) -> tuple[np.ndarray, np.ndarray]:
    """A dark disc on bright noise, and its mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size[0], :size[1]]
    mask = (y - rng.uniform(15, 25)) ** 2 + (x - rng.uniform(12, 24)) ** 2 < rng.uniform(7, 11) ** 2
    image = np.where(mask[..., None], [90, 50, 40], [220, 180, 160]) + rng.normal(0, 8, (*size, 3))
    return image.clip(0, 255).astype(np.uint8), (255 * mask).astype(np.uint8)


@pytest.fixture
def lesions(tmp_path: Path) -> Path:
    """Eight images to train on and four to evaluate, half of the masks named as ISIC names them."""
    for split, numbers in (('train', range(8)), ('val', range(8, 12))):
        for folder in ('images', 'masks'):
            (tmp_path / split / folder).mkdir(parents=True)
        for number in numbers:
            image, mask = lesion(number)
            Image.fromarray(image).save(tmp_path / split / 'images' / f'ISIC_{number:03}.png')
            ending = '_segmentation' if number % 2 else ''
            Image.fromarray(mask).save(tmp_path / split / 'masks' / f'ISIC_{number:03}{ending}.png')
    return tmp_path
