"""The official ImageNet recipe takes real steps: its augmentation, Mixup, averaging and checkpoints work together."""
import numpy as np
import pytest
import torch
from PIL import Image

from visionssm.openmmlab.cli import train, train_config
from visionssm.openmmlab.runner import VisionRunner

SYNSETS = ('n01440764', 'n01443537', 'n01484850')


@pytest.fixture
def small_recipe(tmp_path, monkeypatch):
    """The tiny recipe with a small model and pictures of 32 pixels, on a tree of three synsets."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('val', 2)):
        for synset in SYNSETS:
            folder = tmp_path / 'imagenet' / split / synset
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{number}.JPEG')
    monkeypatch.setenv('IMAGENET_ROOT', str(tmp_path / 'imagenet'))
    monkeypatch.chdir(tmp_path)
    loaders = [f'{name}_dataloader.{option}' for name in ('train', 'val', 'test') for option in (
        'num_workers=0', 'persistent_workers=False', 'batch_size=4', 'dataset.class_map=None',
        'dataset.transform.input_size=32')]
    return ['classification/vim-tiny_8xb128-300e_imagenet.py', '--work-dir', 'run', '--cfg-options',
            'model.model.name=vim_pico', 'model.model.num_classes=3', 'train_cfg.max_epochs=1', *loaders]


def test_the_recipe_trains_evaluates_and_exports(small_recipe, tmp_path, capsys):
    assert train(small_recipe) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith('top-1: ')
    assert (tmp_path / 'run' / 'best' / 'model.safetensors').is_file()


def test_training_and_evaluation_see_pictures_on_one_scale(small_recipe):
    runner = VisionRunner.from_cfg(train_config(train.parse(small_recipe)))
    prepare = runner.model.data_preprocessor
    noise = [prepare(next(iter(runner.build_dataloader(runner.cfg[name]))), False)['inputs']
             for name in ('train_dataloader', 'val_dataloader')]
    # noise over all 256 values has a deviation of about 1.3 in ImageNet's units; resampling smooths it
    assert all(0.3 < float(torch.std(inputs)) < 2 and abs(float(inputs.mean())) < 1 for inputs in noise)
