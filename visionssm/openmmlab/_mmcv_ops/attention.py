"""Attention and upsampling by sampled or reassembled neighbourhoods."""
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import widened

__all__ = [
    'carafe_backward', 'carafe_forward', 'carafe_naive_backward', 'carafe_naive_forward', 'ms_deform_attn_backward',
    'ms_deform_attn_forward', 'psamask_backward', 'psamask_forward']


def _write_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_output: Tensor,
                     targets: tuple[Tensor, ...]) -> None:
    """Compute the function again and write its gradients by the inputs into the targets."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        grads = torch.autograd.grad(function(*leaves), leaves, grad_output)
    for target, grad in zip(targets, grads):
        target.copy_(grad)


def _sampled_attention(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """mmcv's definition of the operator, by `grid_sample`."""
    definition = importlib.import_module('mmcv.ops.multi_scale_deform_attn').multi_scale_deformable_attn_pytorch
    # As numbers, because each use of a size on an accelerator would wait for it.
    return definition(value, shapes.tolist(), locations, weights)


def ms_deform_attn_forward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                           sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int) -> Tensor:
    """Multi-scale deformable attention: sums of bilinear samples of several feature maps.

    Args:
        value: Pixels (B, sum of H * W, heads, C) of all maps.
        value_spatial_shapes: Sizes (levels, 2) of the maps.
        value_level_start_index: First pixel (levels,) of each map; not used.
        sampling_locations: Places (B, queries, heads, levels, points, 2) in [0, 1], x before y.
        attention_weights: Weights (B, queries, heads, levels, points).
        im2col_step: Images at a time; not used.

    Returns:
        Sums (B, queries, heads * C) in the type of `value`.
    """
    wide, locations, weights = widened(value, sampling_locations, attention_weights)
    return _sampled_attention(wide, value_spatial_shapes, locations, weights).to(value.dtype)


def ms_deform_attn_backward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                            sampling_locations: Tensor, attention_weights: Tensor, grad_output: Tensor,
                            grad_value: Tensor, grad_sampling_loc: Tensor, grad_attn_weight: Tensor,
                            im2col_step: int) -> None:
    """Gradients of `ms_deform_attn_forward`.

    Args:
        value: Pixels of all maps.
        value_spatial_shapes: Sizes of the maps.
        value_level_start_index: Not used.
        sampling_locations: Places.
        attention_weights: Weights.
        grad_output: Gradient of the output.
        grad_value: Receives the gradient by the pixels.
        grad_sampling_loc: Receives the gradient by the places.
        grad_attn_weight: Receives the gradient by the weights.
        im2col_step: Not used.
    """
    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return _sampled_attention(value, value_spatial_shapes, locations, weights)

    grad_output, *inputs = widened(grad_output, value, sampling_locations, attention_weights)
    _write_gradients(function, tuple(inputs), grad_output, (grad_value, grad_sampling_loc, grad_attn_weight))


def _mask_index(height: int, width: int, mask_height: int, mask_width: int, half_height: int, half_width: int,
                device: torch.device) -> tuple[Tensor, Tensor]:
    """Which entry of the mask of pixel b belongs to pixel a, both (a, b), and whether there is one."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    y = (rows[:, None] - rows + half_height)[:, None, :, None]
    x = (columns[:, None] - columns + half_width)[None, :, None, :]
    inside = (y >= 0) & (y < mask_height) & (x >= 0) & (x < mask_width)
    index = torch.where(inside, y * mask_width + x, 0)
    return index.reshape(height * width, -1), inside.reshape(height * width, -1)


def psamask_forward(input: Tensor, output: Tensor, psa_type: int, num_: int, h_feature: int, w_feature: int,
                    h_mask: int, w_mask: int, half_h_mask: int, half_w_mask: int) -> None:
    """Point-wise spatial attention: attention maps from masks that are relative to their pixels.

    Args:
        input: Masks (B, h_mask * w_mask, H, W), one around each pixel.
        output: Receives (B, H * W, H, W): by pixel that is attended to, then by the mask's pixel ('collect'), or the
            other way round ('distribute').
        psa_type: 0 collects, 1 distributes.
        num_: B; not used.
        h_feature: H.
        w_feature: W.
        h_mask: Height of a mask.
        w_mask: Width of a mask.
        half_h_mask: Row of a mask's own pixel.
        half_w_mask: Column of a mask's own pixel.
    """
    index, inside = _mask_index(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, input.device)
    maps = input.flatten(2).gather(1, index.expand(len(input), -1, -1)) * inside
    output.copy_((maps.transpose(1, 2) if psa_type else maps).reshape(output.shape))


def psamask_backward(grad_output: Tensor, grad_input: Tensor, psa_type: int, num_: int, h_feature: int,
                     w_feature: int, h_mask: int, w_mask: int, half_h_mask: int, half_w_mask: int) -> None:
    """Gradient of `psamask_forward` by the masks.

    Args:
        grad_output: Gradient of the output.
        grad_input: The gradient is added to it.
        psa_type: 0 collects, 1 distributes.
        num_: B; not used.
        h_feature: H.
        w_feature: W.
        h_mask: Height of a mask.
        w_mask: Width of a mask.
        half_h_mask: Row of a mask's own pixel.
        half_w_mask: Column of a mask's own pixel.
    """
    index, inside = _mask_index(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, grad_output.device)
    maps = grad_output.flatten(2)
    maps = (maps.transpose(1, 2) if psa_type else maps) * inside
    grad_input.flatten(2).scatter_add_(1, index.expand(len(maps), -1, -1), maps)


def _reassemble(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """Weighted sums of the neighbourhoods of pixels, one set of weights for each pixel of the larger output."""
    batch, channels, height, width = features.shape
    padded = F.pad(features, [kernel_size // 2] * 4).unflatten(1, (group_size, -1))
    # Each pixel of the features has a block of scale x scale pixels in the masks.
    weights = masks.reshape(batch, group_size, 1, kernel_size ** 2, height, scale_factor, width, scale_factor)
    total = features.new_zeros(batch, group_size, channels // group_size, height, scale_factor, width, scale_factor)
    # One tap at a time: all at once would need kernel_size ** 2 times the output's memory.
    for tap in range(kernel_size ** 2):
        y, x = divmod(tap, kernel_size)
        total = total + padded[..., y:y + height, None, x:x + width, None] * weights[:, :, :, tap]
    return total.reshape(batch, channels, height * scale_factor, width * scale_factor)


def carafe_naive_forward(features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int,
                         scale_factor: int) -> None:
    """Content-aware reassembly of features: upsampling with a kernel for each output pixel.

    Args:
        features: Feature maps (B, C, H, W).
        masks: Kernels (B, group_size * kernel_size ** 2, H * scale_factor, W * scale_factor).
        output: Receives (B, C, H * scale_factor, W * scale_factor).
        kernel_size: Side of a kernel.
        group_size: Groups of channels that share kernels.
        scale_factor: Ratio of the sizes.
    """
    wide, kernels = widened(features, masks)
    output.copy_(_reassemble(wide, kernels, kernel_size, group_size, scale_factor))


def carafe_naive_backward(top_grad: Tensor, features: Tensor, masks: Tensor, bottom_grad: Tensor, mask_grad: Tensor,
                          kernel_size: int, group_size: int, scale_factor: int) -> None:
    """Gradients of `carafe_naive_forward`.

    Args:
        top_grad: Gradient of the output.
        features: Feature maps.
        masks: Kernels.
        bottom_grad: Receives the gradient by the feature maps.
        mask_grad: Receives the gradient by the kernels.
        kernel_size: Side of a kernel.
        group_size: Groups of channels that share kernels.
        scale_factor: Ratio of the sizes.
    """
    def function(features: Tensor, masks: Tensor) -> Tensor:
        return _reassemble(features, masks, kernel_size, group_size, scale_factor)

    top_grad, *inputs = widened(top_grad, features, masks)
    _write_gradients(function, tuple(inputs), top_grad, (bottom_grad, mask_grad))


def carafe_forward(features: Tensor, masks: Tensor, rfeatures: Tensor, routput: Tensor, rmasks: Tensor,
                   output: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> None:
    """`carafe_naive_forward` with buffers.

    Args:
        features: Feature maps.
        masks: Kernels.
        rfeatures: Receives what the backward pass gets in place of the feature maps: the feature maps.
        routput: Buffer; not used.
        rmasks: Buffer; not used.
        output: Receives the result.
        kernel_size: Side of a kernel.
        group_size: Groups of channels that share kernels.
        scale_factor: Ratio of the sizes.
    """
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(top_grad: Tensor, rfeatures: Tensor, masks: Tensor, rtop_grad: Tensor, rbottom_grad_hs: Tensor,
                    rbottom_grad: Tensor, rmask_grad: Tensor, bottom_grad: Tensor, mask_grad: Tensor,
                    kernel_size: int, group_size: int, scale_factor: int) -> None:
    """`carafe_naive_backward` with buffers.

    Args:
        top_grad: Gradient of the output.
        rfeatures: What `carafe_forward` left: the feature maps.
        masks: Kernels.
        rtop_grad: Buffer; not used.
        rbottom_grad_hs: Buffer; not used.
        rbottom_grad: Buffer; not used.
        rmask_grad: Buffer; not used.
        bottom_grad: Receives the gradient by the feature maps.
        mask_grad: Receives the gradient by the kernels.
        kernel_size: Side of a kernel.
        group_size: Groups of channels that share kernels.
        scale_factor: Ratio of the sizes.
    """
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)
