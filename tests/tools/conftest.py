"""A small trained-looking classifier, its checkpoint files and a folder of pictures."""
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')

import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from visionssm.checkpoints import save_safetensors  # noqa: E402

CLASSES = [f'kind {number}' for number in range(10)]


@pytest.fixture(scope='session')
def tiny_model() -> torch.nn.Module:
    """timm's smallest ViT for 28 x 28 grey pictures of ten classes."""
    torch.manual_seed(1)
    return timm.create_model('test_vit', img_size=28, patch_size=7, in_chans=1, num_classes=10).eval()


@pytest.fixture
def weights(tiny_model: torch.nn.Module, tmp_path: Path) -> str:
    """The bare weights as safetensors."""
    return str(save_safetensors(tiny_model.state_dict(), tmp_path / 'tiny.safetensors'))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five grey PNGs of the embedded subset's size."""
    folder = tmp_path / 'pictures'
    folder.mkdir()
    rng = np.random.default_rng(2)
    for number in range(5):
        Image.fromarray(rng.integers(0, 255, (28, 28), dtype=np.uint8)).save(folder / f'picture{number}.png')
    return folder
