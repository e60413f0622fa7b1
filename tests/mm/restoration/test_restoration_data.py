"""Pairs of pictures: folders and names, patches, faults made on the fly, and files that are refused by name."""
import random
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import visionssm.openmmlab.restoration  # noqa: E402, F401
from visionssm.openmmlab.data import SampleKey, sample_rng  # noqa: E402
from visionssm.openmmlab.restoration.datasets import PairedImages, TestSets, collate_pairs, read_pixels  # noqa: E402
from visionssm.openmmlab.restoration.degrade import (  # noqa: E402
    BicubicFault,
    JpegFault,
    NoiseFault,
    SecondOrderFault,
)

AUGMENT = Path(__file__).resolve().parents[4] / 'shared/golden/mambair/train/augment.safetensors'
HALF = dict(type='BicubicFault', scale=2)


def picture(width: int = 40, height: int = 32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two good pictures with their halves, of the benchmark's names; one good picture is a pixel too large."""
    for folder in ('Set/HR', 'Set/LR'):
        (tmp_path / folder).mkdir(parents=True)
    for number, name in enumerate(('bird', 'baby')):
        pixels = picture(41, 32, number)
        Image.fromarray(pixels).save(tmp_path / 'Set/HR' / f'{name}.png')
        small = BicubicFault(2)(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
        Image.fromarray((small * 255).round().byte().permute(1, 2, 0).numpy()).save(
            tmp_path / 'Set/LR' / f'{name}_LRBI_x2.png')
    return tmp_path


def pairs(root: Path, **options) -> PairedImages:
    return PairedImages(**{'gt': 'Set/HR', 'lq': 'Set/LR', 'data_root': str(root), 'scale': 2,
                           'lq_name': '{}_LRBI_x{scale}', **options})


def test_pairs_are_found_by_name_and_the_good_picture_is_cut_to_the_bad_one(folders):
    data = pairs(folders)
    sample = data[1]
    assert len(data) == 2 and sample['name'] == 'Set' and sample['path'].endswith('bird.png')
    assert sample['inputs'].shape == (3, 16, 20) and sample['targets'].shape == (3, 32, 40)
    made = pairs(folders, lq=None, degrade=HALF)[1]
    assert torch.equal(made['inputs'], sample['inputs']) and torch.equal(made['targets'], sample['targets'])


@pytest.mark.parametrize('fault', [HALF, dict(type='JpegFault', quality=30)])
def test_a_patch_is_what_would_be_cut_out_of_the_whole_spoilt_picture(folders, fault):
    scale = fault.get('scale', 1)
    Image.fromarray(picture(122, 101)).save(folders / 'Set/HR/baby.png')
    options = dict(lq=None, degrade=fault, scale=scale, mode='L')
    whole, part = pairs(folders, **options)[0], pairs(folders, patch=24, **options)
    for seed in range(6):
        random.seed(seed)
        patch = part[0]
        places = [(top, left) for top in range(0, 101 - 24 + 1, scale) for left in range(0, 122 - 24 + 1, scale)
                  if torch.equal(whole['targets'][:, top:top + 24, left:left + 24], patch['targets'])]
        top, left = (value // scale for value in places[0])
        side = 24 // scale
        assert torch.equal(whole['inputs'][:, top:top + side, left:left + side], patch['inputs'])


def test_patches_of_pairs_stay_together_and_repeat_with_the_seed(folders):
    data = pairs(folders, patch=16, augment=True, cache=True)
    samples = []
    for epoch in range(8):
        with sample_rng(3, SampleKey(0, epoch)):
            first = data[0]
        with sample_rng(3, SampleKey(0, epoch)):
            assert torch.equal(first['targets'], data[0]['targets'])
        assert first['inputs'].shape == (3, 8, 8)
        # the small patch is a blurred copy, whatever was mirrored
        halved = torch.nn.functional.avg_pool2d(first['targets'], 2)
        assert (halved - first['inputs']).abs().mean() < 0.03
        samples.append(first['targets'])
    assert len({sample.sum().item() for sample in samples}) > 4


@pytest.mark.skipif(not AUGMENT.exists(), reason='the fixtures are not at hand')
@pytest.mark.parametrize(('case', 'seed'), [(0, 60), (1, 55), (2, 93), (3, 805), (4, 1040), (5, 1093)])
def test_patches_and_mirrors_are_drawn_in_the_official_order(folders, monkeypatch, case, seed):
    tensors = {key: value.permute(2, 0, 1) for key, value in load_file(AUGMENT).items()}
    data = pairs(folders, patch=16, augment=True)
    # seeds with which Python draws the places and mirrors that these fixtures have
    random.seed(seed)
    monkeypatch.setattr(data, '_load', lambda index: (tensors['gt'] * 255, tensors['lq'] * 255))
    sample = data[0]
    torch.testing.assert_close(sample['targets'], tensors[f'case{case}.gt'], rtol=0, atol=1e-6)
    torch.testing.assert_close(sample['inputs'], tensors[f'case{case}.lq'], rtol=0, atol=1e-6)


@pytest.mark.skipif(not AUGMENT.exists(), reason='the fixtures are not at hand')
def test_noise_of_the_evaluation_is_the_official_one():
    noise = load_file(AUGMENT)['noise_seed0_sigma25_5x4x3_HWC_BGR']
    made = NoiseFault(25, seed=0)(torch.zeros(3, 5, 4, dtype=torch.float64))
    torch.testing.assert_close(made.flip(0).permute(1, 2, 0), noise, rtol=0, atol=1e-7)


def test_faults_draw_from_the_global_generator():
    x = torch.from_numpy(picture(48, 48)).permute(2, 0, 1) / 255
    for fault in (NoiseFault(25), SecondOrderFault(2)):
        torch.manual_seed(1)
        first = fault(x)
        torch.manual_seed(1)
        assert torch.equal(first, fault(x)) and not torch.equal(first, fault(x))


def test_what_does_not_match_is_refused_with_both_names(folders):
    with pytest.raises(ValueError, match=r'baby.png has no partner babyx2'):
        pairs(folders, lq_name='{}x{scale}')
    Image.fromarray(picture(60, 32)).save(folders / 'Set/HR/baby.png')
    with pytest.raises(ValueError, match=r'baby.png has 60 x 32 .*baby_LRBI_x2.png 20 x 16'):
        pairs(folders)[0]
    with pytest.raises(ValueError, match='give one of them'):
        pairs(folders, degrade=HALF)
    with pytest.raises(ValueError, match='scale is 3'):
        pairs(folders, lq=None, degrade=HALF, scale=3)
    with pytest.raises(ValueError, match='multiple of the scale'):
        pairs(folders, patch=15)


def test_files_that_cannot_be_used_are_refused_by_name(folders):
    target = folders / 'Set/HR/baby.png'
    data = pairs(folders, lq=None, degrade=HALF, patch=16)
    good = target.read_bytes()
    for content, reason in ((b'', '0 bytes'), (good[:len(good) // 2], 'cannot be decoded'), (b'text', 'decoded')):
        target.write_bytes(content)
        with pytest.raises(ValueError, match=f'baby.png.*{reason}'):
            data[0]
    Image.new('RGB', (1, 1)).save(target)
    with pytest.raises(ValueError, match='baby.png has 1 x 1 pixels'):
        data[0]
    Image.fromarray(picture(12, 30)).save(target)
    with pytest.raises(ValueError, match='baby.png has 12 x 30 pixels, fewer than the patch of 16'):
        data[0]
    assert pairs(folders, lq=None, degrade=HALF, patch=16, pad=True)[0]['targets'].shape == (3, 16, 16)


def test_pictures_of_any_kind_become_three_channels_or_one(tmp_path):
    image = Image.fromarray(picture())
    for mode, suffix in (('CMYK', 'jpg'), ('P', 'png'), ('RGBA', 'png'), ('L', 'png'), ('1', 'png'), ('I;16', 'png')):
        path = tmp_path / f'{mode.replace(";", "")}.{suffix}'
        (image.convert('L') if mode == 'I;16' else image).convert(mode).save(path)
        assert read_pixels(path).shape == (3, 32, 40) and read_pixels(path, 'L').shape == (1, 32, 40)
    turned = image.getexif()
    turned[0x0112] = 6
    image.save(tmp_path / 'turned.jpg', exif=turned)
    assert read_pixels(tmp_path / 'turned.jpg').shape == (3, 40, 32)


def test_test_sets_follow_each_other_and_missing_ones_can_be_left_out(folders, caplog):
    common = dict(scale=2, lq=None, degrade=HALF)
    data = TestSets([dict(gt='Set/HR'), dict(gt='Set/HR/bird.png', name='one')], common, str(folders))
    assert [data[i]['name'] for i in range(3)] == ['Set', 'Set', 'one'] and data[2]['index'] == 2
    kept = TestSets([dict(gt='Set14/HR'), dict(gt='Set/HR')], common, str(folders), skip_missing=True)
    assert len(kept) == 2 and 'Set14' in caplog.text
    with pytest.raises(FileNotFoundError, match='Set14'):
        TestSets([dict(gt='Set14/HR'), dict(gt='Set/HR')], common, str(folders))
    with pytest.raises(FileNotFoundError, match='none of the test sets'):
        TestSets([dict(gt='Set14/HR')], common, str(folders), skip_missing=True)
    with pytest.raises(ValueError, match='two test sets'):
        TestSets([dict(gt='Set/HR')] * 2, common, str(folders))


def test_a_batch_holds_pictures_of_one_size(folders):
    Image.fromarray(picture(60, 32)).save(folders / 'Set/HR/baby.png')
    data = pairs(folders, lq=None, degrade=HALF)
    with pytest.raises(ValueError, match='batch_size=1'):
        collate_pairs([data[0], data[1]])
    assert collate_pairs([data[0], data[0]])['targets'].shape == (2, 3, 32, 60)


def test_a_folder_inside_a_package_is_found():
    with pytest.raises(FileNotFoundError, match='not installed'):
        PairedImages('x.png', data_root='package:no_such_package/data', degrade=HALF, scale=2)
    with pytest.raises(FileNotFoundError, match='visionssm'):
        PairedImages('x.png', data_root='package:visionssm/data', degrade=HALF, scale=2)
    with pytest.raises(ValueError, match='1 to 100'):
        JpegFault(0)
