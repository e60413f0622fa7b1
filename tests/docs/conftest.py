"""A folder to run the code of the documentation in."""
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder that looks like a checkout, with two pictures; nothing can be downloaded."""
    for name in ('checkpoints', 'configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ('photo.jpg', 'noisy.png'):
        Image.linear_gradient('L').resize((24, 16)).convert('RGB').save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for variable in ('VISIONSSM_OFFLINE', 'HF_HUB_OFFLINE'):
        monkeypatch.setenv(variable, '1')
    monkeypatch.setenv('VISIONSSM_CACHE', str(tmp_path / 'cache'))
    return tmp_path
