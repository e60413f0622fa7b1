"""Convolutions whose kernels sample at learned offsets, and convolutions at chosen pixels."""
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from .precision import widened

__all__ = [
    'deform_conv_backward_input', 'deform_conv_backward_parameters', 'deform_conv_forward', 'masked_col2im_forward',
    'masked_im2col_forward', 'modulated_deform_conv_backward', 'modulated_deform_conv_forward']


def _backward(grad_output: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None,
              stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int,
              offset_groups: int) -> tuple[Tensor, ...]:
    """Gradients of torchvision's operator by input, weight, offset, mask and bias."""
    factors = input.new_zeros(len(input), 1) if mask is None else mask
    tensors = widened(grad_output.contiguous(), input, weight, offset, factors, input.new_zeros(len(weight)))
    return torch.ops.torchvision._deform_conv2d_backward(
        *tensors, *stride, *padding, *dilation, groups,
        offset_groups, mask is not None)


def deform_conv_forward(input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor,
                        kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
                        group: int, deformable_group: int, im2col_step: int) -> None:
    """Deformable convolution; torchvision's operator.

    Args:
        input: Feature maps (B, C, H, W).
        weight: Kernels (D, C / group, kH, kW).
        offset: Offsets (B, deformable_group * kH * kW * 2, h, w), y before x.
        output: Receives (B, D, h, w).
        columns: Buffer; not used.
        ones: Buffer; not used.
        kW: Width of the kernel; not used, as `weight` has it.
        kH: Height of the kernel; not used.
        dW: Stride along a row.
        dH: Stride along a column.
        padW: Padding left and right.
        padH: Padding above and below.
        dilationW: Dilation along a row.
        dilationH: Dilation along a column.
        group: Groups of channels.
        deformable_group: Groups of channels that share offsets; not used, as `offset` has it.
        im2col_step: Images at a time; not used.
    """
    wide = widened(input, offset, weight)
    output.copy_(torchvision.ops.deform_conv2d(*wide, None, (dH, dW), (padH, padW), (dilationH, dilationW)))


def deform_conv_backward_input(input: Tensor, offset: Tensor, gradOutput: Tensor, gradInput: Tensor,
                               gradOffset: Tensor, weight: Tensor, columns: Tensor, kW: int, kH: int, dW: int, dH: int,
                               padW: int, padH: int, dilationW: int, dilationH: int, group: int,
                               deformable_group: int, im2col_step: int) -> None:
    """Gradients of `deform_conv_forward` by input and offset; the arguments are those of the forward pass.

    Args:
        input: Feature maps.
        offset: Offsets.
        gradOutput: Gradient of the output.
        gradInput: Receives the gradient by the input.
        gradOffset: Receives the gradient by the offset.
        weight: Kernels.
        columns: Buffer; not used.
        kW: Not used.
        kH: Not used.
        dW: Stride along a row.
        dH: Stride along a column.
        padW: Padding left and right.
        padH: Padding above and below.
        dilationW: Dilation along a row.
        dilationH: Dilation along a column.
        group: Groups of channels.
        deformable_group: Groups of channels that share offsets.
        im2col_step: Not used.
    """
    grads = _backward(gradOutput, input, weight, offset, None, (dH, dW), (padH, padW), (dilationH, dilationW), group,
                      deformable_group)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])


def deform_conv_backward_parameters(input: Tensor, offset: Tensor, gradOutput: Tensor, gradWeight: Tensor,
                                    columns: Tensor, ones: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int,
                                    padH: int, dilationW: int, dilationH: int, group: int, deformable_group: int,
                                    scale: float, im2col_step: int) -> None:
    """Gradient of `deform_conv_forward` by the weight; the arguments are those of the forward pass.

    Args:
        input: Feature maps.
        offset: Offsets.
        gradOutput: Gradient of the output.
        gradWeight: The gradient by the weight is added to it.
        columns: Buffer; not used.
        ones: Buffer; not used.
        kW: Not used.
        kH: Not used.
        dW: Stride along a row.
        dH: Stride along a column.
        padW: Padding left and right.
        padH: Padding above and below.
        dilationW: Dilation along a row.
        dilationH: Dilation along a column.
        group: Groups of channels.
        deformable_group: Groups of channels that share offsets.
        scale: Factor of the gradient.
        im2col_step: Not used.
    """
    # The gradient by the weight does not depend on the weight.
    weight = torch.zeros_like(gradWeight)
    grads = _backward(gradOutput, input, weight, offset, None, (dH, dW), (padH, padW), (dilationH, dilationW), group,
                      deformable_group)
    gradWeight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor,
                                  mask: Tensor, output: Tensor, columns: Tensor, kernel_h: int, kernel_w: int,
                                  stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int,
                                  dilation_w: int, group: int, deformable_group: int, with_bias: bool) -> None:
    """Deformable convolution with a factor for each sample; torchvision's operator.

    Args:
        input: Feature maps (B, C, H, W).
        weight: Kernels (D, C / group, kernel_h, kernel_w).
        bias: Bias (D,).
        ones: Buffer; not used.
        offset: Offsets (B, deformable_group * kernel_h * kernel_w * 2, h, w), y before x.
        mask: Factors (B, deformable_group * kernel_h * kernel_w, h, w).
        output: Receives (B, D, h, w).
        columns: Buffer; not used.
        kernel_h: Not used, as `weight` has it.
        kernel_w: Not used.
        stride_h: Stride along a column.
        stride_w: Stride along a row.
        pad_h: Padding above and below.
        pad_w: Padding left and right.
        dilation_h: Dilation along a column.
        dilation_w: Dilation along a row.
        group: Groups of channels.
        deformable_group: Groups of channels that share offsets; not used.
        with_bias: Whether there is a bias.
    """
    *tensors, shift, factors = widened(input, offset, weight, bias, mask)
    output.copy_(torchvision.ops.deform_conv2d(
        *tensors, shift if with_bias else None, (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w),
        factors))


def modulated_deform_conv_backward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor,
                                   mask: Tensor, columns: Tensor, grad_input: Tensor, grad_weight: Tensor,
                                   grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor, grad_output: Tensor,
                                   kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
                                   dilation_h: int, dilation_w: int, group: int, deformable_group: int,
                                   with_bias: bool) -> None:
    """Gradients of `modulated_deform_conv_forward`; the arguments are those of the forward pass.

    Args:
        input: Feature maps.
        weight: Kernels.
        bias: Bias; not used.
        ones: Buffer; not used.
        offset: Offsets.
        mask: Factors.
        columns: Buffer; not used.
        grad_input: Receives the gradient by the input.
        grad_weight: Receives the gradient by the weight.
        grad_bias: Receives the gradient by the bias, where there is one.
        grad_offset: Receives the gradient by the offset.
        grad_mask: Receives the gradient by the factors.
        grad_output: Gradient of the output.
        kernel_h: Not used.
        kernel_w: Not used.
        stride_h: Stride along a column.
        stride_w: Stride along a row.
        pad_h: Padding above and below.
        pad_w: Padding left and right.
        dilation_h: Dilation along a column.
        dilation_w: Dilation along a row.
        group: Groups of channels.
        deformable_group: Groups of channels that share offsets.
        with_bias: Whether there is a bias.
    """
    grads = _backward(grad_output, input, weight, offset, mask, (stride_h, stride_w), (pad_h, pad_w),
                      (dilation_h, dilation_w), group, deformable_group)
    targets = (grad_input, grad_weight, grad_offset, grad_mask) + ((grad_bias,) if with_bias else ())
    for target, grad in zip(targets, grads):
        target.copy_(grad)


def masked_im2col_forward(im: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, col: Tensor, kernel_h: int,
                          kernel_w: int, pad_h: int, pad_w: int) -> None:
    """The windows around chosen pixels, as columns.

    Args:
        im: Feature map (1, C, H, W).
        mask_h_idx: Rows (P,) of the pixels.
        mask_w_idx: Columns (P,) of the pixels.
        col: Receives (C * kernel_h * kernel_w, P).
        kernel_h: Height of the window.
        kernel_w: Width of the window.
        pad_h: Padding above and below.
        pad_w: Padding left and right.
    """
    # (C, h, w, kernel_h, kernel_w), a view
    windows = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h)).unfold(1, kernel_h, 1).unfold(2, kernel_w, 1)
    col.copy_(windows[:, mask_h_idx, mask_w_idx].permute(0, 2, 3, 1).reshape(col.shape))


def masked_col2im_forward(col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int,
                          channels: int) -> None:
    """Write columns to chosen pixels.

    Args:
        col: Values (D, P).
        mask_h_idx: Rows (P,) of the pixels.
        mask_w_idx: Columns (P,) of the pixels.
        im: Receives the values (1, D, H, W).
        height: H; not used.
        width: W; not used.
        channels: D; not used.
    """
    im[0, :, mask_h_idx, mask_w_idx] = col
