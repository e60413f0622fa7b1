"""Normalisation fused with a residual sum, as `mamba_ssm.ops.triton.layer_norm` names it, in plain PyTorch."""
import torch
from torch import nn
from torch.nn import functional as F

__all__ = ['RMSNorm', 'layer_norm_fn', 'rms_norm_fn']


def layer_norm_fn(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        *,
        eps: float = 1e-6,
        dropout_p: float = 0.0,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        is_rms_norm: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Drop out, add the residual, normalise over the last dimension.

    Args:
        x: (..., C).
        weight: (C,).
        bias: (C,) or None.
        residual: (..., C), added before the normalisation.
        eps: Added to the variance or the mean square.
        dropout_p: Probability with which entries of `x` are dropped before the sum; call with 0 in evaluation.
        prenorm: Whether to return the sum too, the residual of the next layer.
        residual_in_fp32: Whether that sum is kept in float32 where no residual came in.
        is_rms_norm: Whether only the mean square is normalised, not the mean.

    Returns:
        (..., C) in the dtype of `x`, with `prenorm` also the sum (..., C) in the dtype of the residual.
    """
    if residual is not None:
        residual_dtype = residual.dtype
    else:
        residual_dtype = torch.float32 if residual_in_fp32 else x.dtype
    # Sums and statistics in float32, as the fused kernel holds them in registers.
    work = torch.promote_types(x.dtype, torch.float32)
    total = F.dropout(x, dropout_p).to(work)
    if residual is not None:
        total = total + residual.to(work)
    gain, shift = weight.to(work), None if bias is None else bias.to(work)
    if is_rms_norm:
        out = F.rms_norm(total, weight.shape, gain, eps)
        out = out if shift is None else out + shift
    else:
        out = F.layer_norm(total, weight.shape, gain, shift, eps)
    out = out.to(x.dtype)
    return (out, total.to(residual_dtype)) if prenorm else out


def rms_norm_fn(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        *,
        eps: float = 1e-6,
        dropout_p: float = 0.0,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMS normalisation with a residual sum; arguments and results as in `layer_norm_fn`."""
    return layer_norm_fn(
        x, weight, bias, residual, eps=eps, dropout_p=dropout_p, prenorm=prenorm, residual_in_fp32=residual_in_fp32,
        is_rms_norm=True)


class RMSNorm(nn.Module):
    """RMS normalisation over the last dimension, with `mamba_ssm`'s parameter names and residual arguments.

    Args:
        hidden_size: Size C of the last dimension.
        eps: Added to the mean square.
        dropout_p: Dropout on the input while training.
        device: Device of the weight.
        dtype: Dtype of the weight.
    """

    def __init__(
            self,
            hidden_size: int,
            eps: float = 1e-5,
            dropout_p: float = 0.0,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.dropout_p = dropout_p
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter('bias', None)

    def forward(
            self,
            x: torch.Tensor,
            residual: torch.Tensor | None = None,
            prenorm: bool = False,
            residual_in_fp32: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise (..., C); arguments and results as in `layer_norm_fn`."""
        return rms_norm_fn(
            x, self.weight, self.bias, residual, eps=self.eps, dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm, residual_in_fp32=residual_in_fp32)
