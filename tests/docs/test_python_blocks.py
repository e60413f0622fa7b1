"""The Python blocks of README and documentation run, page by page, and give the shapes that their comments state.

A comment `<!-- skip: next "reason" -->` in front of a block keeps it from running. Released weights are not downloaded:
the model gets random ones. Blocks with `_base_` are configs and are checked as a training would check them.
"""
import ast
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import torch
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from torch import nn

import visionssm
from visionssm.checkpoints import Entry
from visionssm.models import _builder

pytestmark = [pytest.mark.mm, pytest.mark.det, pytest.mark.seg, pytest.mark.diffusion, pytest.mark.restoration]
for package in ('mmengine', 'mmdet', 'mmseg', 'diffusers'):
    pytest.importorskip(package)

from visionssm.openmmlab.cli import train, train_config  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/**/*.md'))]
# tests/models/test_adding_a_model.py builds the package with the family of that page
PAGES = [path.relative_to(ROOT).as_posix() for path in FILES
         if '```python' in path.read_text() and path.name != 'adding_a_model.md']
MOST_SKIPPED = 3
SLOW = {'docs/models/mamba_yolo.md', 'docs/models/mambair.md'}
OFFICIAL = {'mamba2d': 'mamba2d_nano', 'mamba_yolo': 'mamba_yolo_tiny', 'mhs_vm': 'mhs_vm_unet_4h',
            'spatial_mamba': 'spatial_mamba_tiny', 'vim': 'vim_tiny', 'vmamba': 'vmamba_tiny', 'vssd': 'vssd_micro'}


def official(family: str) -> dict[str, torch.Tensor]:
    return visionssm.to_official(family, visionssm.create_model(OFFICIAL[family]))


def save_official(family: str, path: str) -> str:
    torch.save({'model': official(family), 'model_ema': official(family)}, path)
    return path


def save_ultralytics(path: str) -> None:
    """A file as the official training of Mamba-YOLO writes it: a whole module, of a class that is there to read."""
    root = nn.Module()
    for key, value in official('mamba_yolo').items():
        *parents, name = key.split('.')
        module = root
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_buffer(name, value)
    root.names = {0: 'cat'}
    Path(path).parent.mkdir(parents=True)
    torch.save({'model': root, 'ema': None, 'epoch': -1}, path)


def save_trained(name: str, num_classes: int, folder: str) -> None:
    """What a training of a classifier leaves in WORK_DIR/best."""
    from visionssm.openmmlab.checkpoint import export_best
    from visionssm.openmmlab.classifier import ImageClassifier
    classifier = ImageClassifier(dict(name=name, num_classes=num_classes))
    export_best(classifier, classifier.state_dict(), folder)


def copy_weights(name: str, folder: str) -> None:
    Path(folder).mkdir(parents=True)
    shutil.copy(ROOT / 'checkpoints' / name, Path(folder) / 'model.safetensors')


# What blocks take for granted: a text of the block, and what happens before it.
GIVEN = {
    'restore_tiled(model, small': 'small = torch.rand(1, 3, 24, 32)',
    'prepare_image(image) for image in images': (
        'images = [torch.randint(256, (3, 40, 50), dtype=torch.uint8)]; '
        'masks = torch.randint(2, (1, 1, 256, 256)).float()'),
    'checkpoint_path=FILE': "FILE = save_official('spatial_mamba', 'spatial_mamba_tiny.pth')",
    "read_ultralytics('runs/": "save_ultralytics('runs/train/weights/best.pt')",
    'work_dirs/dis-pico': "copy_weights('dis_pico_fashion_mnist.safetensors', 'work_dirs/dis-pico_fashion-mnist/best')",
    'local-dir:work_dirs/run/best': "import timm; save_trained('vim_tiny', 100, 'work_dirs/run/best')",
    **{f"from_official('{family}', state_dict": f'state_dict, config = official({family!r}), None'
       for family in OFFICIAL},
}
HELPERS = {function.__name__: function
           for function in (official, save_official, save_ultralytics, save_trained, copy_weights)}


def random_weights(entry: Entry, convert: Any = None, *args: Any, **kwargs: Any) -> Mapping[str, torch.Tensor]:
    """In the place of a download: weights of the right names and shapes."""
    model = visionssm.create_model(entry.model)
    return model.state_dict() if convert else visionssm.to_official(entry.family, model)


def check_shapes(source: str, namespace: Mapping[str, Any]) -> None:
    """Compare `name = ...  # (1, 2), (3, 4)`, or the comment on the next line, with the shapes of what is there."""
    name = None
    for line in source.splitlines():
        code, _, comment = line.partition('#')
        assigned = re.match(r'\s*(\w+) = ', code)
        name = assigned[1] if assigned else None if code.strip() else name
        stated = [tuple(sum(map(int, number.split('+'))) for number in shape.split(','))
                  for shape in re.findall(r'\((\d[\d +]*(?:,[\d +]+)+)\)', comment)]
        if name and stated:
            value = namespace[name]
            shapes = [tuple(x.shape) for x in ([value] if isinstance(value, torch.Tensor) else value)]
            assert shapes[:len(stated)] == stated, f'{name} has shapes {shapes}, stated are {stated}'


def run_block(example: Example) -> None:
    source, namespace = str(example.parsed), example.namespace
    for text, preparation in GIVEN.items():
        if text in source:
            exec(preparation, namespace)
    if re.search(r'^_base_ = ', source, re.MULTILINE):
        Path('my_config.py').write_text(source)
        train_config(train.parse(['my_config.py']))
        return
    PythonEvaluator()(example)
    check_shapes(source, namespace)


@pytest.mark.parametrize('page', [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page
                                  for page in PAGES])
def test_the_python_blocks_run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    document = Document.parse(str(ROOT / page), CodeBlockParser('python', run_block), SkipParser())
    monkeypatch.setattr(_builder, 'load_pretrained', random_weights)
    document.namespace.update(HELPERS, torch=torch, visionssm=visionssm)
    for example in document:
        try:
            example.evaluate()
        except SkipTest:
            pass


def test_few_blocks_are_left_out_and_each_says_why():
    skipped = [(path.name, reason) for path in FILES
               for reason in re.findall(r'<!--+ skip: next(.*?)-->', path.read_text())]
    assert len(skipped) <= MOST_SKIPPED, skipped
    assert all(len(ast.literal_eval(reason.strip())) > 10 for _, reason in skipped), skipped


def test_a_comment_that_states_another_shape_is_found():
    with pytest.raises(AssertionError, match='stated are'):
        check_shapes('x = f()  # (1, 2 + 3)', {'x': torch.zeros(1, 4)})
    check_shapes('x = f()\n# (1, 2), (3, 4)', {'x': [torch.zeros(1, 2), torch.zeros(3, 4)]})
