"""Small image folders, sound and damaged."""
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')

from PIL import Image  # noqa: E402


def write_tree(root: Path, classes: list[str], per_class: int, size: tuple[int, int] = (40, 30)) -> list[Path]:
    """JPEGs of one noisy colour a class; returns the files in timm's order."""
    rng = np.random.default_rng(0)
    files = []
    for label, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(per_class):
            pixels = np.full((size[1], size[0], 3), 40 + 60 * (label % 4)) + rng.integers(0, 20, (size[1], size[0], 3))
            files.append(folder / f'{number:03d}.jpg')
            Image.fromarray(pixels.astype(np.uint8)).save(files[-1])
    return files


def truncate(path: Path) -> None:
    """Cuts a file in half, as a broken download does."""
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


@pytest.fixture
def make_tree(tmp_path):
    def make(classes=('cat', 'dog', 'owl'), per_class=4, name='images'):
        return tmp_path / name, write_tree(tmp_path / name, list(classes), per_class)

    return make


@pytest.fixture(name='truncate')
def truncate_fixture():
    return truncate
