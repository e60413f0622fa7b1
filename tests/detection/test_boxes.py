"""Decoding of raw maps, comparison of boxes, suppression, and the frame of a letterbox."""
import pytest
import torch
from torchvision.ops import box_iou, complete_box_iou_loss

from visionssm.detection import box_ciou, decode_boxes, letterbox_geometry, non_max_suppression
from visionssm.detection.boxes import make_anchors

STRIDES = (8, 16, 32)


def random_boxes(count: int) -> torch.Tensor:
    first = torch.rand(count, 2) * 50
    return torch.cat([first, first + 1 + torch.rand(count, 2) * 30], dim=1)


def raw_maps(num_classes: int = 2, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(batch, 64 + num_classes, 64 // s, 96 // s).to(dtype) for s in STRIDES]


def test_ciou_is_that_of_torchvision_up_to_its_constants():
    a, b = random_boxes(50), random_boxes(50)
    a.requires_grad_()
    ours, theirs = box_ciou(a, b), 1 - complete_box_iou_loss(a, b)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # neither passes a gradient through the weight of the aspect ratios
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), a) for value in (ours, theirs)), rtol=1e-3, atol=1e-5)


def test_ciou_of_equal_boxes_is_one_and_of_distant_ones_below_zero():
    a = random_boxes(5)
    torch.testing.assert_close(box_ciou(a, a), torch.ones(5))
    assert (box_ciou(a, a + 500) < -0.5).all()
    assert box_ciou(a[:0], a[:0]).shape == (0,) and box_ciou(a.view(5, 1, 4), a.view(5, 1, 4)).shape == (5, 1)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_ciou_of_boxes_without_area_is_finite_in_value_and_gradient(dtype: torch.dtype):
    a = torch.tensor([[0, 0, 0, 0], [5, 5, 5, 9], [5, 5, 9, 5], [300, 300, 600, 600]], dtype=dtype).requires_grad_()
    out = box_ciou(a, a.detach().flip(0))
    out.sum().backward()
    assert out.isfinite().all() and a.grad.isfinite().all()
    assert out.dtype == torch.promote_types(dtype, torch.float32)


def test_decoded_boxes_stand_around_their_cells():
    """All the mass on one bin: the distances are that bin, in strides."""
    maps = [torch.zeros(1, 65, 64 // s, 96 // s) for s in STRIDES]
    for m in maps:
        for side, bin_ in enumerate((1, 2, 3, 4)):
            m[:, 16 * side + bin_] = 100
    boxes, scores = decode_boxes(maps, STRIDES)
    cell = 3 * 12 + 5  # fourth row, sixth column of the finest map
    torch.testing.assert_close(boxes[0, cell], torch.tensor([44. - 8, 28. - 16, 44 + 24, 28 + 32]))
    torch.testing.assert_close(boxes[0, -1], torch.tensor([80. - 32, 48. - 64, 80 + 96, 48 + 128]))
    assert boxes.shape == (1, 126, 4) and scores.shape == (1, 126, 1)


def test_uniform_distances_are_the_middle_of_the_bins_and_bins_may_be_given():
    maps = [torch.zeros(1, 65, 64 // s, 96 // s) for s in STRIDES]
    boxes, _ = decode_boxes(maps, STRIDES)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([4 - 60., 4 - 60., 4 + 60., 4 + 60.]))
    boxes, _ = decode_boxes(maps, STRIDES, torch.ones(16))
    torch.testing.assert_close(boxes[0, 0], torch.tensor([-4., -4., 12., 12.]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_decoding_is_at_least_in_float32(dtype: torch.dtype):
    maps = raw_maps(dtype=dtype)
    boxes, scores = decode_boxes(maps, STRIDES)
    expected, logits = decode_boxes([m.double() for m in maps], STRIDES)
    assert boxes.dtype == scores.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(boxes.double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(scores.double(), logits)


def test_anchors_of_maps_of_one_cell():
    anchors, strides = make_anchors([torch.zeros(1, 66, 1, 1)], (32,))
    assert anchors.tolist() == [[0.5, 0.5]] and strides.tolist() == [[32.]]
    with pytest.raises(ValueError, match='zip'):
        make_anchors([torch.zeros(1, 66, 1, 1)], STRIDES)


def test_decoding_exports_with_any_batch_and_size():
    class Decode(torch.nn.Module):
        def forward(self, *maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return decode_boxes(maps, STRIDES)

    batch, height, width = (torch.export.Dim(name, min=2, max=9) for name in ('batch', 'height', 'width'))
    sizes = tuple({0: batch, 2: 32 // s * height, 3: 32 // s * width} for s in STRIDES)
    program = torch.export.export(Decode(), tuple(raw_maps()), dynamic_shapes={'maps': sizes}).run_decompositions()
    maps = [torch.randn(4, 66, 160 // s, 64 // s) for s in STRIDES]
    for ours, expected in zip(program.module()(*maps), decode_boxes(maps, STRIDES), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def prediction(boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """(n, 4) corners and (n, classes) scores as a detector returns them, one image."""
    middle = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
    return torch.cat([middle, scores], dim=1).T[None]


def test_suppression_keeps_the_surest_of_boxes_that_overlap():
    boxes = torch.tensor([[0., 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 10, 10]])
    scores = torch.tensor([[0.6, 0.1], [0.9, 0.1], [0.3, 0.2], [0.1, 0.8]])
    rows = non_max_suppression(prediction(boxes, scores), 0.25, 0.5)[0]
    assert rows[:, 4:].tolist() == [[pytest.approx(0.9), 0], [pytest.approx(0.8), 1], [pytest.approx(0.3), 0]]
    torch.testing.assert_close(rows[:, :4], boxes[[1, 3, 2]])
    rows = non_max_suppression(prediction(boxes, scores), 0.25, 0.5, agnostic=True)[0]
    assert rows[:, 5].tolist() == [0, 0]
    rows = non_max_suppression(prediction(boxes, scores), 0.25, 0.5, classes=[1])[0]
    assert rows[:, 5].tolist() == [1]


def test_several_labels_of_a_box_are_kept_where_asked_for():
    boxes, scores = torch.tensor([[0., 0, 10, 10]]), torch.tensor([[0.6, 0.4, 0.1]])
    assert len(non_max_suppression(prediction(boxes, scores), 0.2)[0]) == 1
    rows = non_max_suppression(prediction(boxes, scores), 0.2, multi_label=True)[0]
    assert rows[:, 5].tolist() == [0, 1]


@pytest.mark.parametrize('multi_label', [False, True])
def test_kept_boxes_are_bounded_sorted_and_disjoint(multi_label: bool):
    boxes, scores = random_boxes(200), torch.rand(200, 2)
    rows = non_max_suppression(prediction(boxes, scores), 0.3, 0.4, multi_label)[0]
    assert (rows[:-1, 4] >= rows[1:, 4]).all() and (rows[:, 4] > 0.3).all()
    for label in (0, 1):
        iou = box_iou(*[rows[rows[:, 5] == label, :4]] * 2).fill_diagonal_(0)
        assert iou.max() <= 0.4 + 1e-5
    few = non_max_suppression(prediction(boxes, scores), 0.3, 0.4, multi_label, max_detections=3)[0]
    assert torch.equal(few, rows[:3])
    few = non_max_suppression(prediction(boxes, scores), 0.3, 0.4, multi_label, max_candidates=10)[0]
    assert len(few) <= 10 and torch.equal(few[0], rows[0])


@pytest.mark.parametrize('multi_label', [False, True])
def test_nothing_sure_gives_no_boxes(multi_label: bool):
    found = non_max_suppression(torch.zeros(2, 6, 50), 0.1, multi_label=multi_label)
    assert [rows.shape for rows in found] == [(0, 6), (0, 6)]
    assert non_max_suppression(torch.zeros(0, 6, 50), multi_label=multi_label) == []


def test_half_precision_predictions_are_suppressed_in_float32():
    boxes, scores = random_boxes(20), torch.rand(20, 2)
    rows = non_max_suppression(prediction(boxes, scores).half())[0]
    assert rows.dtype == torch.float32 and len(rows)


@pytest.mark.parametrize(('image', 'options', 'resized', 'pads'), [
    ((480, 640), {}, (480, 640), (0, 80, 0, 80)),
    ((480, 640), {'minimal': True}, (480, 640), (0, 0, 0, 0)),
    ((6000, 4000), {}, (640, 427), (106, 0, 107, 0)),
    ((1, 1), {'scale_up': False}, (1, 1), (319, 319, 320, 320)),
    ((1, 5000), {}, (1, 640), (0, 319, 0, 320)),
    ((100, 50), {'size': (32, 64)}, (32, 16), (24, 0, 24, 0)),
    ((100, 50), {'size': 64, 'stretch': True}, (64, 64), (0, 0, 0, 0)),
    ((37, 53), {'size': 64, 'minimal': True}, (45, 64), (0, 9, 0, 10)),
    ((37, 53), {'size': 64, 'minimal': True, 'stride': 16}, (45, 64), (0, 1, 0, 2))], ids=str)
def test_images_lie_in_the_middle_of_their_canvas(image: tuple, options: dict, resized: tuple, pads: tuple):
    frame = letterbox_geometry(*image, **options)
    assert (frame.resized, frame.pads) == (resized, pads)
    size = options.get('size', 640)
    if not options.get('minimal'):
        assert frame.size == (size if isinstance(size, tuple) else (size, size))
    else:
        stride = options.get('stride', 32)
        assert frame.size[0] % stride == frame.size[1] % stride == 0


@pytest.mark.parametrize('options', [{}, {'stretch': True}, {'scale_up': False}, {'minimal': True}], ids=str)
def test_boxes_go_onto_the_canvas_and_back(options: dict):
    frame = letterbox_geometry(61, 173, 128, **options)
    boxes = torch.tensor([[0., 0., 173., 61.], [3., 50., 20., 61.]])
    on_canvas = frame.forth(boxes)
    assert (on_canvas >= 0).all() and (on_canvas[:, 2] <= frame.size[1]).all()
    torch.testing.assert_close(frame.back(on_canvas), boxes, rtol=1e-5, atol=1e-4)
    outside = frame.back(torch.tensor([[-50., -50., 900., 900.]]))
    assert outside.tolist() == [[0., 0., 173., 61.]]
    assert frame.back(boxes[:0]).shape == (0, 4)


def test_sizes_without_pixels_are_refused():
    with pytest.raises(ValueError, match='height is 0'):
        letterbox_geometry(0, 10)
    with pytest.raises(ValueError, match='size is 0'):
        letterbox_geometry(10, 10, (640, 0))
