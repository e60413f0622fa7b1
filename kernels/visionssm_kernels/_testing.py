"""Helpers of the tests and benchmarks: comparison by relative RMS, inputs of any size, results with all gradients."""
from collections.abc import Callable, Sequence

import torch

Inputs = dict[str, torch.Tensor | None]


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference divided by RMS of the expectation; 0 where the difference is below 1e-12 everywhere."""
    difference = actual.double() - expected.double()
    if difference.numel() == 0 or difference.abs().max() <= 1e-12:
        return 0.0
    return (difference.square().mean().sqrt() / expected.double().square().mean().sqrt().clamp_min(1e-300)).item()


def assert_close_rms(actual: torch.Tensor, expected: torch.Tensor, bound: float, name: str) -> None:
    """Raises AssertionError unless shapes are equal and the relative RMS of the difference is within the bound.

    Args:
        actual: Result under test.
        expected: Reference.
        bound: Largest relative RMS.
        name: What is compared, for the message.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f'{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}')
    error = relative_rms(actual, expected)
    if not error <= bound:  # also true of NaN
        worst = (actual.double() - expected.double()).abs().nan_to_num(torch.inf).argmax()
        raise AssertionError(
            f'{name}: relative RMS {error:.3g} > {bound:.3g}; worst element {int(worst)}: '
            f'{actual.flatten()[worst].item():.6g}, expected {expected.flatten()[worst].item():.6g}')


def scan_inputs(
        batch: int,
        dim: int,
        length: int,
        state: int,
        b_groups: int | None = None,
        c_groups: int | None = None,
        extras: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
) -> Inputs:
    """Makes random arguments of `selective_scan` by name.

    Args:
        batch: B.
        dim: D.
        length: L.
        state: N.
        b_groups: Groups of B; None for (B, N, L), 0 for a constant (D, N).
        c_groups: Groups of C, likewise.
        extras: Also makes D, z and delta_bias.
        dtype: Of the maps; parameters are float32, or float64 if this is.
        device: Of all tensors.
    """
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=parameter, device=device).to(dtype)

    def matrix(groups: int | None) -> torch.Tensor:
        if groups is None:
            return make(batch, state, length)
        return make(batch, groups, state, length) if groups else make(dim, state, dtype=parameter)

    inputs: Inputs = {
        'u': make(batch, dim, length), 'delta': make(batch, dim, length) / 2,
        'A': -4 * torch.rand(dim, state, dtype=parameter, device=device), 'B': matrix(b_groups), 'C': matrix(c_groups)}
    if extras:
        inputs |= {'D': make(dim, dtype=parameter), 'z': make(batch, dim, length),
                   'delta_bias': make(dim, dtype=parameter)}
    return inputs


def wavefront_inputs(
        batch: int,
        dim: int,
        height: int,
        width: int,
        state: int,
        extras: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
) -> Inputs:
    """Makes random arguments of `wavefront_scan_2d` by name.

    Args:
        batch: B.
        dim: D.
        height: H.
        width: W.
        state: N.
        extras: Also makes D and the biases of the steps.
        dtype: Of the maps; parameters are float32, or float64 if this is.
        device: Of all tensors.
    """
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    maps, matrices = (batch, dim, height, width), (batch, state, height, width)

    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=parameter, device=device).to(dtype)

    inputs: Inputs = {
        'u': make(*maps), 'delta_top': make(*maps) / 2, 'delta_left': make(*maps) / 2,
        'A_top': -4 * torch.rand(dim, state, dtype=parameter, device=device),
        'A_left': -4 * torch.rand(dim, state, dtype=parameter, device=device),
        'B_top': make(*matrices), 'B_left': make(*matrices), 'C': make(*matrices)}
    if extras:
        inputs |= {name: make(dim, dtype=parameter) for name in ('D', 'delta_bias_top', 'delta_bias_left')}
    return inputs


def nc_ssd_inputs(
        batch: int,
        length: int,
        heads: int,
        size: int,
        groups: int,
        state: int,
        extras: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
) -> Inputs:
    """Makes random arguments of `nc_ssd` by name.

    Args:
        batch: B.
        length: L.
        heads: M.
        size: P.
        groups: G.
        state: N.
        extras: Also makes D.
        dtype: Of x, dt, B and C; parameters are float32, or float64 if this is.
        device: Of all tensors.
    """
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=parameter, device=device).to(dtype)

    inputs: Inputs = {
        'x': make(batch, length, heads, size), 'dt': make(batch, length, heads).abs(),
        'A': -4 * torch.rand(heads, dtype=parameter, device=device),
        'B': make(batch, length, groups, state), 'C': make(batch, length, groups, state)}
    return inputs | {'D': make(heads, dtype=parameter)} if extras else inputs


def ssd_inputs(
        batch: int,
        length: int,
        heads: int,
        channels: int,
        groups: int,
        state: int,
        extras: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
) -> Inputs:
    """Makes random arguments of `ssd` by name.

    Args:
        batch: B.
        length: L.
        heads: M.
        channels: P.
        groups: G.
        state: N.
        extras: Also makes D, z, dt_bias and initial_states.
        dtype: Of the sequences; parameters and states are float32, or float64 if this is.
        device: Of all tensors.
    """
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=parameter, device=device).to(dtype)

    inputs: Inputs = {
        'x': make(batch, length, heads, channels), 'dt': make(batch, length, heads) / 2,
        'A': -4 * torch.rand(heads, dtype=parameter, device=device),
        'B': make(batch, length, groups, state), 'C': make(batch, length, groups, state)}
    if extras:
        inputs |= {'D': make(heads, channels, dtype=parameter), 'z': make(batch, length, heads, channels),
                   'dt_bias': make(heads, dtype=parameter),
                   'initial_states': make(batch, heads, channels, state, dtype=parameter)}
    return inputs


def results_and_gradients(
        function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
        inputs: Inputs,
        wanted: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Calls a function and differentiates a fixed random weighting of its outputs.

    Args:
        function: Takes the inputs by name, returns a tensor or a tuple of tensors.
        inputs: Arguments by name; None is passed on.
        wanted: Names of inputs to differentiate by; all by default.

    Returns:
        'out0', 'out1', ... and 'grad_<name>'.
    """
    wanted = [name for name, x in inputs.items() if x is not None and (wanted is None or name in wanted)]
    leaves = {name: x if x is None else x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, [leaves[name] for name in wanted], weights)
    return {**{f'out{i}': x.detach() for i, x in enumerate(outputs)},
            **{f'grad_{name}': x for name, x in zip(wanted, gradients)}}


def assert_same_results(
        actual: dict[str, torch.Tensor],
        expected: dict[str, torch.Tensor],
        out_bound: float,
        grad_bound: float,
) -> None:
    """Compares two dictionaries of `results_and_gradients`, each entry by relative RMS."""
    if actual.keys() != expected.keys():
        raise AssertionError(f'results {sorted(actual)}, expected {sorted(expected)}')
    for name, x in actual.items():
        assert_close_rms(x, expected[name], out_bound if name.startswith('out') else grad_bound, name)
