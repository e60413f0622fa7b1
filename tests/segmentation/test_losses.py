"""The losses of medical segmentation: the official numbers and gradients, and what happens at the edges."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visionssm.segmentation import BceDiceLoss, CeDiceLoss
from visionssm.segmentation.losses import binary_dice

GOLDEN = load_file(Path(__file__).resolve().parent.parent / 'golden/mhs_vm/losses_metrics_preproc.safetensors')
TOLERANCE = {'atol': 1e-6, 'rtol': 0}


def test_the_binary_loss_its_parts_and_its_gradient_equal_the_official_ones():
    prob = GOLDEN['prob'].clone().requires_grad_()
    parts = BceDiceLoss().terms(prob, GOLDEN['target'])
    torch.testing.assert_close(parts['loss_bce'], GOLDEN['bce'][0], **TOLERANCE)
    torch.testing.assert_close(parts['loss_dice'], GOLDEN['dice'][0], **TOLERANCE)
    loss = BceDiceLoss()(prob, GOLDEN['target'])
    torch.testing.assert_close(loss, GOLDEN['loss'][0], **TOLERANCE)
    loss.backward()
    assert (prob.grad - GOLDEN['grad.prob']).abs().max() <= 5e-4 * GOLDEN['grad.prob'].abs().max()
    weighted = BceDiceLoss(0.7, 1.6)(GOLDEN['prob'], GOLDEN['target'])
    torch.testing.assert_close(weighted, GOLDEN['loss_wb0.7_wd1.6'][0], **TOLERANCE)


def test_the_loss_of_several_classes_and_its_gradient_equal_the_official_ones():
    logits = GOLDEN['multi.logits'].clone().requires_grad_()
    loss = CeDiceLoss()(logits, GOLDEN['multi.target'])
    torch.testing.assert_close(loss, GOLDEN['multi.loss'][0], **TOLERANCE)
    loss.backward()
    assert (logits.grad - GOLDEN['multi.grad']).abs().max() <= 5e-4 * GOLDEN['multi.grad'].abs().max()


@pytest.mark.parametrize('prob', [0., 1.])
@pytest.mark.parametrize('mask', [0., 1.])
def test_certain_predictions_and_empty_masks_stay_finite(prob: float, mask: float):
    logits = torch.full((2, 1, 4, 4), 1000 * (prob - 0.5)).requires_grad_()
    loss = BceDiceLoss()(logits.sigmoid(), torch.full((2, 1, 4, 4), mask))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert (loss < 1e-6) == (prob == mask)


def test_empty_masks_have_no_dice_loss_when_nothing_is_predicted():
    assert binary_dice(torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 4, 4)) == 0


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_losses_are_float32_under_autocast(dtype: torch.dtype):
    with torch.autocast('cpu', dtype):
        binary = BceDiceLoss()(GOLDEN['prob'], GOLDEN['target'])
        multi = CeDiceLoss()(GOLDEN['multi.logits'], GOLDEN['multi.target'])
    assert binary.dtype == multi.dtype == torch.float32
    torch.testing.assert_close(binary, GOLDEN['loss'][0], **TOLERANCE)
    torch.testing.assert_close(multi, GOLDEN['multi.loss'][0], **TOLERANCE)


def test_half_precision_sums_of_large_maps_do_not_overflow():
    prob = torch.full((1, 1, 512, 512), 0.5, dtype=torch.float16)
    assert BceDiceLoss()(prob, torch.ones(1, 1, 512, 512)).isfinite()


def test_what_is_no_number_stays_visible():
    prob = torch.full((1, 1, 2, 2), float('nan'))
    assert BceDiceLoss()(prob, torch.zeros(1, 1, 2, 2)).isnan()


def test_ignored_pixels_change_nothing():
    logits, target = GOLDEN['multi.logits'], GOLDEN['multi.target'].clone()
    target[:, -3:] = 255
    other = logits.clone()
    other[:, :, -3:] = torch.randn_like(other[:, :, -3:])
    torch.testing.assert_close(CeDiceLoss()(logits, target), CeDiceLoss()(other, target))
    cut = CeDiceLoss()(logits[:, :, :-3], target[:, :-3])
    torch.testing.assert_close(CeDiceLoss()(logits, target), cut)
    assert CeDiceLoss()(logits, torch.full_like(target, 255)).isfinite()


@pytest.mark.parametrize(('loss', 'target'), [
    (BceDiceLoss(), (2, 4, 4)), (BceDiceLoss(), (2, 1, 4, 5)), (CeDiceLoss(), (2, 1, 4, 4)), (CeDiceLoss(), (1, 4, 4))])
def test_shapes_that_would_broadcast_are_refused(loss, target: tuple[int, ...]):
    with pytest.raises(ValueError, match=r'The prediction is \(2, 1, 4, 4\) and the target'):
        loss(torch.rand(2, 1, 4, 4), torch.zeros(target))
