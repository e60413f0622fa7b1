"""The weights in `checkpoints/` restore a photograph that they were not trained on: a crop of Chelsea the cat, CC0."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visionssm
from visionssm.restoration.degradations import add_gaussian_noise, shrink_bicubic
from visionssm.restoration.metrics import psnr, to_uint8
from visionssm.restoration.resize import imresize

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(d_state=2, drop_path_rate=0.)


@pytest.fixture(scope='module')
def photograph() -> torch.Tensor:
    """(3, 96, 96)."""
    pixels = np.array(Image.open(Path(__file__).with_name('chelsea.png')))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def restore(name: str, picture: torch.Tensor, **options) -> torch.Tensor:
    path = ROOT / 'checkpoints' / f'mambair_pico_{name}_photos.safetensors'
    model = visionssm.create_model('mambair_pico', checkpoint_path=path, **SMALL, **options).eval()
    with torch.inference_mode():
        return model(picture[None])[0].clamp(0, 1)


def gain(restored: torch.Tensor, before: torch.Tensor, truth: torch.Tensor, **options) -> float:
    ours, theirs = (float(psnr(to_uint8(x), to_uint8(truth), **options)) for x in (restored, before.clamp(0, 1)))
    return ours - theirs


def test_twice_the_resolution_is_better_than_bicubic(photograph):
    small = shrink_bicubic(photograph, 2)
    assert gain(restore('sr_x2', small), imresize(small, 2), photograph, y_channel=True, border=2) > 0.5


def test_noise_is_taken_out_without_a_shift_of_the_colours(photograph):
    torch.manual_seed(0)
    noisy = add_gaussian_noise(photograph, 25)
    restored = restore('denoise_sigma25', noisy, upscale=1, upsampler='residual')
    assert gain(restored, noisy, photograph) > 6
    assert (restored - photograph).mean((1, 2)).abs().max() < 2 / 255
