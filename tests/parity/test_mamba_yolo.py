"""What Mamba-YOLO alone must equal: maps inside, training mode, losses, assignment, suppression, files."""
import pytest
import torch
from torch import nn

import visionssm
from visionssm.detection import (
    Letterbox,
    TaskAlignedAssigner,
    YOLOLoss,
    box_ciou,
    letterbox_geometry,
    non_max_suppression,
    read_ultralytics,
)
from visionssm.detection.blocks import (
    GatedConvMlp,
    LocalBlock,
    MambaYOLOBlock,
    MergeConv,
    PyramidPool,
    YOLOStem,
    fold_norms,
)
from visionssm.detection.boxes import boxes_around, make_anchors
from visionssm.detection.losses import distribution_focal_loss
from visionssm.layers import SS2D
from visionssm.models._official import find_official, translate_key

FAMILY = 'mamba_yolo'


def build(golden) -> nn.Module:
    return visionssm.from_official(FAMILY, golden.state_dict, golden.meta['config'])


def only(table, case: str):
    """The table if it is the one that a test is about."""
    if not table.meta['case'].startswith(case):
        pytest.skip('a table of something else')
    return table.tensors, table.meta


def objects(tensors: dict[str, torch.Tensor], prefix: str = '') -> torch.Tensor:
    parts = [tensors[f'{prefix}targets.{name}'] for name in ('batch_idx', 'cls', 'bboxes')]
    return torch.cat([parts[0][:, None], *parts[1:]], dim=1)


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def test_maps_inside_match(golden):
    model, tensors = build(golden).eval(), golden.tensors
    found: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda module, args, out: found.update({name: out})

    for i, name in enumerate(('backbone.stem', 'backbone.stages.0', 'backbone.stages.3', 'neck.down_blocks.0',
                              'neck.down_blocks.1', 'neck.up_blocks.0', 'neck.up_blocks.1')):
        model.get_submodule(name).register_forward_hook(keep(f'layer.{(0, 1, 7, 11, 14, 17, 20)[i]}'))
    with torch.no_grad():
        raw = model.forward_raw(tensors['input'])
        features = model.backbone(tensors['input'])
    found |= {f'feature.{i}': out for i, out in enumerate(features)}
    assert found.keys() == {key for key in tensors if key.startswith(('layer.', 'feature.'))}
    for key, value in found.items():
        torch.testing.assert_close(value, tensors[key], rtol=1e-4, atol=1e-4)
    for i, value in enumerate(raw):
        assert (value - tensors[f'raw.{i}']).abs().max() <= golden.meta['tolerance']['abs_raw']


def test_boxes_and_scores_match_each_in_its_bound(golden):
    with torch.no_grad():
        out = build(golden).eval()(golden.tensors['input'])
    gap = (out - golden.tensors['output64']).abs()
    assert gap[:, :4].max() <= golden.meta['tolerance']['abs_boxes_px']
    assert gap[:, 4:].max() <= golden.meta['tolerance']['abs_scores']


def test_training_mode_matches(golden):
    tensors, bounds = golden.tensors, golden.meta['tolerance']
    if 'train.loss' not in tensors:
        pytest.skip('a fixture of the evaluation mode')
    model = build(golden).train()
    raw = model(tensors['input'])
    for i, value in enumerate(raw):
        assert (value - tensors[f'train.raw.{i}']).abs().max() <= bounds['train_abs_raw']
    items = torch.stack(list(YOLOLoss(model.num_classes)(raw, objects(tensors, 'train.')).values()))
    assert relative(items, tensors['train.loss_items']) <= bounds['train_rel_items']
    total = items.sum() * len(raw[0])
    assert relative(total, tensors['train.loss']) <= bounds['train_rel_items']
    total.backward()
    names = find_official(FAMILY).keys('DetectionModel')
    state, parameters = model.state_dict(), dict(model.named_parameters())
    buffers, grads = golden.part('train.buffer_after.'), golden.part('train.grad.')
    assert len(buffers) > 3 and len(grads) > 5
    for key, value in buffers.items():
        torch.testing.assert_close(state[translate_key(key, names)], value, rtol=1e-4, atol=1e-5)
    for key, value in grads.items():
        ours = parameters[translate_key(key, names)].grad.view_as(value)
        assert relative(ours, value) <= bounds['train_rel_grad'], key


# Modules of ours for the official ones, and the rows that a block has in the table of keys.
BLOCKS = {
    'ss2d': (lambda: SS2D(20, 16, 2, act='gelu', gate='act'), 'model.11.ss2d.0.', 'neck.down_blocks.0.mixers.0.'),
    'ss2d_noz': (lambda: SS2D(12, 4, 2, act='gelu'), 'model.11.ss2d.0.', 'neck.down_blocks.0.mixers.0.'),
    'lsblock': (lambda: LocalBlock(14), 'model.11.lsblock.', 'neck.down_blocks.0.local.'),
    'rgblock': (lambda: GatedConvMlp(10), 'model.11.mlp.', 'neck.down_blocks.0.mlp.'),
    'vssblock': (lambda: MambaYOLOBlock(12, 20), 'model.1.', 'backbone.stages.0.blocks.0.'),
    'xssblock_proj_n2': (lambda: MambaYOLOBlock(24, 16, 2, proj_bias=False), 'model.11.', 'neck.down_blocks.0.'),
    'xssblock_same_n1': (lambda: MambaYOLOBlock(16, 16, proj_bias=False), 'model.11.', 'neck.down_blocks.0.'),
    'simplestem': (lambda: YOLOStem(3, 16), 'model.0.', 'backbone.stem.'),
    'visioncluemerge': (lambda: MergeConv(8, 12), 'model.2.', 'backbone.stages.1.downsample.'),
    'sppf': (lambda: PyramidPool(12, 20), 'model.8.', 'backbone.pool.'),
}


def check_module(module: nn.Module, tag: str, own, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    weights = {own(k.removeprefix('state_dict.')): v for k, v in tensors.items() if k.startswith('state_dict.')}
    module.load_state_dict({key: value.view(shapes[key]) for key, value in weights.items()})
    x = tensors['input'].clone().requires_grad_()
    out = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if isinstance(module, SS2D) else module(x)
    assert (out - tensors['output64']).abs().max() <= meta['tolerance'][tag]['abs'], tag
    (out * tensors['loss_weight']).sum().backward()
    grads = {'input': x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}
    for key in (key.removeprefix('grad.') for key in tensors if key.startswith('grad.')):
        value = tensors[f'grad.{key}']
        grad = grads[key if key == 'input' else own(key)]
        assert relative(grad.view_as(value), value) <= float(meta['grad_rtol']), (tag, key)


def test_modules_match(table):
    only(table, 'blocks')
    names = find_official(FAMILY).keys('DetectionModel')
    for tag, (make, theirs, ours) in BLOCKS.items():
        def own(key: str, theirs: str = theirs, ours: str = ours) -> str:
            return translate_key(theirs + key, names).removeprefix(ours)

        check_module(make().eval(), tag, own, table.part(f'{tag}.'), table.meta)


def test_losses_match_in_values_and_gradients(table):
    tensors, meta = only(table, 'loss')
    raw = [tensors[f'raw.{i}'].clone().requires_grad_() for i in range(3)]
    items = torch.stack(list(YOLOLoss(meta['config']['nc'])(raw, objects(tensors)).values()))
    torch.testing.assert_close(items, tensors['loss.items'], rtol=meta['tolerance']['rel_items'], atol=1e-6)
    units = YOLOLoss(meta['config']['nc'], box=1., cls=1., dfl=1.)(raw, objects(tensors))
    torch.testing.assert_close(torch.stack(list(units.values())), tensors['loss.items_unit_gain'], rtol=1e-5, atol=1e-6)
    total = items.sum() * len(raw[0])
    torch.testing.assert_close(total[None], tensors['loss.total'], rtol=1e-5, atol=1e-5)
    total.backward()
    for i, level in enumerate(raw):
        assert (level.grad - tensors[f'grad.raw.{i}']).abs().max() <= meta['tolerance']['abs_grad']


def test_assignment_matches(table):
    tensors, meta = only(table, 'loss')
    given = {key.removeprefix('assigner.in.'): value for key, value in tensors.items() if '.in.' in key}
    found = TaskAlignedAssigner()(
        given['scores'], given['boxes_xyxy_px'], given['anchors_px'], given['gt_labels'][..., 0].long(),
        given['gt_boxes_px'], given['mask_gt'][..., 0].bool())
    expected = {key.removeprefix('assigner.out.'): value for key, value in tensors.items() if '.out.' in key}
    torch.testing.assert_close(found.scores, expected['target_scores'], rtol=1e-5, atol=1e-6)
    sure = expected['target_scores'].sum(2) > 0
    assert torch.equal(found.positive[sure], expected['fg_mask'].bool()[sure])
    if not meta['config']['ambiguous_zero_metric_anchors']:
        assert torch.equal(found.positive, expected['fg_mask'].bool())
    for ours, name in ((found.index, 'target_gt_idx'), (found.labels, 'target_labels'),
                       (found.boxes, 'target_bboxes_px')):
        assert torch.equal(ours[sure], expected[name].to(ours.dtype)[sure])


def test_box_arithmetic_matches(table):
    tensors, _ = only(table, 'box_ops')
    box = tensors['box1'].clone().requires_grad_()
    ciou = box_ciou(box, tensors['box2'])
    torch.testing.assert_close(ciou, tensors['CIoU'][:, 0], rtol=0, atol=1e-6)
    ciou.sum().backward()
    torch.testing.assert_close(box.grad, tensors['grad.CIoU'], rtol=1e-5, atol=1e-6)
    logits = tensors['dfloss.logits'].clone().requires_grad_()
    loss = distribution_focal_loss(logits.view(-1, 4, 16), tensors['dfloss.target']).mean(1, keepdim=True)
    torch.testing.assert_close(loss, tensors['dfloss.out'], rtol=1e-6, atol=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, tensors['dfloss.grad'], rtol=1e-5, atol=1e-6)


def test_anchors_and_expected_distances_match(table):
    tensors, _ = only(table, 'box_ops')
    counts = [int((tensors['anchor_strides'] == stride).sum()) for stride in (8, 16, 32)]
    last = [tensors['anchors'][end - 1] + 0.5 for end in (counts[0], counts[0] + counts[1], sum(counts))]
    maps = [torch.zeros(1, 1, int(y), int(x)) for x, y in last]
    anchors, strides = make_anchors(maps, (8, 16, 32))
    assert torch.equal(anchors, tensors['anchors']) and torch.equal(strides, tensors['anchor_strides'])
    logits = tensors['dfl.in'].transpose(1, 2).unflatten(2, (4, 16))
    left, top, right, bottom = tensors['dfl.out'].unbind(1)
    x, y = anchors.T
    expected = torch.stack([x - left, y - top, x + right, y + bottom], dim=2)
    torch.testing.assert_close(boxes_around(anchors, logits), expected, rtol=1e-5, atol=1e-5)


def test_suppression_matches(table):
    tensors, meta = only(table, 'nms_map')
    names = {'conf_thres': 'score_threshold', 'iou_thres': 'iou_threshold', 'max_det': 'max_detections',
             'max_nms': 'max_candidates'}
    for setting, options in meta['config']['settings'].items():
        found = non_max_suppression(tensors['pred'], **{names.get(key, key): value for key, value in options.items()})
        for i, rows in enumerate(found):
            torch.testing.assert_close(rows, tensors[f'{setting}.{i}'], rtol=0, atol=1e-6)


def test_letterbox_geometry_matches(table):
    tensors, meta = only(table, 'letterbox')
    for i, case in meta['config'].items():
        frame = letterbox_geometry(
            *case['hw'], tuple(case['new_shape']), minimal=case.get('auto', False),
            stretch=case.get('scaleFill', False), scale_up=case.get('scaleup', True))
        assert frame.size == tuple(case['out'][:2])
        if not case.get('scaleFill'):
            left, top, right, bottom = frame.pads
            out = tensors[f'{i}.out']
            filled = (out != 114).any(-1)
            assert not filled[:top].any() and not filled[:, :left].any() and filled[top].any()
            assert not filled[len(out) - bottom:].any() and filled[:, left].any()
        # The official function knows only the two sizes and so guesses the pads, which may be off by a pixel.
        (height, width), (down, across) = case['hw'], frame.size
        factor = min(down / height, across / width)
        guess = [round((across - width * factor) / 2 - 0.1), round((down - height * factor) / 2 - 0.1)]
        official = Letterbox((height, width), frame.resized, (*guess, *guess), (factor, factor))
        torch.testing.assert_close(
            official.back(tensors[f'{i}.boxes_in']), tensors[f'{i}.boxes_scaled_back'], rtol=0, atol=1e-3)


def test_files_of_the_official_training_load(op_golden):
    found = read_ultralytics(op_golden.path.with_name('ckpt_best_tiny_ultralytics.pt'))
    assert found['names'] == {int(key): name for key, name in op_golden.meta['config']['names'].items()}
    assert found['nc'] == 4
    assert found['state_dict'].keys() == op_golden.state_dict.keys()
    assert all(torch.equal(found['state_dict'][key], value) for key, value in op_golden.state_dict.items())
    model = visionssm.from_official(FAMILY, found['state_dict']).eval()
    x, tensors = op_golden.tensors['input'], op_golden.tensors
    with torch.no_grad():
        for name, run in (('output', model), ('output_fused', model.fuse())):
            gap = (run(x) - tensors[name]).abs()
            assert gap[:, :4].max() <= op_golden.meta['tolerance']['abs_boxes_px']
            assert gap[:, 4:].max() <= op_golden.meta['tolerance']['abs_scores']


def test_folding_reaches_every_norm(golden):
    model = build(golden).eval()
    with torch.no_grad():
        expected = model(golden.tensors['input'])
        fold_norms(model)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert (model(golden.tensors['input']) - expected).abs().max() <= float(golden.meta['atol'])
