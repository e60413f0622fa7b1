"""Initial values of the parameters of a selective state-space model.

All functions write in place, so that they also serve a module that was created on the meta device and emptied
(`to_empty`) before its weights were drawn. On that device nothing is computed: a call costs as much as a layer there.
"""

import math

import torch
from timm.layers import register_notrace_function

__all__ = ['init_A_log_', 'init_A_log_uniform_', 'init_dt_bias_', 'init_dt_proj_', 'init_state_', 'negative_exp']


@register_notrace_function
def negative_exp(A_log: torch.Tensor) -> torch.Tensor:
    """Return the decay matrix A = -exp(A_log) in at least float32.

    Args:
        A_log: Logarithm of the decay, any shape and floating type.

    Returns:
        A of the same shape; float64 stays float64, everything else becomes float32, because the scan raises the
        decay to powers of the sequence length.
    """
    if A_log.dtype == torch.float64:
        return -torch.exp(A_log)
    return -torch.exp(A_log.float())


@torch.no_grad()
def init_A_log_(A_log: torch.Tensor) -> torch.Tensor:
    """Fill (..., N) with log(1), ..., log(N) along the last axis (S4D-real)."""
    if A_log.is_meta:
        return A_log
    states = torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device)
    return A_log.copy_(states.log().expand_as(A_log))


@torch.no_grad()
def init_A_log_uniform_(A_log: torch.Tensor, low: float = 1., high: float = 16.) -> torch.Tensor:
    """Fill with the logarithms of decay rates drawn uniformly from [low, high], as Mamba-2 starts."""
    if A_log.is_meta:
        return A_log
    rates = torch.empty(A_log.shape, dtype=torch.float32, device=A_log.device).uniform_(low, high)
    return A_log.copy_(rates.log())


@torch.no_grad()
def init_dt_bias_(
        dt_bias: torch.Tensor,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
) -> torch.Tensor:
    """Fill with the inverse softplus of step sizes drawn log-uniformly from [dt_min, dt_max].

    Args:
        dt_bias: Bias to fill, any shape.
        dt_min: Smallest step.
        dt_max: Largest step.
        dt_floor: Steps below are raised to it.

    Returns:
        `dt_bias`, such that softplus(dt_bias) are the steps.
    """
    if dt_bias.is_meta:
        return dt_bias
    uniform = torch.rand(dt_bias.shape, dtype=torch.float32, device=dt_bias.device)
    dt = torch.exp(uniform * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=dt_floor)
    return dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def init_dt_proj_(weight: torch.Tensor) -> torch.Tensor:
    """Fill a (..., D, R) weight uniformly in [-R^-0.5, R^-0.5], which keeps the variance of the step at the start."""
    bound = weight.shape[-1] ** -0.5
    return weight.uniform_(-bound, bound)


@torch.no_grad()
def init_state_(style: str, A_log: torch.Tensor, dt_bias: torch.Tensor, dt_proj: torch.Tensor | None = None) -> None:
    """Fill the decay and the step parameters in one of VMamba's three styles.

    Args:
        style: 'v0', S4D-real decay and steps log-uniform in [0.001, 0.1]; 'v1', normal; 'v2', unit decay and uniform.
        A_log: Logarithm of the decay, (..., N).
        dt_bias: Bias of the step, any shape.
        dt_proj: Weight of the step projection, (..., D, R); none where the step has no projection.
    """
    if style not in ('v0', 'v1', 'v2'):
        raise ValueError(f"init is {style!r}; allowed are 'v0', 'v1' and 'v2'.")
    if style == 'v0':
        init_A_log_(A_log)
        init_dt_bias_(dt_bias)
        if dt_proj is not None:
            init_dt_proj_(dt_proj)
        return
    A_log.normal_() if style == 'v1' else A_log.zero_()
    for step in (dt_bias, dt_proj):
        if step is not None:
            step.normal_(0., 0.1) if style == 'v1' else step.uniform_(0., 0.1)
