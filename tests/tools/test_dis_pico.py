"""The committed DiS draws the garments it is asked for, and random weights do not."""
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip('diffusers', reason='needs the extra [diffusion]')

from mmengine.config import Config  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from safetensors import safe_open  # noqa: E402

import visionssm.openmmlab.diffusion  # noqa: E402, F401
from visionssm.openmmlab.checkpoint import load_any_weights  # noqa: E402
from visionssm.openmmlab.datasets import FASHION_CLASSES, load_fashion_mnist  # noqa: E402
from visionssm.openmmlab.diffusion.sample import draw, make_pipeline  # noqa: E402
from visionssm.openmmlab.transforms import to_tensor  # noqa: E402
from visionssm.registry import MODELS  # noqa: E402
from visionssm.utils.paths import config_root  # noqa: E402

WEIGHTS = Path(__file__).resolve().parent.parent.parent / 'checkpoints' / 'dis_pico_fashion_mnist.safetensors'


@pytest.fixture(scope='module')
def class_means() -> torch.Tensor:
    """The mean training picture of every class, (10, 28 * 28) from 0 to 1."""
    images, labels, _ = load_fashion_mnist('train', 'embedded')
    pixels, classes = torch.from_numpy(images).flatten(1) / 255, torch.from_numpy(labels).long()
    return torch.stack([pixels[classes == label].mean(0) for label in range(10)])


def drawn(trained: bool, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, 28 * 28) from 0 to 1, and the classes that were asked for (N,)."""
    torch.manual_seed(0)
    cfg = Config.fromfile(str(config_root() / 'diffusion' / 'dis-pico_fashion-mnist.py'))
    with DefaultScope.overwrite_default_scope('visionssm'):
        model = MODELS.build(cfg.model).eval()
    if trained:
        load_any_weights(model, str(WEIGHTS))
    jobs = [(label, number) for label in range(10) for number in range(per_class)]
    with torch.inference_mode():
        pictures = draw(make_pipeline(model, 'dpmsolver++', 10), jobs, seed=1)
    pixels = torch.stack([to_tensor(picture) for picture in pictures]).flatten(1) / 255
    return pixels, torch.tensor([label for label, _ in jobs])


def test_the_committed_weights_name_their_process_and_classes():
    with safe_open(WEIGHTS, 'pt') as file:
        stored = json.loads(file.metadata()['config'])
    cfg = Config.fromfile(str(config_root() / 'diffusion' / 'dis-pico_fashion-mnist.py'))
    assert stored['process'] == dict(cfg.model.process) and stored['classes'] == list(FASHION_CLASSES)
    assert {'name': stored['architecture'], **stored['model_args']} == dict(cfg.model.model)


@pytest.mark.slow
def test_the_committed_weights_draw_the_garment_that_was_asked_for(class_means):
    pixels, labels = drawn(trained=True, per_class=5)
    recognised = torch.cdist(pixels, class_means).argmin(1) == labels
    # the nearest mean recognises about two thirds of real test pictures; chance is a tenth
    assert recognised.float().mean() >= 0.5
    # garments and not one garment a class: the pictures of a class differ among themselves
    spread = torch.stack([pixels[labels == label].std(0).mean() for label in range(10)])
    assert spread.min() > 0.03


@pytest.mark.slow
def test_random_weights_draw_nothing_that_is_recognised(class_means):
    pixels, labels = drawn(trained=False, per_class=1)
    recognised = torch.cdist(pixels, class_means).argmin(1) == labels
    assert recognised.float().mean() <= 0.2
