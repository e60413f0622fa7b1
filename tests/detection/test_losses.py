"""The losses: what they sum, odd targets, gains, and types."""
import pytest
import torch
import torch.nn.functional as F

from visionssm.detection import YOLOLoss
from visionssm.detection.losses import distribution_focal_loss, pad_targets

TARGETS = torch.tensor([[1, 0, 0.5, 0.5, 0.5, 0.5], [0, 2, 0.3, 0.4, 0.3, 0.4], [1, 1, 0.7, 0.6, 0.2, 0.3]])
NOTHING = torch.zeros(0, 6)


def raw_maps(num_classes: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 64 + num_classes, 64 // s, 96 // s, dtype=dtype).requires_grad_() for s in (8, 16, 32)]


def test_targets_are_sorted_by_image():
    labels, boxes, valid = pad_targets(TARGETS, 3, 64, 96, 3)
    assert labels.tolist() == [[2, 0], [0, 1], [0, 0]]
    assert valid.tolist() == [[True, False], [True, True], [False, False]]
    torch.testing.assert_close(boxes[1, 0], torch.tensor([24., 16., 72., 48.]))
    assert not boxes[2].any()
    labels, boxes, valid = pad_targets(NOTHING, 2, 64, 96, 3)
    assert labels.shape == (2, 0) and boxes.shape == (2, 0, 4) and valid.shape == (2, 0)


@pytest.mark.parametrize(('targets', 'message'), [
    (torch.tensor([[0, 3, .5, .5, .5, .5]]), 'the class 3; allowed are 0 to 2'),
    (torch.tensor([[0, -1, .5, .5, .5, .5]]), 'the class -1'),
    (torch.tensor([[2, 0, .5, .5, .5, .5]]), 'the image index 2; allowed are 0 to 1'),
    (torch.zeros(3, 5), 'the shape'), (torch.zeros(6), 'the shape')], ids=lambda v: v if isinstance(v, str) else '')
def test_targets_that_do_not_fit_are_refused(targets: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        YOLOLoss(3)(raw_maps(), targets)


def test_maps_of_another_number_of_classes_are_refused():
    with pytest.raises(ValueError, match='67 channels; with 4 classes 68 are expected'):
        YOLOLoss(4)(raw_maps(), TARGETS)


def test_focal_loss_is_the_cross_entropy_of_a_soft_distance():
    logits, distances = torch.randn(7, 4, 16), torch.rand(7, 4) * 14.9
    soft = (1 - (torch.arange(16.) - distances.unsqueeze(-1)).abs()).clamp(min=0)
    expected = F.cross_entropy(logits.view(-1, 16), soft.view(-1, 16), reduction='none').view(7, 4)
    torch.testing.assert_close(distribution_focal_loss(logits, distances), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('distance', [-3., 0., 14.99, 15., 100.])
def test_distances_beyond_the_bins_are_clamped(distance: float):
    logits = torch.randn(16)
    inside = torch.tensor(min(max(distance, 0.), 14.99))
    assert torch.equal(distribution_focal_loss(logits, torch.tensor(distance)), distribution_focal_loss(logits, inside))


def test_without_objects_only_the_classes_are_learnt():
    raw = raw_maps()
    losses = YOLOLoss(3)(raw, NOTHING)
    assert losses['loss_box'] == losses['loss_dfl'] == 0 and losses['loss_cls'] > 0
    expected = sum(F.softplus(m[:, 64:]).sum() for m in raw) * 0.5
    torch.testing.assert_close(losses['loss_cls'], expected)
    sum(losses.values()).backward()
    assert all((m.grad[:, :64] == 0).all() and (m.grad[:, 64:] > 0).all() for m in raw)


@pytest.mark.parametrize('target', [
    [0, 1, .5, .5, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, .5, .5, .5, 0], [0, 1, -3, -3, .1, .1], [0, 1, .5, .5, 9, 9],
    [0, 1, .5, .5, 1e-6, 1e-6]], ids=str)
def test_strange_boxes_give_finite_losses_and_gradients(target: list[float]):
    raw = raw_maps()
    losses = YOLOLoss(3)(raw, torch.tensor([target]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and all(m.grad.isfinite().all() for m in raw)


def test_the_order_of_targets_does_not_matter():
    first, second = (YOLOLoss(3)(raw_maps(), targets) for targets in (TARGETS, TARGETS.flip(0)))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name])


def test_gains_scale_their_parts():
    plain = YOLOLoss(3, box=1., cls=1., dfl=1.)(raw_maps(), TARGETS)
    gained = YOLOLoss(3, box=2., cls=3., dfl=5.)(raw_maps(), TARGETS)
    for name, gain in (('loss_box', 2), ('loss_cls', 3), ('loss_dfl', 5)):
        torch.testing.assert_close(gained[name], gain * plain[name])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_maps_are_compared_in_float32_under_autocast(dtype: torch.dtype):
    raw = [m.detach().to(dtype).requires_grad_() for m in raw_maps()]
    with torch.autocast('cpu', torch.bfloat16):
        losses = YOLOLoss(3)(raw, TARGETS)
    expected = YOLOLoss(3)([m.detach().float() for m in raw], TARGETS)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])
    sum(losses.values()).backward()
    assert all(m.grad.dtype == dtype and m.grad.isfinite().all() for m in raw)


def test_double_precision_is_kept():
    losses = YOLOLoss(3)(raw_maps(dtype=torch.float64), TARGETS)
    assert all(loss.dtype == torch.float64 for loss in losses.values())
    single = YOLOLoss(3)([m.float() for m in raw_maps(dtype=torch.float64)], TARGETS)
    for name, value in losses.items():
        torch.testing.assert_close(value.float(), single[name], rtol=1e-4, atol=1e-5)


def test_huge_logits_stay_finite():
    raw = [(1e4 * m.detach()).requires_grad_() for m in raw_maps()]
    losses = YOLOLoss(3)(raw, TARGETS)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and all(m.grad.isfinite().all() for m in raw)


def test_one_class_and_an_empty_batch():
    raw = [m[:, :65] for m in raw_maps()]
    losses = YOLOLoss(1)(raw, torch.tensor([[0, 0, .5, .5, .5, .5]]))
    assert all(loss > 0 for loss in losses.values())
    losses = YOLOLoss(1)([m[:0] for m in raw], NOTHING)
    assert all(loss == 0 for loss in losses.values())
