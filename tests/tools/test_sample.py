"""tools/sample.py: grids and files, the same pictures for a seed, going on after a stop, names, and what it refuses."""
import errno
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmengine')
pytest.importorskip('diffusers')

from mmengine.config import Config
from PIL import Image

import visionssm
from visionssm.checkpoints import CheckpointError
from visionssm.openmmlab.check import ConfigError, check_config
from visionssm.openmmlab.datasets import TimmDataset
from visionssm.openmmlab.diffusion import sample as module
from visionssm.openmmlab.diffusion.fidelity import measure_dataset
from visionssm.openmmlab.diffusion.model import DiffusionModel
from visionssm.openmmlab.diffusion.sample import sample
from visionssm.openmmlab.facts import describe_checkpoint

CONFIG = 'configs/diffusion/dis-pico_fashion-mnist.py'
TINY = {'name': 'dis_pico', 'patch_size': 14, 'embed_dim': 16, 'depth': 2, 'd_state': 16, 'drop_path_rate': 0.0}
OPTIONS = [*(f'model.model.{key}={value}' for key, value in TINY.items()), 'model.process.prediction_type=epsilon']


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """What a training exports: random weights, whose pictures differ by class, with names."""
    torch.manual_seed(0)
    model = DiffusionModel(TINY)
    torch.nn.init.normal_(model.model.label_embed.weight)
    names = [f'kind {number}' for number in range(10)]
    return str(model.export(model.state_dict(), tmp_path_factory.mktemp('best'), {'epoch': 1, 'classes': names}))


def arguments(checkpoint: str, out: Path, *more: str) -> list[str]:
    return [CONFIG, checkpoint, '--out', str(out), '--steps', '3', '--num', '3', '--classes', '4', '7', '--device',
            'cpu', '--cfg-options', *OPTIONS, *more]


def draw(checkpoint: str, out: Path, *more: str) -> dict[str, np.ndarray]:
    assert sample([*arguments(checkpoint, out), *more]) == 0
    return {path.name: np.asarray(Image.open(path)) for path in out.glob('*.png')}


def test_single_files_are_those_of_the_grid(checkpoint, tmp_path, capsys):
    files = draw(checkpoint, tmp_path / 'files')
    assert sorted(files) == [f'{label:04d}_{number:05d}.png' for label in (4, 7) for number in range(3)]
    assert '6 of 6 pictures drawn' in capsys.readouterr().out
    assert sample([*arguments(checkpoint, tmp_path / 'grid.png'), '--json']) == 0
    assert json.loads(capsys.readouterr().out) == {'drawn': 6, 'pictures': 6, 'out': str(tmp_path / 'grid.png')}
    grid = np.asarray(Image.open(tmp_path / 'grid.png'))
    assert grid.shape == (2 * 30 - 2, 3 * 30 - 2)
    for row, label in enumerate((4, 7)):
        for column in range(3):
            piece = grid[30 * row:30 * row + 28, 30 * column:30 * column + 28]
            np.testing.assert_array_equal(piece, files[f'{label:04d}_{column:05d}.png'])
    assert len({picture.tobytes() for picture in files.values()}) == 6


@pytest.mark.parametrize('sampler', ['ddpm', 'ddim', 'dpmsolver++'])
def test_a_seed_draws_the_same_whatever_the_batch_is(checkpoint, tmp_path, sampler):
    whole = draw(checkpoint, tmp_path / 'a', '--sampler', sampler)
    for size in ('1', '4'):
        other = draw(checkpoint, tmp_path / size, '--sampler', sampler, '--batch-size', size)
        assert whole.keys() == other.keys()
        for name, picture in whole.items():
            # matrix products of another size are rounded differently, which may move a pixel by its last bit
            difference = np.abs(picture.astype(int) - other[name])
            assert difference.max() <= 1 and (difference > 0).mean() <= 0.01
    seeded = draw(checkpoint, tmp_path / 'seed', '--sampler', sampler, '--seed', '1')
    assert all((picture != seeded[name]).mean() > 0.1 for name, picture in whole.items())


def test_the_options_reach_the_sampler(checkpoint, tmp_path):
    plain = draw(checkpoint, tmp_path / 'plain', '--sampler', 'ddim')
    for name, more in (('scale', ['--cfg-scale', '6']), ('none', ['--cfg-scale', '1']), ('eta', ['--eta', '1']),
                       ('clip', ['--clip']), ('steps', ['--steps', '5']), ('kind', ['--sampler', 'ddpm'])):
        other = draw(checkpoint, tmp_path / name, '--sampler', 'ddim', *more)
        assert any((picture != other[key]).any() for key, picture in plain.items()), name


def test_only_what_is_missing_is_drawn_again(checkpoint, tmp_path, capsys):
    whole = draw(checkpoint, tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('*.png')}
    for name in ('0004_00001.png', '0007_00002.png'):
        (tmp_path / name).unlink()
    # what a full disk leaves of another program's copy
    (tmp_path / '0007_00002.png').touch()
    capsys.readouterr()
    again = draw(checkpoint, tmp_path, '--batch-size', '3')
    assert '2 of 6 pictures drawn' in capsys.readouterr().out
    changed = {path.name for path in tmp_path.glob('*.png') if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {'0004_00001.png', '0007_00002.png'}
    assert all(np.abs(again[name].astype(int) - picture).max() <= 1 for name, picture in whole.items())


@pytest.mark.timeout(900)  # a process of its own starts late on a machine with other work
def test_a_kill_leaves_whole_pictures_and_the_same_command_goes_on(start_python, checkpoint, tmp_path):
    process = start_python('tools/sample.py', *arguments(checkpoint, tmp_path), '--batch-size', '2', '--num', '2000',
                           streams=(os.devnull, tmp_path / 'errors.txt'))
    try:
        until = time.monotonic() + 600
        while len(list(tmp_path.glob('*.png'))) < 2 and process.is_alive() and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    assert process.exitcode < 0, (tmp_path / 'errors.txt').read_text()
    found = sorted(path.name for path in tmp_path.glob('*.png'))
    assert found[0] == '0004_00000.png' and all(Image.open(tmp_path / name).load() for name in found)
    number = str(len(found) + 2)
    whole = draw(checkpoint, tmp_path / 'whole', '--classes', '4', '--num', number, '--batch-size', '2')
    again = draw(checkpoint, tmp_path, '--classes', '4', '--num', number, '--batch-size', '2')
    assert len(again) == int(number) and again.keys() == whole.keys()
    assert all(np.abs(again[name].astype(int) - picture).max() <= 1 for name, picture in whole.items())


def test_an_interrupt_says_how_to_go_on(checkpoint, tmp_path, monkeypatch, capsys):
    calls = iter(range(9))

    def stop(*args):
        if next(calls):
            raise KeyboardInterrupt
        return whole(*args)

    whole = module.draw
    with monkeypatch.context() as patch:
        patch.setattr(module, 'draw', stop)
        assert sample([*arguments(checkpoint, tmp_path), '--batch-size', '4']) == 130
    assert 'the same command goes on' in capsys.readouterr().err and len(list(tmp_path.glob('*.png'))) == 4
    draw(checkpoint, tmp_path, '--batch-size', '4')
    assert '2 of 6' in capsys.readouterr().out


def test_a_folder_takes_one_run(checkpoint, tmp_path, capsys):
    draw(checkpoint, tmp_path)
    for more, words in ((['--seed', '3'], 'seed is 3 and was 0'), (['--steps', '4'], 'steps is 4 and was 3'),
                        (['--cfg-options', *OPTIONS, 'model.seed=1'], 'model is')):
        assert sample([*arguments(checkpoint, tmp_path), *more]) == 1
        assert words in capsys.readouterr().err
    other = DiffusionModel(TINY)
    weights = other.export(other.state_dict(), tmp_path / 'other', {})
    assert sample(arguments(str(weights), tmp_path)) == 1
    assert 'weights is' in capsys.readouterr().err
    moved = tmp_path / 'moved.safetensors'
    moved.write_bytes(Path(checkpoint).read_bytes())
    assert sample(arguments(str(moved), tmp_path)) == 0
    assert json.loads((tmp_path / 'settings.json').read_text())['checkpoint'] == str(moved)


def test_classes_have_the_names_of_the_checkpoint_or_the_config(checkpoint, tmp_path):
    assert set(draw(checkpoint, tmp_path / 'a', '--num', '1', '--classes', 'kind 3', '0', 'kind 0')) == {
        '0003_00000.png', '0000_00000.png'}
    model = DiffusionModel(TINY)
    torch.save(model.model.state_dict(), tmp_path / 'bare.pth')
    assert set(draw(str(tmp_path / 'bare.pth'), tmp_path / 'b', '--num', '1', '--classes', 'Ankle boot')) == {
        '0009_00000.png'}


def test_all_classes_are_drawn_by_default(checkpoint, tmp_path):
    assert sample([CONFIG, checkpoint, '--out', str(tmp_path / 'grid.png'), '--steps', '1', '--num', '2', '--device',
                   'cpu', '--cfg-options', *OPTIONS]) == 0
    assert Image.open(tmp_path / 'grid.png').size == (2 * 30 - 2, 10 * 30 - 2)


def test_a_file_of_the_authors_training_draws(tmp_path):
    model = DiffusionModel(TINY)
    average = visionssm.to_official('dis', model.model)
    other = {key: torch.zeros_like(value) for key, value in average.items()}
    torch.save({'model': other, 'ema': average, 'opt': {}}, tmp_path / '0100000.pt')
    ours = draw(str(model.export(model.state_dict(), tmp_path / 'ours', {})), tmp_path / 'a')
    theirs = draw(str(tmp_path / '0100000.pt'), tmp_path / 'b')
    assert all((ours[name] == picture).all() for name, picture in theirs.items()) and len(theirs) == 6


def test_a_model_without_classes_draws_numbered_files(tmp_path, capsys):
    model = DiffusionModel({**TINY, 'num_classes': 0})
    weights = str(model.export(model.state_dict(), tmp_path / 'best', {}))
    command = [CONFIG, weights, '--steps', '2', '--num', '3', '--out', str(tmp_path / 'out'), '--device', 'cpu',
               '--cfg-options', *OPTIONS, 'model.model.num_classes=0']
    assert sample(command) == 0
    assert sorted(path.name for path in (tmp_path / 'out').glob('*.png')) == [f'{i:05d}.png' for i in range(3)]
    for more, words in ((['--classes', '1'], 'without classes'), (['--cfg-scale', '2'], 'cannot be guided')):
        assert sample([*command, *more]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(('more', 'words'), [
    (['--classes', '10'], 'classes 0 to 9'),
    (['--classes', '-1'], 'classes 0 to 9'),
    (['--classes', 'kind 33'], "'kind 3'"),
    (['--steps', '0'], '--steps is 0'),
    (['--steps', '-5'], '--steps is -5'),
    (['--steps', '1001'], 'number of steps is 1001; the process was trained with 1000'),
    (['--num', '0'], '--num is 0'),
    (['--seed', '-1'], '--seed is -1'),
    (['--eta', '1.5'], 'eta is 1.5'),
    (['--cfg-scale', 'nan'], '--cfg-scale is nan'),
    (['--num', str(2 ** 33)], 'the most is 4294967296'),
    (['--out', ''], '--out is empty'),
    (['--out', 'grid.jpg'], 'give grid.png'),
    (['--out', 'grid.png', '--num', '9999'], 'a grid of 19998 pictures'),
    (['--cfg-options', *OPTIONS, 'model.process.snr_gama=5'], "no key 'snr_gama'. Did you mean 'snr_gamma'"),
    (['--cfg-options', *OPTIONS, 'model.process.steps=abc'], "model.process.steps is 'abc'; it must be a whole"),
    (['--cfg-options', 'model.process=3'], 'model.process is 3'),
    (['--cfg-options', 'model.model=3'], "model.model needs a 'name'"),
    (['--cfg-options', 'model=3'], 'model is 3'),
    (['--device', 'nodevice'], 'nodevice'),
    (['--cfg-options', *OPTIONS, 'model.model.embed_dim=32'], 'mis-shaped'),
    (['--cfg-options', *OPTIONS, 'model.model.num_classes=12'], 'label_embed.weight'),
    (['--cfg-options', *OPTIONS, 'model.process.prediction_type=sample'], 'trained with model.process.prediction_type='
     'epsilon and the config has sample'),
    (['--cfg-options', *OPTIONS, 'model.process.schedule=squaredcos_cap_v2'], 'process.schedule=linear'),
    (['--cfg-options', *OPTIONS, 'model.vae=no/such'], "autoencoder 'no/such' cannot be loaded"),
])
def test_wrong_requests_end_with_an_error(checkpoint, tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    more = [f'--classes={more[1]}'] if more[1] == '-1' and more[0] == '--classes' else more
    assert sample([*arguments(checkpoint, tmp_path / 'out'), *more]) == 1
    assert words in capsys.readouterr().err.partition('error: ')[2]
    assert not (tmp_path / 'out').exists()


def test_places_that_cannot_be_written_are_refused_before_anything_is_drawn(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, '_load', None)
    (tmp_path / 'folder.png').mkdir()
    (tmp_path / 'file').write_text('')
    for out, words in (('folder.png', 'is a folder'), ('file', 'is no folder'), ('file/a/grid.png', 'is no folder')):
        assert sample(arguments(checkpoint, tmp_path / out)) == 1
        assert words in capsys.readouterr().err

    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr('tempfile.TemporaryFile', refuse)
    assert sample(arguments(checkpoint, tmp_path / 'new' / 'grid.png')) == 1
    assert f'the folder {tmp_path} cannot be written' in capsys.readouterr().err and not (tmp_path / 'new').exists()


def test_weights_that_draw_are_no_classifier(checkpoint):
    with pytest.raises(CheckpointError, match=r'model.safetensors holds a model of the task diffusion, .* classifier'):
        describe_checkpoint(checkpoint, 'vim_pico')


def test_a_config_without_what_a_tool_needs_is_named(checkpoint, tmp_path, capsys):
    (tmp_path / 'empty.py').write_text('work_dir = "w"\n')
    assert sample([str(tmp_path / 'empty.py'), checkpoint, '--out', str(tmp_path / 'out')]) == 1
    assert 'empty.py is not the config of a diffusion model' in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r'empty.py lacks test_dataloader.dataset'):
        measure_dataset(str(tmp_path / 'empty.py'), {}, None)
    with pytest.raises(ConfigError, match=r'model is 3'):
        check_config(Config({'model': 3, 'work_dir': 'w'}))


def test_missing_data_of_torchvision_name_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"folder '{tmp_path}' does not hold the data set 'torch/cifar10'.*"
                                                'dataset_args.download=True'):
        TimmDataset(str(tmp_path), 'torch/cifar10')


def test_other_configs_and_missing_files_are_refused(checkpoint, tmp_path, capsys):
    assert sample([CONFIG, str(tmp_path / 'none.pth')]) == 1
    assert 'none.pth does not exist' in capsys.readouterr().err
    assert sample(['configs/classification/vim-pico_fashion-mnist.py', checkpoint]) == 1
    assert 'not the config of a diffusion model' in capsys.readouterr().err
    (tmp_path / 'cut.pth').write_bytes(os.urandom(200))
    assert sample(arguments(str(tmp_path / 'cut.pth'), tmp_path)) == 1
    assert 'cut.pth' in capsys.readouterr().err
