"""The functions of `mamba_ssm` and `causal_conv1d` under their own names and meaning, on top of our ops.

Code written for those packages runs unchanged, on any device, without a compiler. What has no counterpart here raises
an error that names it.
"""
import torch
from torch.nn import functional as F

from .causal_conv1d.op import causal_conv1d
from .selective_scan.op import selective_scan

__all__ = ['causal_conv1d_fn', 'causal_conv1d_update', 'mamba_inner_fn', 'selective_scan_fn', 'selective_state_update']


def selective_scan_fn(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective scan with the signature and meaning of `mamba_ssm`'s function of that name.

    Args:
        u: (B, D, L).
        delta: Step sizes, (B, D, L).
        A: (D, N), real.
        B: (D, N), (B, N, L) or (B, G, N, L).
        C: (D, N), (B, N, L) or (B, G, N, L).
        D: Skip weight, (D,).
        z: Gate, (B, D, L); the output is multiplied by `silu(z)`.
        delta_bias: (D,), added to `delta`.
        delta_softplus: Whether softplus follows that sum.
        return_last_state: Whether to return the last state too.

    Returns:
        (B, D, L) in the dtype of `u`, with `return_last_state` also the state (B, D, N) in float32 or float64.
    """
    for name, tensor in (('A', A), ('B', B), ('C', C)):
        if tensor.is_complex():
            raise TypeError(
                f'selective_scan_fn: {name} is complex ({tensor.dtype}); only real state spaces are supported, '
                f'pass a real tensor')
    if u.dtype == torch.float64:
        # Modules written for mamba_ssm cast these three with .float(), in a float64 model too.
        A = A.double()
        D, delta_bias = (None if tensor is None else tensor.double() for tensor in (D, delta_bias))
    return selective_scan(
        u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
        return_last_state=return_last_state)


def causal_conv1d_fn(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        return_final_states: bool = False,
        final_states_out: torch.Tensor | None = None,
        activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal convolution with the signature and meaning of `causal_conv1d`'s function of that name.

    Args:
        x: (B, D, L).
        weight: (D, W).
        bias: (D,).
        seq_idx: Several sequences packed in one row; not supported, pass None and one sequence a row.
        initial_states: The W - 1 inputs before the first one, (B, D, W - 1); zeros where None.
        return_final_states: Whether to return the last W - 1 inputs, the initial states of what follows.
        final_states_out: Tensor (B, D, W - 1) that receives these states.
        activation: None, 'silu' or 'swish'.

    Returns:
        (B, D, L) in the dtype of `x`, with `return_final_states` also the states (B, D, W - 1).
    """
    if seq_idx is not None:
        raise NotImplementedError(
            'causal_conv1d_fn: seq_idx (packed sequences) is not supported; pass seq_idx=None and pad the sequences '
            'to one length, one a row of the batch')
    if final_states_out is not None and not return_final_states:
        raise ValueError(
            'causal_conv1d_fn: final_states_out is given, but return_final_states is False; set it to True')
    history = weight.shape[-1] - 1
    _check_state('initial_states', initial_states, x, history)
    _check_state('final_states_out', final_states_out, x, history)
    if initial_states is None:
        out = causal_conv1d(x, weight, bias, activation)
        extended = F.pad(x, (max(history - x.shape[-1], 0), 0)) if return_final_states else x
    else:
        extended = torch.cat([initial_states.to(x.dtype), x], dim=-1)
        out = causal_conv1d(extended, weight, bias, activation)[..., history:]
    if not return_final_states:
        return out
    # A slice that starts at the length itself, not at -0, keeps the case of W = 1 right.
    final_states = extended[..., extended.shape[-1] - history:]
    if final_states_out is None:
        return out, final_states.clone()
    return out, final_states_out.copy_(final_states)


def _check_state(name: str, state: torch.Tensor | None, x: torch.Tensor, history: int) -> None:
    expected = (*x.shape[:2], history)
    if state is not None and tuple(state.shape) != expected:
        raise ValueError(
            f'causal_conv1d_fn: {name} has shape {tuple(state.shape)}, expected (B, D, W - 1) = {expected}')


def causal_conv1d_update(
        x: torch.Tensor,
        conv_state: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        cache_seqlens: torch.Tensor | None = None,
        conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """The convolution of the next inputs of a stream; `conv_state` is brought up to date in place.

    Args:
        x: The next inputs, (B, D) or (B, D, L).
        conv_state: The latest inputs, (B, D, S) with S >= W - 1, the newest one last.
        weight: (D, W).
        bias: (D,).
        activation: None, 'silu' or 'swish'.
        cache_seqlens: Ring-buffer positions; not supported, pass None and a state in order of time.
        conv_state_indices: Rows of `conv_state` to use, (B,); not supported, pass `conv_state[indices]`.

    Returns:
        Shape and dtype of `x`.
    """
    for name, value in (('cache_seqlens', cache_seqlens), ('conv_state_indices', conv_state_indices)):
        if value is not None:
            raise NotImplementedError(f'causal_conv1d_update: {name} is not supported; pass {name}=None')
    history, size = weight.shape[-1] - 1, conv_state.shape[-1]
    if size < history:
        raise ValueError(
            f'causal_conv1d_update: conv_state keeps {size} inputs, expected at least W - 1 = {history}')
    steps = x.unsqueeze(-1) if x.dim() == 2 else x
    extended = torch.cat([conv_state.to(x.dtype), steps], dim=-1)
    conv_state.copy_(extended[..., extended.shape[-1] - size:])
    out = causal_conv1d(extended, weight, bias, activation)[..., size:]
    return out.squeeze(-1) if x.dim() == 2 else out


def selective_state_update(
        state: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
) -> torch.Tensor:
    """One step of the selective scan; `state` is brought up to date in place.

    Args:
        state: (B, D, N).
        x: (B, D).
        dt: (B, D).
        A: (D, N).
        B: (B, N).
        C: (B, N).
        D: (D,).
        z: Gate, (B, D).
        dt_bias: (D,).
        dt_softplus: Whether softplus follows the sum of `dt` and `dt_bias`.

    Returns:
        (B, D), dtype of `x`.
    """
    if state.dim() != 3:
        raise NotImplementedError(
            f'selective_state_update: state has {state.dim()} dimensions; only (B, D, N) is supported, the form with '
            f'heads belongs to Mamba-2')
    work = torch.promote_types(torch.float32, state.dtype)
    step = dt.to(work) if dt_bias is None else dt.to(work) + dt_bias.to(work)
    step = F.softplus(step) if dt_softplus else step
    decay = torch.exp(step.unsqueeze(-1) * A.to(work))
    update = (step * x.to(work)).unsqueeze(-1) * B.to(work).unsqueeze(1)
    latest = state.to(work) * decay + update
    state.copy_(latest)
    out = (latest * C.to(work).unsqueeze(1)).sum(-1)
    if D is not None:
        out = out + D.to(work) * x.to(work)
    if z is not None:
        out = out * F.silu(z.to(work))
    return out.to(x.dtype)


def mamba_inner_fn(
        xz: torch.Tensor,
        conv1d_weight: torch.Tensor,
        conv1d_bias: torch.Tensor | None,
        x_proj_weight: torch.Tensor,
        delta_proj_weight: torch.Tensor,
        out_proj_weight: torch.Tensor,
        out_proj_bias: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor | None = None,
        C: torch.Tensor | None = None,
        D: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        B_proj_bias: torch.Tensor | None = None,
        C_proj_bias: torch.Tensor | None = None,
        delta_softplus: bool = True,
        checkpoint_lvl: int = 1,
        b_rms_weight: torch.Tensor | None = None,
        c_rms_weight: torch.Tensor | None = None,
        dt_rms_weight: torch.Tensor | None = None,
        b_c_dt_rms_eps: float = 1e-6,
) -> torch.Tensor:
    """A Mamba mixer between its two projections: convolution, selective scan, gate, output projection.

    Args:
        xz: Output of the input projection, (B, 2 D, L): the signal, then the gate.
        conv1d_weight: (D, 1, W).
        conv1d_bias: (D,).
        x_proj_weight: (R + N + N, D); the rows of B (C) are absent where `B` (`C`) is given.
        delta_proj_weight: (D, R).
        out_proj_weight: (C, D).
        out_proj_bias: (C,).
        A: (D, N), real.
        B: (D, N), (B, N, L) or (B, G, N, L); projected from the signal where None.
        C: (D, N), (B, N, L) or (B, G, N, L); projected from the signal where None.
        D: Skip weight, (D,).
        delta_bias: (D,).
        B_proj_bias: (N,), added to the projected B.
        C_proj_bias: (N,), added to the projected C.
        delta_softplus: Whether softplus follows `delta + delta_bias`.
        checkpoint_lvl: Accepted for compatibility; it steers memory in `mamba_ssm`, never values.
        b_rms_weight: (N,); RMS normalisation of the projected B.
        c_rms_weight: (N,); RMS normalisation of the projected C.
        dt_rms_weight: (R,); RMS normalisation of the projected step size.
        b_c_dt_rms_eps: Epsilon of these three.

    Returns:
        (B, L, C), dtype of `out_proj_weight` or of autocast.
    """
    rank, state = delta_proj_weight.shape[1], A.shape[1]
    if A.is_complex():
        raise TypeError(f'mamba_inner_fn: A is complex ({A.dtype}); only real state spaces are supported')
    signal, gate = xz.chunk(2, dim=1)
    signal = causal_conv1d(signal, conv1d_weight.squeeze(1), conv1d_bias, 'silu')
    projected = F.linear(signal.transpose(1, 2), x_proj_weight)  # (B, D, L) -> (B, L, R + N + N)
    sizes = [rank] + [state] * ((B is None) + (C is None))
    if projected.shape[-1] != sum(sizes):
        raise ValueError(
            f'mamba_inner_fn: x_proj_weight has {projected.shape[-1]} rows, expected {sum(sizes)}: {rank} for delta '
            f'and {state} for each of B and C that is not given')
    delta, *rest = projected.split(sizes, dim=-1)
    delta = _rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)
    delta = F.linear(delta, delta_proj_weight).transpose(1, 2)  # (B, L, R) -> (B, D, L)
    if B is None:
        B = _coefficient(rest.pop(0), B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    if C is None:
        C = _coefficient(rest.pop(0), C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    out = torch.ops.visionssm.selective_scan(
        signal, delta, A, B, C, D, gate, delta_bias, delta_softplus, False)
    return F.linear(out.transpose(1, 2), out_proj_weight, out_proj_bias)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if weight is None else F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def _coefficient(
        x: torch.Tensor,
        bias: torch.Tensor | None,
        rms_weight: torch.Tensor | None,
        eps: float,
) -> torch.Tensor:
    """Projected B or C, (B, L, N), as the scan takes it, (B, N, L)."""
    x = x if bias is None else x + bias.to(x.dtype)
    return _rms_norm(x, rms_weight, eps).transpose(1, 2)
