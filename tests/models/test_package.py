"""The package's own functions, the cost of importing it, and that a new family is one file."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm

import visionssm

FAMILY = '''
"""A family in one file."""
import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

__all__ = ['ToyNet']


class ToyNet(nn.Module):
    """Nothing much."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


default_cfgs = generate_default_cfgs({'toy_pico': {'input_size': (3, 32, 32)}})


@register_model
def toy_pico(pretrained: bool = False, **kwargs) -> ToyNet:
    """A toy."""
    return ToyNet()
'''


@pytest.fixture
def python(run_python: Callable) -> Callable[..., str]:
    """Runs code in an interpreter of its own, folders before the installed packages: what it prints, or its error."""
    def run(code: str, *folders: Path) -> str:
        setup = f'import sys; sys.path[:0] = {[str(folder) for folder in folders]!r}\n'
        done = run_python('-c', setup + code)
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    return run


TASK_FAMILY = '''
"""A detector in one file of a folder of a task."""
from torch import nn

from visionssm.models._official import Official
from visionssm.models._tasks import register_task_model

OFFICIAL = Official(('ToyDet',), lambda name: (), lambda name, config: nn.Linear(1, 1), lambda weights: ('ToyDet', {}))


@register_task_model('detection')
def toy_det(pretrained=False, checkpoint_path=None, pretrained_cfg=None, width=2) -> nn.Module:
    """A toy."""
    return nn.Linear(width, 1)
'''


def copy_of_package(tmp_path: Path, repo_root: Path, name: str, content: str, folder: str = 'models') -> Path:
    shutil.copytree(repo_root / 'visionssm', tmp_path / 'visionssm', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'visionssm' / folder).mkdir(exist_ok=True)
    (tmp_path / 'visionssm' / folder / '__init__.py').touch()
    (tmp_path / 'visionssm' / folder / name).write_text(content)
    return tmp_path


def test_models_are_listed():
    names = visionssm.list_models()
    assert {'vim_tiny', 'vim_small', 'vim_base', 'vim_tiny_stride8', 'vim_small_stride8', 'vim_pico'} <= set(names)
    assert names == sorted(names)
    assert set(visionssm.list_models('classification')) <= set(names)
    assert set(visionssm.list_models('classification')) <= set(timm.list_models())


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="Unknown task 'classifcation'. Did you mean 'classification'"):
        visionssm.list_models('classifcation')


@pytest.mark.parametrize('name', ['vim_tinny', 'vim_tinny.in1k'])
def test_unknown_model_names_the_nearest(name: str):
    with pytest.raises(ValueError, match=f"Unknown model {name!r}. Did you mean 'vim_tiny'"):
        visionssm.create_model(name)


def test_models_of_timm_are_created_too():
    assert type(visionssm.create_model('test_vit', num_classes=3)).__name__ == 'VisionTransformer'


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match='embed_dims'):
        visionssm.create_model('vim_pico', embed_dims=3)


def test_import_stays_light(python: Callable):
    heavy = ('mmengine', 'mmcv', 'cv2', 'matplotlib', 'scipy', 'diffusers', 'albumentations')
    out = python(
        'import json, timm; import visionssm\n'
        f'print(json.dumps([m for m in sys.modules if m.split(".")[0] in {heavy!r}]))')
    assert json.loads(out) == []


def test_a_new_family_is_one_file(python: Callable, tmp_path: Path, repo_root: Path):
    folder = copy_of_package(tmp_path, repo_root, 'toy.py', FAMILY)
    out = python(
        'import timm, visionssm; from visionssm.models import ToyNet\n'
        'print("toy_pico" in visionssm.list_models(), isinstance(timm.create_model("toy_pico"), ToyNet))', folder)
    assert out == 'True True'


def test_a_family_of_another_task_is_one_file_too(python: Callable, tmp_path: Path, repo_root: Path):
    folder = copy_of_package(tmp_path, repo_root, 'toy.py', TASK_FAMILY, 'detection')
    out = python(
        'import visionssm\n'
        'from visionssm.models._official import families\n'
        'early = [name for name in sys.modules if name.startswith(("visionssm.detection", "visionssm.segmentation"))]\n'
        'print(early, "toy_det" in visionssm.list_models(task="detection"), "toy" in families(),\n'
        '      "toy" in dir(visionssm.models),\n'
        '      visionssm.create_model("toy_det.tag", width=3).in_features)', folder)
    assert out == '[] True True False 3'


def test_two_files_of_one_family_are_refused(python: Callable, tmp_path: Path, repo_root: Path):
    content = TASK_FAMILY.replace('Official((', "Official(family='vim', classes=(")
    for argument, field in (('lambda name: ()', 'keys'), ('lambda name, config', 'build'), ('lambda weights', 'infer')):
        content = content.replace(argument, f'{field}={argument}')
    folder = copy_of_package(tmp_path, repo_root, 'toy.py', content, 'detection')
    out = python('from visionssm.models._official import families\nfamilies()', folder)
    assert "visionssm.detection.toy declares the family 'vim', which another file declares too" in out


@pytest.mark.parametrize(('content', 'message'), [
    ('import nothing_of_this_name', 'nothing_of_this_name'),
    ('__all__ = []', 'must define default_cfgs')])
def test_a_broken_family_is_loud(python: Callable, tmp_path: Path, repo_root: Path, content: str, message: str):
    assert message in python('import visionssm', copy_of_package(tmp_path, repo_root, 'toy.py', content))
