"""The stand-in's operators against mmcv's compiled ones, and against themselves on other devices and in half precision.

Run as a script, this prints the table of docs/openmmlab.md: the largest difference to the compiled operators.
"""
import copy
import importlib
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip('mmcv', reason='needs the extra [det] or [seg]')
pytest.importorskip('mmengine', reason='needs the extra [mm]')

from visionssm.openmmlab import mmcv_ops  # noqa: E402

Case = tuple[dict, tuple[str, ...]]
GEOMETRY = dict(kW=2, kH=3, dW=1, dH=2, padW=1, padH=2, dilationW=2, dilationH=1, group=2, deformable_group=3)
MODULATED = dict(kernel_h=3, kernel_w=2, stride_h=2, stride_w=1, pad_h=2, pad_w=1, dilation_h=1, dilation_w=2, group=2,
                 deformable_group=3)


def _boxes(count: int, extent: float = 40) -> torch.Tensor:
    corner = torch.rand(count, 2) * extent
    return torch.cat([corner, corner + 1 + torch.rand(count, 2) * extent / 2], dim=1)


def _overlaps() -> Iterator[Case]:
    for mode, aligned, offset in [(0, False, 0), (1, False, 1), (0, True, 1), (1, True, 0)]:
        shape = (13,) if aligned else (13, 9)
        yield dict(bboxes1=_boxes(13), bboxes2=_boxes(13 if aligned else 9), ious=torch.zeros(shape), mode=mode,
                   aligned=aligned, offset=offset), ('ious',)


def _suppressions() -> Iterator[Case]:
    for count, threshold, offset in [(0, 0.5, 0), (1, 0.5, 0), (301, 0.3, 0), (301, 0.6, 1)]:
        yield dict(boxes=_boxes(count), scores=torch.rand(count), iou_threshold=threshold, offset=offset), ()


def _soft_suppressions() -> Iterator[Case]:
    for method in range(3):
        for offset in range(2):
            yield dict(boxes=_boxes(57), scores=torch.rand(57), dets=torch.zeros(57, 5), iou_threshold=0.3, sigma=0.5,
                       min_score=0.2, method=method, offset=offset), ('dets',)


def _matches() -> Iterator[Case]:
    yield dict(dets=torch.cat([_boxes(83), torch.rand(83, 1)], dim=1), iou_threshold=0.4), ()


def _regions() -> torch.Tensor:
    boxes = torch.cat([_boxes(3, 50), torch.tensor([[-9., 20, 30, 99]])])  # the last one is outside in part
    return torch.cat([torch.tensor([[0.], [1], [1], [0]]), boxes], dim=1)


def _aligned(backward: bool) -> Iterator[Case]:
    for pool_mode, aligned, ratio in [(1, True, 0), (1, False, 0), (1, True, 2), (0, True, 2), (0, False, 0)]:
        features, regions = torch.randn(2, 3, 13, 17), _regions()
        common = dict(rois=regions, aligned_height=5, aligned_width=3, spatial_scale=0.25, sampling_ratio=ratio,
                      pool_mode=pool_mode, aligned=aligned)
        result = dict(argmax_y=torch.zeros(4, 3, 5, 3), argmax_x=torch.zeros(4, 3, 5, 3))
        output = torch.zeros(4, 3, 5, 3)
        names = ('output', 'argmax_y', 'argmax_x') if pool_mode == 0 else ('output',)
        if not backward:
            yield dict(input=features, output=output, **common, **result), names
            continue
        mmcv_ops_module().roi_align_forward(input=features, output=output, **common, **result)
        yield dict(grad_output=torch.randn(4, 3, 5, 3), grad_input=torch.zeros(2, 3, 13, 17), **common, **result), (
            'grad_input',)


def _pooled(backward: bool) -> Iterator[Case]:
    features, regions = torch.randn(2, 3, 13, 17), _regions()
    common = dict(rois=regions, argmax=torch.zeros(4, 3, 5, 3, dtype=torch.int32), pooled_height=5, pooled_width=3,
                  spatial_scale=0.25)
    output = torch.zeros(4, 3, 5, 3)
    if not backward:
        yield dict(input=features, output=output, **common), ('output', 'argmax')
    else:
        mmcv_ops_module().roi_pool_forward(input=features, output=output, **common)
        yield dict(grad_output=torch.randn(4, 3, 5, 3), grad_input=torch.zeros(2, 3, 13, 17), **common), ('grad_input',)


def _deformed(kind: str) -> Iterator[Case]:
    tensors = dict(input=torch.randn(2, 6, 9, 11), offset=torch.randn(2, 36, 6, 11) * 2, columns=torch.zeros(0))
    weight, grad = torch.randn(4, 3, 3, 2), torch.randn(2, 4, 6, 11)
    if kind == 'forward':
        yield dict(weight=weight, output=torch.zeros(2, 4, 6, 11), ones=torch.zeros(0), im2col_step=2, **tensors,
                   **GEOMETRY), ('output',)
    elif kind == 'input':
        yield dict(gradOutput=grad, gradInput=torch.zeros(2, 6, 9, 11), gradOffset=torch.zeros(2, 36, 6, 11),
                   weight=weight, im2col_step=2, **tensors, **GEOMETRY), ('gradInput', 'gradOffset')
    else:
        yield dict(gradOutput=grad, gradWeight=torch.randn(4, 3, 3, 2), ones=torch.zeros(0), scale=0.5, im2col_step=2,
                   **tensors, **GEOMETRY), ('gradWeight',)


def _modulated(backward: bool) -> Iterator[Case]:
    for with_bias in (True, False):
        tensors = dict(input=torch.randn(2, 6, 9, 11), weight=torch.randn(4, 3, 3, 2),
                       bias=torch.randn(4 if with_bias else 0), offset=torch.randn(2, 36, 6, 11) * 2,
                       mask=torch.rand(2, 18, 6, 11))
        common = dict(ones=torch.zeros(0), columns=torch.zeros(0), with_bias=with_bias, **tensors, **MODULATED)
        if backward:
            grads = {f'grad_{name}': torch.zeros_like(tensor) for name, tensor in tensors.items()}
            yield dict(grad_output=torch.randn(2, 4, 6, 11), **common, **grads), tuple(grads)
        else:
            yield dict(output=torch.zeros(2, 4, 6, 11), **common), ('output',)


def _masked(backward: bool) -> Iterator[Case]:
    for psa_type in range(2):
        common = dict(psa_type=psa_type, num_=2, h_feature=4, w_feature=6, h_mask=5, w_mask=3, half_h_mask=2,
                      half_w_mask=1)
        maps, masks = torch.randn(2, 24, 4, 6), torch.randn(2, 15, 4, 6)
        if backward:
            yield dict(grad_output=maps, grad_input=torch.zeros_like(masks), **common), ('grad_input',)
        else:
            yield dict(input=masks, output=torch.zeros_like(maps), **common), ('output',)


def _focal(kind: str, backward: bool) -> Iterator[Case]:
    for weight in (torch.zeros(0), torch.rand(5)):
        logits, target = torch.randn(11, 5) * 3, torch.randint(5, (11,))
        common = dict(input=logits.softmax(1) if kind == 'softmax' else logits, target=target, weight=weight, gamma=2.0,
                      alpha=0.25)
        if backward:
            buffer = dict(buff=torch.zeros(11)) if kind == 'softmax' else {}
            yield dict(grad_input=torch.zeros(11, 5), **common, **buffer), ('grad_input',)
        else:
            yield dict(output=torch.zeros(11, *(() if kind == 'softmax' else (5,))), **common), ('output',)


def _attention(backward: bool) -> Iterator[Case]:
    common = dict(value=torch.randn(2, 26, 3, 4), value_spatial_shapes=torch.tensor([[4, 5], [2, 3]]),
                  value_level_start_index=torch.tensor([0, 20]), sampling_locations=torch.rand(2, 7, 3, 2, 4, 2) * 1.2,
                  attention_weights=torch.rand(2, 7, 3, 2, 4), im2col_step=64)
    if backward:
        yield dict(grad_output=torch.randn(2, 7, 12), grad_value=torch.zeros(2, 26, 3, 4),
                   grad_sampling_loc=torch.zeros(2, 7, 3, 2, 4, 2), grad_attn_weight=torch.zeros(2, 7, 3, 2, 4),
                   **common), ('grad_value', 'grad_sampling_loc', 'grad_attn_weight')
    else:
        yield common, ()


def _reassembled(backward: bool) -> Iterator[Case]:
    features, masks = torch.randn(2, 6, 4, 5), torch.rand(2, 18, 8, 10)
    common = dict(masks=masks, features=features, kernel_size=3, group_size=2, scale_factor=2)
    if backward:
        yield dict(top_grad=torch.randn(2, 6, 8, 10), bottom_grad=torch.zeros_like(features),
                   mask_grad=torch.zeros_like(masks), **common), ('bottom_grad', 'mask_grad')
    else:
        yield dict(output=torch.zeros(2, 6, 8, 10), **common), ('output',)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    'bbox_overlaps': _overlaps, 'nms': _suppressions, 'softnms': _soft_suppressions, 'nms_match': _matches,
    'roi_align_forward': lambda: _aligned(False), 'roi_align_backward': lambda: _aligned(True),
    'roi_pool_forward': lambda: _pooled(False), 'roi_pool_backward': lambda: _pooled(True),
    'deform_conv_forward': lambda: _deformed('forward'), 'deform_conv_backward_input': lambda: _deformed('input'),
    'deform_conv_backward_parameters': lambda: _deformed('parameters'),
    'modulated_deform_conv_forward': lambda: _modulated(False),
    'modulated_deform_conv_backward': lambda: _modulated(True),
    'psamask_forward': lambda: _masked(False), 'psamask_backward': lambda: _masked(True),
    'sigmoid_focal_loss_forward': lambda: _focal('sigmoid', False),
    'sigmoid_focal_loss_backward': lambda: _focal('sigmoid', True),
    'softmax_focal_loss_forward': lambda: _focal('softmax', False),
    'softmax_focal_loss_backward': lambda: _focal('softmax', True),
    'ms_deform_attn_forward': lambda: _attention(False), 'ms_deform_attn_backward': lambda: _attention(True),
    'carafe_naive_forward': lambda: _reassembled(False), 'carafe_naive_backward': lambda: _reassembled(True),
}


def mmcv_ops_module():
    """The stand-in's operators as attributes."""
    module = importlib.import_module('visionssm.openmmlab._mmcv_ops')
    return type('Operators', (), {name: staticmethod(function) for name, function in module.OPERATORS.items()})


def _call(module, name: str, case: Case, dtype: torch.dtype, device: str = 'cpu') -> list:
    """What the operator returns and what it leaves in its result arguments, in double precision."""
    def convert(value):
        if not isinstance(value, torch.Tensor):
            return copy.deepcopy(value)
        return value.clone().to(device, dtype if value.is_floating_point() else value.dtype)

    arguments = {key: convert(value) for key, value in case[0].items()}
    returned = getattr(module, name)(**arguments)
    values = [returned] * (returned is not None) + [arguments[key] for key in case[1]]
    return [value.double().cpu() if isinstance(value, torch.Tensor) else value for value in values]


def _difference(left: list, right: list) -> float:
    """Largest difference relative to the largest value, or 1 where it is smaller; infinite where results do not fit."""
    worst = 0.0
    for one, other in zip(left, right, strict=True):
        if not isinstance(one, torch.Tensor):
            worst = max(worst, 0.0 if one == other else float('inf'))
        elif one.shape != other.shape or one.isnan().any() != other.isnan().any():
            return float('inf')
        elif one.numel():
            worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp(min=1)))
    return worst


def compare(compiled, name: str, dtype: torch.dtype, device: str = 'cpu') -> float | None:
    """Largest difference between the compiled operator and ours; none where the compiled one cannot run."""
    torch.manual_seed(1)
    worst = 0.0
    for case in CASES[name]():
        try:
            expected = _call(compiled, name, case, dtype, device)
        except RuntimeError as error:
            if any(reason in str(error) for reason in ('not compiled', 'implementation for device', 'not implemented',
                                                       'expected scalar type')):
                return None
            raise
        worst = max(worst, _difference(_call(mmcv_ops_module(), name, case, dtype, device), expected))
    return worst


def _compiled():
    if mmcv_ops.is_stand_in():
        pytest.skip('mmcv has no compiled operators here (docs/openmmlab.md says how to build them)')
    return importlib.import_module('mmcv._ext')


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('name', CASES)
def test_operators_equal_the_compiled_ones(name, dtype):
    difference = compare(_compiled(), name, dtype)
    if difference is None:
        pytest.skip(f'the compiled {name} takes no {dtype} on this device')
    assert difference < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize('name', CASES)
def test_half_precision_is_computed_in_single(name):
    ours = mmcv_ops_module()
    for case in CASES[name]():
        rounded = ({key: value.bfloat16().float() if isinstance(value, torch.Tensor) and value.is_floating_point()
                    else value for key, value in case[0].items()}, case[1])
        half, single = (_call(ours, name, rounded, dtype) for dtype in (torch.bfloat16, torch.float32))
        assert _difference(half, single) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', CASES)
def test_operators_agree_on_the_gpu_and_the_cpu(name):
    ours = mmcv_ops_module()
    for case in CASES[name]():
        there, here = (_call(ours, name, case, torch.float32, device) for device in ('cuda', 'cpu'))
        assert _difference(there, here) < 1e-4


if __name__ == '__main__':
    extension = importlib.import_module('mmcv._ext')
    assert not mmcv_ops.is_stand_in(), 'mmcv has no compiled operators here'
    for operator in CASES:
        results = [compare(extension, operator, dtype) for dtype in (torch.float32, torch.float64)]
        print('| `{}` | {} |'.format(operator, ' | '.join('-' if r is None else f'{r:.1e}' for r in results)))
