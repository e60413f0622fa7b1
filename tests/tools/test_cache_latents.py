"""tools/cache_latents.py: what it writes, going on after a kill, what it refuses, and a training from its files."""
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmengine')
pytest.importorskip('diffusers')

from diffusers import AutoencoderKL
from PIL import Image

from visionssm.openmmlab.cli import train
from visionssm.openmmlab.diffusion import latents
from visionssm.openmmlab.diffusion.data import ADMCenterCrop, LatentDataset
from visionssm.openmmlab.diffusion.latents import cache_latents, load_autoencoder
from visionssm.openmmlab.diffusion.sample import sample

CONFIG = 'configs/diffusion/dis-large-2_imagenet-256x256.py'
SMALL = ['model.model.name=dis_pico', 'model.model.img_size=8', 'model.model.patch_size=4', 'model.model.embed_dim=16',
         'model.model.depth=2', 'model.model.num_classes=3']


def save_autoencoder(folder: Path, **kwargs: object) -> str:
    torch.manual_seed(len(kwargs))
    settings = {'latent_channels': 4, 'scaling_factor': 0.18215, **kwargs}
    AutoencoderKL(in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                  sample_size=16, down_block_types=('DownEncoderBlock2D',) * 2,
                  up_block_types=('UpDecoderBlock2D',) * 2, **settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope='module')
def vae(tmp_path_factory):
    """Folder of an autoencoder that halves sides."""
    return save_autoencoder(tmp_path_factory.mktemp('vae'))


@pytest.fixture
def images(tmp_path):
    """Three classes of four pictures, and no more than that."""
    rng = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / 'images' / ('ant', 'bee', 'cat')[number // 4] / f'{number:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 24 + number, 3), dtype=np.uint8)).save(path)
    return tmp_path / 'images'


def options(images: Path, vae: str, out: Path, *more: str) -> list[str]:
    return [str(images), '--vae', vae, '--out', str(out), '--size', '16', '--shard-size', '5', '--batch-size', '2',
            '--workers', '0', '--mirror', '--device', 'cpu', *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'settings.json'}


def test_the_stored_moments_are_those_of_the_autoencoder(images, vae, tmp_path, capsys):
    assert cache_latents(options(images, vae, tmp_path / 'out', '--dtype', 'float32', '--workers', '1')) == 0
    assert 'latents of 12 pictures of 3 classes' in capsys.readouterr().out
    data = LatentDataset(str(tmp_path / 'out'), flip=0.0)
    assert len(data) == 12 and data.metainfo['classes'] == ('ant', 'bee', 'cat')
    assert [data[i]['label'] for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    picture = ADMCenterCrop(16)(Image.open(images / 'bee' / '06.png'))
    pixels = picture[None].float() / 127.5 - 1
    model = load_autoencoder(vae)
    mirrored = LatentDataset(str(tmp_path / 'out'), flip=1.0)
    for view, found in ((pixels, data[6]), (pixels.flip(-1), mirrored[6])):
        moments = model.encode(view).latent_dist
        torch.testing.assert_close(found['inputs'], torch.cat([moments.mean, moments.std], dim=1)[0], atol=1e-5, rtol=0)


def test_half_precision_is_the_default_and_mirrors_are_not(images, vae, tmp_path):
    assert cache_latents([part for part in options(images, vae, tmp_path / 'out') if part != '--mirror']) == 0
    with latents.safe_open(tmp_path / 'out' / '00000.safetensors', 'pt') as file:
        moments = file.get_tensor('moments')
    assert moments.dtype == torch.float16 and moments.shape == (5, 1, 8, 8, 8)


@pytest.mark.timeout(900)  # a process of its own starts late on a machine with other work
def test_after_a_kill_the_same_command_ends_with_the_same_bytes(start_python, images, vae, tmp_path):
    assert cache_latents(options(images, vae, tmp_path / 'whole')) == 0
    stuck = images / 'cat' / '10.png'
    picture = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)  # whoever reads it waits, so the process hangs in the third file
    out = tmp_path / 'killed'
    threads = str(torch.get_num_threads())  # another number of them may round the last bit another way
    process = start_python('tools/cache_latents.py', *options(images, vae, out), streams=(os.devnull, os.devnull),
                           env={**os.environ, 'OMP_NUM_THREADS': threads})
    try:
        until = time.monotonic() + 600
        while not (out / '00001.safetensors').exists() and process.is_alive() and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in out.glob('*.safetensors')) == ['00000.safetensors', '00001.safetensors']
    assert not (out / 'latents.json').exists()
    (out / '.00002.safetensors.abc.tmp').write_bytes(b'half')
    stuck.unlink()
    stuck.write_bytes(picture)
    written = (out / '00001.safetensors').stat().st_mtime_ns
    assert cache_latents(options(images, vae, out)) == 0
    assert contents(out) == contents(tmp_path / 'whole')
    assert (out / '00001.safetensors').stat().st_mtime_ns == written


@pytest.mark.parametrize('place', range(6))
def test_an_interrupt_anywhere_can_be_made_up_for(images, vae, tmp_path, monkeypatch, place, capsys):
    cache_latents(options(images, vae, tmp_path / 'whole'))
    calls = iter(range(100))

    def stop(*args):
        if next(calls) == place:
            raise KeyboardInterrupt
        return whole(*args)

    whole = latents.encode
    with monkeypatch.context() as patch:
        patch.setattr(latents, 'encode', stop)
        assert cache_latents(options(images, vae, tmp_path / 'out')) == 130
    assert 'the same command goes on' in capsys.readouterr().err
    assert cache_latents(options(images, vae, tmp_path / 'out')) == 0
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


def test_a_file_cut_off_is_written_again(images, vae, tmp_path):
    cache_latents(options(images, vae, tmp_path / 'out'))
    whole = contents(tmp_path / 'out')
    file = tmp_path / 'out' / '00001.safetensors'
    file.write_bytes(file.read_bytes()[:-7])
    assert cache_latents(options(images, vae, tmp_path / 'out')) == 0
    assert contents(tmp_path / 'out') == whole


def test_other_settings_are_refused(images, vae, tmp_path, capsys):
    cache_latents(options(images, vae, tmp_path / 'out'))
    other = save_autoencoder(tmp_path / 'other', act_fn='silu')
    for change, words in (
            (['--size', '20'], 'size is 20 and was 16'), (['--dtype', 'float32'], 'dtype is "float32"'),
            (['--vae', other], 'weights is')):
        assert cache_latents(options(images, vae, tmp_path / 'out', *change)) == 1
        assert words in capsys.readouterr().err
    (images / 'cat' / '11.png').rename(images / 'cat' / '12.png')
    assert cache_latents(options(images, vae, tmp_path / 'out')) == 1
    assert 'names is' in capsys.readouterr().err


def test_a_class_map_orders_the_classes(images, vae, tmp_path, capsys):
    (images / 'dog').mkdir()
    names = tmp_path / 'names.txt'
    assert cache_latents(options(images, vae, tmp_path / 'out', '--class-map', str(names))) == 1
    assert 'names.txt' in capsys.readouterr().err
    names.write_text('dog\ncat\nbee\nant\n')
    assert cache_latents(options(images, vae, tmp_path / 'out', '--class-map', str(names))) == 0
    data = LatentDataset(str(tmp_path / 'out'))
    assert data.metainfo['classes'] == ('dog', 'cat', 'bee', 'ant') and data[0]['label'] == 3


def test_unreadable_pictures_are_named_and_left_out_on_demand(images, vae, tmp_path, capsys):
    path = images / 'bee' / '07.png'
    good = path.read_bytes()
    path.write_bytes(good[:200])
    (images / 'ant' / '00.png').write_text('no picture')
    assert cache_latents(options(images, vae, tmp_path / 'out')) == 1
    error = capsys.readouterr().err.partition('error: ')[2]
    assert '2 of 12' in error and str(path) in error and '00.png' in error and '--skip-bad' in error
    assert not (tmp_path / 'out' / 'latents.json').exists()
    assert cache_latents(options(images, vae, tmp_path / 'out', '--skip-bad')) == 0
    facts = json.loads((tmp_path / 'out' / 'latents.json').read_text())
    assert facts['skipped'] == ['ant/00.png', 'bee/07.png'] and [s['images'] for s in facts['shards']] == [4, 4, 2]
    assert [row['label'] for row in LatentDataset(str(tmp_path / 'out'))] == [0] * 3 + [1] * 3 + [2] * 4
    path.write_bytes(good)
    Image.new('RGB', (20, 20)).save(images / 'ant' / '00.png')
    assert cache_latents(options(images, vae, tmp_path / 'out')) == 0
    assert len(LatentDataset(str(tmp_path / 'out'))) == 12


@pytest.mark.parametrize(('change', 'words'), [
    (['--size', '15'], 'divides sides by 2'),
    (['--size', '0'], '--size is 0'),
    (['--batch-size', '0'], '--batch-size is 0'),
    (['--vae', 'no/such-autoencoder'], "autoencoder 'no/such-autoencoder' cannot be loaded"),
    (['--vae', 'EMPTY'], 'cannot be loaded'),
    (['--device', 'nodevice'], 'nodevice'),
])
def test_wrong_options_end_in_one_line(images, vae, tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    (tmp_path / 'EMPTY').mkdir()
    change = [str(tmp_path / part) if part == 'EMPTY' else part for part in change]
    assert cache_latents(options(images, vae, tmp_path / 'out', *change)) == 1
    error = capsys.readouterr().err.partition('error: ')[2]
    assert words in error and (len(error.strip().splitlines()) == 1 or 'nodevice' in change)


@pytest.mark.parametrize(('spoil', 'words'), [
    (lambda root: (root / 'dog').mkdir(), '1 class folders of'),
    (lambda root: (root / 'ant').rename(root / 'train'), 'train'),
    (lambda root: (root / 'ant' / '00.png').rename(root / '00.png'), '00.png does not lie in'),
    (lambda root: [path.unlink() for path in root.rglob('*.png')], 'no images in the data folder'),
])
def test_folders_that_are_no_classes_are_refused(images, vae, tmp_path, capsys, spoil, words):
    spoil(images)
    deep = images / 'train'
    if deep.exists():
        (deep / 'ant').mkdir()
        for path in deep.glob('*.png'):
            path.rename(deep / 'ant' / path.name)
    assert cache_latents(options(images, vae, tmp_path / 'out')) == 1
    assert words in capsys.readouterr().err
    assert cache_latents(options(tmp_path / 'nowhere', vae, tmp_path / 'out')) == 1
    assert 'is no folder' in capsys.readouterr().err


def test_latents_train_and_draw_pictures(images, vae, tmp_path, monkeypatch, capsys):
    for split in ('train', 'val'):
        assert cache_latents(options(images, vae, tmp_path / 'latents' / split)) == 0
    monkeypatch.setenv('IMAGENET_LATENTS', str(tmp_path / 'latents'))
    small = [*SMALL, f'model.vae={vae}', f'experiment_name={tmp_path.name}']
    loaders = [f'{name}_dataloader.{key}' for name in ('train', 'val', 'test')
               for key in ('batch_size=6', 'num_workers=0', 'persistent_workers=False')]
    assert train([CONFIG, '--work-dir', str(tmp_path / 'run'), '--cfg-options', *small, *loaders,
                  'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'custom_hooks.1.steps=2',
                  'custom_hooks.1.columns=2']) == 0
    assert (tmp_path / 'run' / 'samples' / 'iter_2.png').is_file()
    for weights in ('run/best/model.safetensors', 'run/epoch_1.pth'):
        grid = tmp_path / f'{Path(weights).stem}.png'
        assert sample([CONFIG, str(tmp_path / weights), '--classes', 'cat', '0', '--num', '3', '--steps', '2',
                       '--out', str(grid), '--device', 'cpu', '--cfg-options', *small]) == 0
        assert Image.open(grid).size == (3 * 18 - 2, 2 * 18 - 2) and Image.open(grid).mode == 'RGB'
    capsys.readouterr()
    other = save_autoencoder(tmp_path / 'other', scaling_factor=0.5)
    assert sample([CONFIG, str(tmp_path / 'run/best/model.safetensors'), '--cfg-options', *small,
                   f'model.vae={other}']) == 1
    assert 'scaled by 0.5' in capsys.readouterr().err
