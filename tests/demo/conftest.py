"""Weight files of every task and pictures for the page."""
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')

import torch  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from PIL import Image  # noqa: E402

from visionssm.data.fashion import FASHION_CLASSES  # noqa: E402
from visionssm.demo.choices import Choice, file_choice  # noqa: E402
from visionssm.demo.engine import Engine, Photo  # noqa: E402
from visionssm.openmmlab.checkpoint import export_best  # noqa: E402
from visionssm.openmmlab.classifier import ImageClassifier  # noqa: E402


@pytest.fixture(autouse=True)
def _no_scope() -> Iterator[None]:
    """No run of another task before decides what a bare name means, here or in the next file."""
    DefaultScope._instance_dict.clear()
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session')
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Choice:
    """What training exports of a small Vim for gray garments."""
    torch.manual_seed(0)
    model = ImageClassifier({'name': 'vim_pico', 'img_size': 28, 'in_chans': 1, 'num_classes': 10, 'depth': 2},
                            data_preprocessor={'mean': [0.3], 'std': [0.4]})
    folder = tmp_path_factory.mktemp('small-vim') / 'best'
    return file_choice(export_best(model, model.state_dict(), folder, FASHION_CLASSES))


@pytest.fixture(scope='session')
def restorer(repo_root: Path) -> Choice:
    """The trained super-resolution of the checkout."""
    return file_choice(repo_root / 'checkpoints' / 'mambair_pico_sr_x2_photos.safetensors')


@pytest.fixture(scope='session')
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Choice]:
    """A function that builds a config's model with random weights and exports it as training does."""

    def export(config: str) -> Choice:
        from visionssm.openmmlab.portable import export_dense
        from visionssm.openmmlab.predict import load_dense_config
        from visionssm.openmmlab.scopes import registries
        cfg = load_dense_config(config)
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = registries(cfg.default_scope)['MODELS'].build(cfg.copy().model)
        return file_choice(export_dense(model.state_dict(), tmp_path_factory.mktemp('dense') / 'best', cfg,
                                        {'classes': FASHION_CLASSES}))

    return export


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """On the CPU, with room for what it writes."""
    folder = tmp_path / 'work'
    folder.mkdir()
    return Engine(folder, 'cpu', max_megapixels=1)


@pytest.fixture
def photo_file(tmp_path: Path) -> Path:
    """A colour picture."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png'


@pytest.fixture
def photo(engine: Engine, photo_file: Path) -> Photo:
    """The same, read."""
    return engine.read(photo_file)
