"""Photographs of packages become a data set, and the small recipes learn from it."""
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from visionssm.data.photos import PHOTOGRAPHS, SOURCES, Photograph, find_photographs, make_photo_data
from visionssm.openmmlab.evaluate import evaluate
from visionssm.openmmlab.runner import VisionRunner
from visionssm.utils.paths import config_root

TRAIN = Photograph('train', 'mate-backgrounds', 'Aqua.jpg', 'Aqua.jpg, by A, GPL')
HELD_OUT = Photograph('val', 'plasma-workspace-wallpapers', 'Grey/contents/images/2560x1600.jpg', 'Grey, by B, LGPL')


@pytest.fixture(scope='module')
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('make_photo_data')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two packages of Debian, unpacked, with a photograph each."""
    rng = np.random.default_rng(0)
    for number, photograph in enumerate((TRAIN, HELD_OUT)):
        path = tmp_path / 'root' / SOURCES[photograph.source][2] / photograph.path
        path.parent.mkdir(parents=True)
        pixels = rng.integers(0, 255, (300 + 100 * number, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / 'root'


@pytest.fixture
def no_python_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('visionssm.data.photos.importlib.util.find_spec', lambda name: None)


def installed(root: Path) -> dict[Photograph, Path]:
    return {photograph: photograph.find(root) for photograph in (TRAIN, HELD_OUT)}


def test_no_photograph_is_in_both_splits_and_each_has_a_name_and_a_licence():
    files = [(photograph.source, photograph.path) for photograph in PHOTOGRAPHS]
    assert len(set(files)) == len(files) == len({photograph.name for photograph in PHOTOGRAPHS})
    assert {photograph.source for photograph in PHOTOGRAPHS} == set(SOURCES)
    assert sum(photograph.split == 'val' for photograph in PHOTOGRAPHS) >= 8
    assert {photograph.split for photograph in PHOTOGRAPHS} == {'train', 'val'}
    assert all(any(word in photograph.credit for word in ('CC', 'GPL', 'public domain')) for photograph in PHOTOGRAPHS)


@pytest.mark.usefixtures('no_python_packages')
def test_what_is_not_installed_is_named(root):
    found, missing = find_photographs(root)
    assert {photograph.name for photograph in found} == {'aqua', 'grey'}
    # the packages of both found ones have more photographs
    assert missing == list(SOURCES)


def test_jpegs_are_halved_at_least_and_large_pictures_shrunk_to_the_limit(root, tmp_path):
    plain = Photograph('train', 'scikit-image', 'chelsea.png', 'CC0')
    Image.new('RGB', (150, 130), 'red').save(tmp_path / 'chelsea.png')
    photographs = {**installed(root), plain: tmp_path / 'chelsea.png'}
    assert make_photo_data(tmp_path / 'a', photographs, 128 * 128) == {'train': 2, 'val': 1}
    sizes = {path.relative_to(tmp_path / 'a').as_posix(): Image.open(path).size
             for path in (tmp_path / 'a').rglob('*.png')}
    # 400 x 300 by 2.7, 400 x 400 by 3.125, and 150 x 130 by 1.09, all rounded down
    assert sizes == {'train/aqua.png': (147, 110), 'val/grey.png': (128, 128), 'train/chelsea.png': (137, 119)}
    make_photo_data(tmp_path / 'b', photographs)
    assert Image.open(tmp_path / 'b' / 'train' / 'aqua.png').size == (200, 150)
    assert Image.open(tmp_path / 'b' / 'train' / 'chelsea.png').size == (150, 130)
    assert 'val/grey.png: plasma-workspace-wallpapers, Grey, by B, LGPL' in (tmp_path / 'b' / 'README.txt').read_text()


def test_a_folder_is_replaced_on_demand_and_only_if_it_was_made_here(root, tmp_path):
    target, photographs = tmp_path / 'photos', installed(root)
    target.mkdir()
    with pytest.raises(FileExistsError, match='--force'):
        make_photo_data(target, photographs)
    with pytest.raises(FileExistsError, match='not made by this tool'):
        make_photo_data(target, photographs, force=True)
    target.rmdir()
    make_photo_data(target, photographs)
    before = (target / 'val' / 'grey.png').read_bytes()
    (target / 'train' / 'old.png').touch()
    make_photo_data(target, photographs, force=True)
    assert not (target / 'train' / 'old.png').exists() and (target / 'val' / 'grey.png').read_bytes() == before


def test_a_broken_photograph_is_named_and_nothing_half_written_stays(root, tmp_path):
    broken = installed(root)[HELD_OUT]
    broken.write_bytes(broken.read_bytes()[:999])
    with pytest.raises(ValueError, match=r'2560x1600\.jpg cannot be read'):
        make_photo_data(tmp_path / 'photos', installed(root))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['root']
    with pytest.raises(ValueError, match='patches do not fit'):
        make_photo_data(tmp_path / 'photos', installed(root), 100)


@pytest.mark.usefixtures('no_python_packages')
def test_the_tool_writes_what_is_there_and_says_how_to_install_the_rest(tool, root, tmp_path, capsys):
    assert tool.main([str(tmp_path / 'photos'), '--root', str(root)]) == 0
    said = capsys.readouterr()
    assert '1 photographs for training, 1 held out' in said.out and 'apt install mate-backgrounds' in said.err
    with pytest.raises(SystemExit, match=r'no photographs for train and val(?s:.*)pip install scikit-image'):
        tool.main([str(tmp_path / 'nothing'), '--root', str(tmp_path)])
    assert not (tmp_path / 'nothing').exists()


@pytest.mark.parametrize(('name', 'scale'), [('sr-x2', 2), ('denoise-sigma25', 1)])
def test_a_small_recipe_trains_and_is_scored_beside_its_input(name, scale, tmp_path, capsys):
    rng = np.random.default_rng(1)
    for place in ('train/a', 'train/b', 'val/chelsea', 'val/grey'):
        path = tmp_path / 'photos' / f'{place}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (9, 10, 3), dtype=np.uint8))
        coarse.resize((70, 66), Image.Resampling.BICUBIC).save(path)
    cfg = Config.fromfile(str(config_root() / 'restoration' / f'mambair-pico_{name}_photos.py'))
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters == cfg.train_cfg.val_interval
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(tmp_path / 'photos')
    cfg.merge_from_dict(dict(
        train_cfg=dict(max_iters=2, val_interval=2), model=dict(model=dict(depths=(1, 1), d_state=1)),
        train_dataloader=dict(batch_size=2), work_dir=str(tmp_path / 'run'), experiment_name=uuid.uuid4().hex,
        log_level='WARNING'))
    VisionRunner.from_cfg(cfg.copy()).train()
    cfg.dump(str(tmp_path / 'config.py'))
    capsys.readouterr()
    assert evaluate([str(tmp_path / 'config.py'), str(tmp_path / 'run/best/model.safetensors'),
                     '--out', str(tmp_path / 'scores.json'), '--cfg-options', 'test_evaluator.baseline=True']) == 0
    assert 'input PSNR' in capsys.readouterr().out
    rows = json.loads((tmp_path / 'scores.json').read_text())['sets']
    # the photographs that are not there are left out
    assert [row['class'] for row in rows] == ['chelsea', 'grey']
    noise = 20 * np.log10(255 / 25)
    for row in rows:
        assert row['input PSNR'] > 30 if scale == 2 else abs(row['input PSNR'] - noise) < 0.6
        assert row['PSNR'] != row['input PSNR'] and 0 < row['input SSIM'] <= 1
