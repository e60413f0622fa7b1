"""Metrics, resizing, tiling and losses against tables made with the official code."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchmetrics.functional.image import structural_similarity_index_measure

import visionssm
from visionssm.restoration.losses import CharbonnierLoss, GANLoss, PixelLoss
from visionssm.restoration.metrics import luma, psnr, ssim, ssim_volume, to_uint8
from visionssm.restoration.resize import imresize
from visionssm.restoration.tiling import official_tiles, plan_tiles, restore_official, restore_tiled, self_ensemble

OUTER = Path(__file__).resolve().parent.parent.parent.parent / 'shared' / 'golden' / 'mambair'
outer = pytest.mark.skipif(not OUTER.is_dir(), reason=f'no outer fixtures at {OUTER}')


def planes(image: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) in BGR or (H, W), (H, W, 1) gray to (C, H, W) in RGB."""
    return image.reshape(*image.shape[:2], -1).permute(2, 0, 1).flip(0)


@outer
def test_psnr_and_ssim_equal_the_official_ones():
    tensors = load_file(OUTER / 'metrics' / 'psnr_ssim.safetensors')
    for case in json.loads((OUTER / 'metrics' / 'psnr_ssim.json').read_text())['cases']:
        pair = [planes(tensors[f'case{case["case"]}.{name}']) for name in ('img', 'img2')]
        for row in case['results']:
            options = {'border': row['crop_border'], 'y_channel': row['test_y_channel']}
            assert psnr(*pair, **options).item() == pytest.approx(float(row['psnr']), abs=1e-5)
            assert ssim(*pair, **options).item() == pytest.approx(row['ssim'], abs=1e-7)
        if f'case{case["case"]}.y_of_img' in tensors:
            expected = planes(tensors[f'case{case["case"]}.y_of_img'])
            torch.testing.assert_close(luma(pair[0]), expected, rtol=0, atol=1e-4)


@outer
def test_the_benchmark_of_real_noise_takes_images_as_volumes():
    tensors = load_file(OUTER / 'metrics' / 'sidd_psnr_ssim3d.safetensors')
    for case in json.loads((OUTER / 'metrics' / 'sidd_psnr_ssim3d.json').read_text())['cases']:
        pair = [tensors[f'case{case["case"]}.{name}'].permute(2, 0, 1) for name in ('denoised', 'gt')]
        assert psnr(*pair, peak=1.).item() == pytest.approx(case['psnr'], abs=1e-4)
        assert ssim_volume(*pair).item() == pytest.approx(case['ssim3d'], abs=1e-5)


def test_ssim_agrees_with_another_library():
    torch.manual_seed(0)
    target = torch.rand(2, 3, 40, 33) * 255
    restored = (target + 20 * torch.randn_like(target)).clamp(0, 255)
    theirs = structural_similarity_index_measure(
        restored.double(), target.double(), sigma=1.5, data_range=255., reduction='none')
    # that library averages over a map with reflected edges, so it is close and not equal
    torch.testing.assert_close(ssim(restored, target), theirs, atol=5e-3, rtol=0)


@outer
def test_bytes_are_rounded_as_the_official_tools_do():
    tensors = load_file(OUTER / 'metrics' / 'colour.safetensors')
    assert torch.equal(to_uint8(tensors['tensor2img.input']), planes(tensors['tensor2img.output_bgr_u8']))


@outer
def test_resizing_equals_the_official_one():
    tensors = load_file(OUTER / 'metrics' / 'imresize.safetensors')
    for case in json.loads((OUTER / 'metrics' / 'imresize.json').read_text())['cases']:
        x, expected = (tensors[f'case{case["case"]}.{name}'] for name in ('input', 'output'))
        x, expected = (t.movedim(-1, 0) if t.ndim == 3 else t for t in (x, expected))
        out = imresize(x, case['scale'], case['antialiasing'])
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_resizing_keeps_constants_and_takes_images_of_one_pixel():
    assert torch.allclose(imresize(torch.full((2, 3, 1, 1), 0.3), 4), torch.full((2, 3, 4, 4), 0.3))
    assert imresize(torch.rand(3, 5, 6), 1 / 4).shape == (3, 2, 2)
    with pytest.raises(TypeError, match='divide bytes by 255'):
        imresize(torch.zeros(3, 4, 4, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match='scale above 0'):
        imresize(torch.zeros(3, 4, 4), 0)


@outer
def test_the_official_pieces():
    for case in json.loads((OUTER / 'tiling' / 'plan.json').read_text())['cases']:
        pieces = [list(piece) for piece, _ in official_tiles(case['h'], case['w'])]
        assert pieces == case['chops_top_left_height_width']
        x = torch.rand(1, 1, case['h'], case['w'])
        enlarged = restore_official(torch.nn.UpsamplingNearest2d(scale_factor=case['scale']), x, case['scale'])
        assert list(enlarged.shape[2:]) == case['output_size']
        assert torch.equal(enlarged[..., ::case['scale'], ::case['scale']], x)


@outer
def test_the_official_pieces_and_the_ensemble_of_a_model():
    tensors = load_file(OUTER / 'mambair_tiled_selfensemble_x2.safetensors')
    state = {key.removeprefix('state_dict.'): value for key, value in tensors.items() if key.startswith('state_dict.')}
    model = visionssm.from_official('mambair', state, {
        'img_size': 64, 'embed_dim': 30, 'depths': [1], 'd_state': 4, 'mlp_ratio': 1.0, 'upscale': 2,
        'upsampler': 'pixelshuffledirect'}).eval()
    with torch.no_grad():
        close = {'atol': 3e-5, 'rtol': 0}
        torch.testing.assert_close(restore_official(model, tensors['input'], 2), tensors['output'], **close)
        torch.testing.assert_close(model(tensors['input']), tensors['output_whole_image'], **close)
        torch.testing.assert_close(
            self_ensemble(model, tensors['selfensemble.input']), tensors['selfensemble.output'], **close)


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (31, 200), (64, 65), (97, 33)])
def test_blended_pieces_show_no_seam(height, width):
    x = torch.rand(2, 3, height, width)
    seen = []
    out = restore_tiled(lambda part: torch.nn.functional.interpolate(part, scale_factor=3), x, 3, 32, 8,
                        progress=lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(out, torch.nn.functional.interpolate(x, scale_factor=3))
    assert seen[-1] == (len(plan_tiles(height, width, 32, 8)),) * 2


def test_the_border_of_a_piece_counts_at_the_border_of_the_image_alone():
    def spoil(part: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(part[..., 2:-2, 2:-2], (2, 2, 2, 2), value=9.)

    x = torch.rand(1, 1, 64, 81)
    out = restore_tiled(spoil, x, 1, 32, 8)
    torch.testing.assert_close(out[..., 2:-2, 2:-2], x[..., 2:-2, 2:-2])
    assert (out[..., :2, :] == 9).all()


def test_pieces_cover_the_image_and_overlap_enough():
    pieces = plan_tiles(100, 70, 32, 8)
    covered = torch.zeros(100, 70)
    for piece in pieces:
        covered[piece.top:piece.top + piece.height, piece.left:piece.left + piece.width] += 1
    assert covered.min() >= 1
    tops = sorted({piece.top for piece in pieces})
    assert all(second - first <= 24 for first, second in zip(tops, tops[1:]))
    with pytest.raises(ValueError, match='overlap < tile'):
        plan_tiles(9, 9, 8, 8)


@outer
@pytest.mark.parametrize(('loss', 'name'), [
    (PixelLoss('l1'), 'l1_mean'), (PixelLoss('mse'), 'mse_mean'), (CharbonnierLoss(1e-3), 'charbonnier_eps1e-3_mean'),
    (CharbonnierLoss(1e-12), 'charbonnier_eps1e-12_mean')])
def test_gradients_of_losses_equal_the_official_ones(loss, name):
    tensors = load_file(OUTER / 'train' / 'losses.safetensors')
    x = tensors['pred'].clone().requires_grad_()
    loss(x, tensors['target']).backward()
    torch.testing.assert_close(x.grad, tensors[f'grad.{name}'], atol=1e-7, rtol=1e-4)


def test_losses_of_a_game_pull_in_opposite_directions():
    logits = torch.tensor([-2., 0.5, 3.])
    for kind in ('vanilla', 'lsgan', 'hinge'):
        loss = GANLoss(kind, weight=0.1)
        better = logits + 0.3
        assert loss(better, real=True) < loss(logits, real=True) or kind == 'lsgan'
        assert loss(better, real=False, discriminator=True) > loss(logits, real=False, discriminator=True)
        assert loss(logits, True).item() == pytest.approx(0.1 * {
            'vanilla': torch.nn.functional.softplus(-logits).mean().item(),
            'lsgan': (logits - 1).square().mean().item(), 'hinge': -logits.mean().item()}[kind])


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: psnr(torch.zeros(3, 9, 9), torch.zeros(3, 9, 8)), 'one shape'),
    (lambda: psnr(torch.zeros(3, 9, 9), torch.zeros(3, 9, 9), border=5), 'leaves nothing'),
    (lambda: ssim(torch.zeros(3, 9, 9), torch.zeros(3, 9, 9)), 'at least 11 x 11'),
    (lambda: luma(torch.zeros(4, 9, 9)), 'RGB or gray'),
    (lambda: PixelLoss('l3'), 'l1'),
    (lambda: PixelLoss()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)), 'scale of the model'),
    (lambda: CharbonnierLoss(0.), 'above 0'),
])
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
