"""The stand-in for mmcv's compiled operators: when it is found, what it refuses, what its operators compute."""
import importlib
import sys

import pytest

pytest.importorskip('mmcv', reason='needs the extra [det] or [seg]')
pytest.importorskip('mmengine', reason='needs the extra [mm]')

import torch  # noqa: E402
from torch.autograd import gradcheck  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from visionssm.openmmlab import mmcv_ops  # noqa: E402

ops = pytest.importorskip('mmcv.ops')
stand_in = pytest.mark.skipif(not mmcv_ops.is_stand_in(),
                              reason='mmcv has compiled operators here, which lack this on a CPU')


def _double(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def _boxes(count):
    corner = torch.rand(count, 2) * 40
    return torch.cat([corner, corner + 1 + torch.rand(count, 2) * 20], dim=1)


def _iou(a, b, offset=0):
    width, height = (max(0.0, float(min(a[i + 2], b[i + 2]) - max(a[i], b[i])) + offset) for i in range(2))
    areas = [float(box[2] - box[0] + offset) * float(box[3] - box[1] + offset) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def _bilinear(image, y, x):
    """Value of image (H, W) at a place; outside it falls to 0 over one pixel."""
    total = 0
    for row in (int(y // 1), int(y // 1) + 1):
        for column in (int(x // 1), int(x // 1) + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                total = total + image[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


# --- the finder


def test_importing_the_package_installs_one_finder_at_the_end_and_no_mmcv(run_python):
    code = """if True:
        import importlib, sys
        import visionssm.openmmlab.mmcv_ops as module
        importlib.reload(module)
        module.install_finder()
        finders = [type(finder).__name__ for finder in sys.meta_path]
        assert finders.count('StandInFinder') == 1, finders
        assert finders.index('StandInFinder') > sys.meta_path.index(importlib.machinery.PathFinder)
        assert not {'mmcv.ops', 'mmcv._ext'} & set(sys.modules)
        import mmcv.ops
        assert 'mmcv._ext' in sys.modules
    """
    done = run_python('-c', code)
    assert done.returncode == 0, done.stderr


def test_scripts_that_need_mmcv_ops_run_through_the_package(run_python, tmp_path):
    (tmp_path / 'helper.py').write_text('import mmcv.ops\n')
    script = tmp_path / 'script.py'
    script.write_text('import sys, helper\nassert __name__ == "__main__" and sys.argv[1:] == ["--flag"]\n')
    done = run_python('-m', 'visionssm.openmmlab', str(script), '--flag')
    assert done.returncode == 0, done.stderr


def test_a_missing_script_is_named(monkeypatch):
    main = importlib.import_module('visionssm.openmmlab.__main__').main
    monkeypatch.setattr(sys, 'argv', ['visionssm.openmmlab', 'missing.py'])
    with pytest.raises(SystemExit, match='usage: .*\nmissing.py is no file'):
        main()


def test_finder_answers_for_one_name_only():
    finder = mmcv_ops.StandInFinder()
    assert finder.find_spec('mmcv._ext').name == 'mmcv._ext'
    for name in ('mmcv', 'mmcv.ops', 'mmcv._ext2', '_ext', 'other._ext'):
        assert finder.find_spec(name) is None


def test_a_compiled_module_wins(tmp_path, monkeypatch):
    (tmp_path / '_ext.py').write_text('compiled = True\n')
    monkeypatch.setattr(importlib.import_module('mmcv'), '__path__', [str(tmp_path)])
    monkeypatch.delitem(sys.modules, 'mmcv._ext')
    assert importlib.import_module('mmcv._ext').compiled
    assert not mmcv_ops.is_stand_in()


@stand_in
def test_refused_operators_can_be_looked_up_and_say_what_to_do():
    extension = importlib.import_module('mmcv._ext')
    assert hasattr(extension, 'upfirdn2d') and not hasattr(extension, '__path__') and not hasattr(extension, '_private')
    with pytest.raises(NotImplementedError, match=r"'box_iou_rotated'.*--no-build-isolation.*onedl-mmcv"):
        ops.box_iou_rotated(torch.rand(2, 5), torch.rand(2, 5))


@stand_in
def test_environment_reports_name_the_stand_in():
    from mmcv.utils import collect_env
    from mmcv.utils.ext_loader import check_ops_exist
    report = collect_env()
    assert 'visionssm' in report['MMCV Compiler'] and report['MMCV CUDA Compiler'] == 'not available'
    if sys.version_info < (3, 14):
        assert check_ops_exist()


# --- the operators, by mmcv's public functions


@pytest.mark.parametrize('offset', [0, 1])
def test_nms_keeps_what_a_loop_keeps(offset):
    boxes, scores = _boxes(60), torch.rand(60)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(_iou(boxes[i], boxes[j], offset) <= 0.4 for j in kept):
            kept.append(i)
    dets, found = ops.nms(boxes, scores, 0.4, offset=offset)
    assert found.tolist() == kept
    torch.testing.assert_close(dets, torch.cat([boxes[kept], scores[kept, None]], dim=1))


def test_nms_of_an_overlap_at_the_threshold_keeps_both():
    boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 3]])
    assert ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.3)[1].tolist() == [0, 1]
    assert len(ops.nms(boxes.new_zeros(0, 4), boxes.new_zeros(0), 0.3)[1]) == 0


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms_equals_a_loop(method):
    boxes, scores = _boxes(30), torch.rand(30)
    left, rest, expected = list(range(30)), scores.tolist(), []
    while left:
        best = max(left, key=lambda i: rest[i])
        expected.append((best, rest[best]))
        left.remove(best)
        for i in left:
            overlap = _iou(boxes[best], boxes[i])
            factor = {'naive': 0.0, 'linear': 1 - overlap}.get(method) if overlap >= 0.3 else 1.0
            rest[i] *= float(torch.exp(torch.tensor(-overlap ** 2 / 0.5))) if method == 'gaussian' else factor
        left = [i for i in left if rest[i] >= 0.1]
    dets, found = ops.soft_nms(boxes, scores, 0.3, 0.5, 0.1, method)
    assert found.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected]))
    torch.testing.assert_close(dets[:, :4], boxes[found])


def test_nms_match_groups_every_box_once():
    dets = torch.cat([_boxes(50), torch.rand(50, 1)], dim=1)
    groups = ops.nms_match(dets, 0.3)
    assert sorted(int(i) for group in groups for i in group) == list(range(50))
    for group in groups:
        assert all(_iou(dets[group[0]], dets[i]) >= 0.3 for i in group[1:])
        assert dets[group, 4].tolist() == sorted(dets[group, 4].tolist(), reverse=True)


def test_overlaps_by_union_and_by_the_first_area():
    a, b = _boxes(7), _boxes(5)
    expected = torch.tensor([[_iou(x, y, 1) for y in b] for x in a])
    torch.testing.assert_close(ops.bbox_overlaps(a, b, offset=1), expected)
    shared = torch.tensor([[0., 0, 2, 2]]), torch.tensor([[1., 0, 9, 9]])
    assert ops.bbox_overlaps(*shared, mode='iof').item() == 0.5
    assert ops.bbox_overlaps(*shared, aligned=True).tolist() == [pytest.approx(2 / (4 + 72 - 2))]


@pytest.mark.parametrize('mode', ['avg', 'max'])
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align_samples_bins(mode, ratio):
    features = _double(1, 2, 9, 8)
    rois = torch.tensor([[0., 3, 5, 20, 29]], dtype=torch.float64)
    output = ops.roi_align(features, rois, (2, 3), 0.25, ratio, mode, True)
    y0, x0, height, width = 5 / 4 - 0.5, 3 / 4 - 0.5, 24 / 4 / 2, 17 / 4 / 3
    rows, columns = (ratio, ratio) if ratio else (3, 2)
    y = [[y0 + height * (i + (u + 0.5) / rows) for u in range(rows)] for i in range(2)]
    x = [[x0 + width * (j + (v + 0.5) / columns) for v in range(columns)] for j in range(3)]
    samples = torch.tensor([[[[_bilinear(channel, v, u) for v in y[i] for u in x[j]] for j in range(3)]
                             for i in range(2)] for channel in features[0]])
    expected = samples.mean(-1) if mode == 'avg' else samples.amax(-1)
    torch.testing.assert_close(output[0], expected.double())
    assert gradcheck(lambda features: ops.roi_align(features, rois, (2, 3), 0.25, ratio, mode, True), features)


@stand_in
def test_roi_pool_takes_the_first_largest_pixel_of_each_bin():
    features = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    features[0, 0, 1, 4], features[0, 0, 4, 0] = 3, 2
    features.requires_grad_()
    rois = torch.tensor([[0., 0, 0, 5, 5], [0, 3, 3, 5, 5], [0, 9, 9, 11, 11]], dtype=torch.float64)
    output = ops.roi_pool(features, rois, (2, 2), 1.0)
    assert output[:, 0].tolist() == [[[0, 3], [2, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    grad, = torch.autograd.grad(output.sum(), features)
    assert grad[0, 0, 1, 4] == 1 and grad[0, 0, 4, 0] == 1 and grad[0, 0, 0, 0] == 1 and grad.sum() == 8
    features = _double(1, 2, 4, 5)
    assert gradcheck(lambda features: ops.roi_pool(features, rois, (3, 2), 0.5), features)


def test_deformable_convolution_without_offsets_is_a_convolution():
    features, weight = _double(2, 4, 6, 7), _double(6, 2, 3, 3)
    offset = torch.zeros(2, 36, 6, 7, dtype=torch.float64)
    expected = F.conv2d(features, weight, padding=1, groups=2)
    torch.testing.assert_close(ops.deform_conv2d(features, offset, weight, 1, 1, 1, 2, 2), expected)
    mask, bias = torch.full((2, 18, 6, 7), 0.5, dtype=torch.float64), _double(6)
    modulated = ops.modulated_deform_conv2d(features, offset, mask, weight, bias, 1, 1, 1, 2, 2)
    torch.testing.assert_close(modulated, expected / 2 + bias[:, None, None])


def test_deformable_convolutions_shift_their_samples_and_have_gradients():
    features, weight = _double(1, 2, 4, 5), _double(2, 2, 1, 2)
    offset = _double(1, 4, 4, 4)
    output = ops.deform_conv2d(features, offset, weight)
    expected = sum(weight[1, c, 0, tap] * _bilinear(features[0, c], 2 + offset[0, 2 * tap, 2, 1],
                                                    1 + tap + offset[0, 2 * tap + 1, 2, 1])
                   for c in range(2) for tap in range(2))
    torch.testing.assert_close(output[0, 1, 2, 1], expected)
    assert gradcheck(ops.deform_conv2d, (features, offset, weight))
    assert gradcheck(ops.modulated_deform_conv2d, (features, offset, _double(1, 2, 4, 4), weight, _double(2)))


@stand_in
def test_masked_convolution_fills_chosen_pixels():
    convolution, image = ops.MaskedConv2d(3, 4, 3, padding=1), torch.randn(1, 3, 6, 7)
    mask = torch.rand(1, 6, 7) > 0.5
    torch.testing.assert_close(convolution(image, mask), convolution(image) * mask)


def test_sampled_attention_equals_a_loop_and_has_gradients():
    function = importlib.import_module('mmcv.ops.multi_scale_deform_attn').MultiScaleDeformableAttnFunction.apply
    shapes, starts = torch.tensor([[3, 4], [2, 2]]), torch.tensor([0, 12])
    value, weights = _double(1, 16, 2, 3), _double(1, 2, 2, 2, 2)
    places = torch.rand(1, 2, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    if mmcv_ops.is_stand_in():
        expected = 0
        for level, (height, width) in enumerate(shapes.tolist()):
            image = value[0, starts[level]:starts[level] + height * width, 1, 2].reshape(height, width)
            for point in range(2):
                x, y = places[0, 0, 1, level, point]
                expected = expected + weights[0, 0, 1, level, point] * _bilinear(
                    image, y * height - 0.5, x * width - 0.5)
        torch.testing.assert_close(function(value, shapes, starts, places, weights, 64)[0, 0, 5], expected)
        assert gradcheck(lambda *tensors: function(tensors[0], shapes, starts, *tensors[1:], 64),
                         (value, places, weights))


@stand_in
@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_focal_losses_equal_their_definitions_and_stay_finite(gamma):
    logits, target = _double(9, 4), torch.randint(5, (9,))
    hot = F.one_hot(target, 5)[:, :4].double()
    p = logits.sigmoid()
    expected = -(0.3 * hot * (1 - p) ** gamma * p.log() + 0.7 * (1 - hot) * p ** gamma * (1 - p).log())
    torch.testing.assert_close(ops.sigmoid_focal_loss(logits, target, gamma, 0.3, None, 'none'), expected)
    assert gradcheck(lambda logits: ops.sigmoid_focal_loss(logits, target, gamma, 0.3, None, 'none'), logits)
    target, weight = target.clamp(max=3), torch.rand(4, dtype=torch.float64)
    log_p = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    expected = -0.3 * (1 - log_p.exp()) ** gamma * log_p * weight[target]
    torch.testing.assert_close(ops.softmax_focal_loss(logits, target, gamma, 0.3, weight, 'sum'), expected.sum())
    assert gradcheck(lambda logits: ops.softmax_focal_loss(logits, target, gamma, 0.3, weight, 'sum'), logits)
    extreme = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    for loss in (ops.sigmoid_focal_loss, ops.softmax_focal_loss):
        value = loss(extreme, torch.tensor([0, 0]), gamma, 0.25, None, 'sum')
        assert torch.isfinite(value) and torch.isfinite(torch.autograd.grad(value, extreme)[0]).all()


def test_attention_masks_collect_and_distribute():
    module = importlib.import_module('mmcv.ops.psa_mask')
    masks = _double(1, 15, 3, 4)  # 5 x 3 around each of 3 x 4 pixels
    collected, distributed = (module.psa_mask(masks, kind, (5, 3)) for kind in (0, 1))
    for y, x, v, u in [(0, 0, 2, 1), (2, 3, 0, 2), (1, 1, 1, 1), (0, 0, 0, 3)]:
        row, column = v - y + 2, u - x + 1
        expected = masks[0, row * 3 + column, y, x] if 0 <= row < 5 and 0 <= column < 3 else masks.new_zeros(())
        assert collected[0, v * 4 + u, y, x] == expected and distributed[0, y * 4 + x, v, u] == expected
    assert all(gradcheck(lambda masks, kind=kind: module.psa_mask(masks, kind, (5, 3)), masks) for kind in (0, 1))


@stand_in
def test_reassembly_weighs_neighbourhoods():
    features, masks = _double(1, 4, 3, 1), _double(1, 18, 6, 2)
    output = ops.carafe(features, masks, 3, 2, 2)
    expected = sum(masks[0, 9 + 3 * dy + dx, 5, 1] * F.pad(features, [1] * 4)[0, 3, 2 + dy, 0 + dx]
                   for dy in range(3) for dx in range(3))
    torch.testing.assert_close(output[0, 3, 5, 1], expected)
    torch.testing.assert_close(ops.carafe_naive(features, masks, 3, 2, 2), output)
    assert gradcheck(lambda features, masks: ops.carafe(features, masks, 3, 2, 2), (features, masks))
