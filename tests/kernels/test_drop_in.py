"""The names of mamba_ssm and causal_conv1d: same meaning as those packages document, errors where we stop."""
import pytest
import torch
from torch.nn import functional as F

from visionssm_kernels import causal_conv1d, causal_conv1d_fn, mamba_inner_fn, selective_scan, selective_scan_fn
from visionssm_kernels.drop_in import causal_conv1d_update, selective_state_update

EXACT = {'atol': 1e-10, 'rtol': 0}


@pytest.fixture
def draw():
    """Draws float64 tensors, the same in every test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def scan_inputs(draw) -> dict[str, torch.Tensor]:
    """All tensors of a selective scan with B = 2, D = 4, N = 3, L = 9."""
    return {
        'u': draw(2, 4, 9), 'delta': draw(2, 4, 9), 'A': -draw(4, 3).exp(), 'B': draw(2, 3, 9), 'C': draw(2, 3, 9),
        'D': draw(4), 'z': draw(2, 4, 9), 'delta_bias': draw(4), 'delta_softplus': True}


@pytest.fixture
def mixer(draw) -> dict[str, torch.Tensor]:
    """Weights of a mixer with C = 6, D = 4, R = 2, N = 3, W = 4."""
    return {
        'conv1d_weight': draw(4, 1, 4), 'conv1d_bias': draw(4), 'x_proj_weight': draw(8, 4),
        'delta_proj_weight': draw(4, 2), 'out_proj_weight': draw(6, 4), 'out_proj_bias': draw(6),
        'A': -draw(4, 3).exp(), 'D': draw(4), 'delta_bias': draw(4)}


def test_selective_scan_fn_is_our_scan(scan_inputs):
    assert torch.equal(selective_scan_fn(**scan_inputs), selective_scan(**scan_inputs))


def test_selective_scan_fn_takes_the_arguments_in_mamba_ssms_order(scan_inputs):
    assert torch.equal(selective_scan_fn(*scan_inputs.values()), selective_scan(**scan_inputs))


def test_selective_scan_fn_takes_float32_parameters_with_float64_maps(scan_inputs):
    single = {name: scan_inputs[name].float() for name in ('A', 'D', 'delta_bias')}
    expected = selective_scan_fn(**{**scan_inputs, **{name: tensor.double() for name, tensor in single.items()}})
    assert torch.equal(selective_scan_fn(**{**scan_inputs, **single}), expected)


def test_selective_scan_fn_returns_the_last_state(scan_inputs):
    out, state = selective_scan_fn(**scan_inputs, return_last_state=True)
    assert (out.shape, state.shape) == ((2, 4, 9), (2, 4, 3))


@pytest.mark.parametrize('name', ['A', 'B', 'C'])
def test_selective_scan_fn_refuses_complex_state_spaces(scan_inputs, name):
    scan_inputs[name] = scan_inputs[name].to(torch.complex128)
    with pytest.raises(TypeError, match=f'{name} is complex'):
        selective_scan_fn(**scan_inputs)


@pytest.mark.parametrize('activation', [None, 'silu', 'swish'])
def test_causal_conv1d_fn_is_our_convolution(draw, activation):
    x, weight, bias = draw(2, 4, 9), draw(4, 3), draw(4)
    assert torch.equal(
        causal_conv1d_fn(x, weight, bias, activation=activation), causal_conv1d(x, weight, bias, activation))


@pytest.mark.parametrize('split', [1, 2, 3, 8])
def test_causal_conv1d_fn_continues_from_its_final_states(draw, split):
    x, weight, bias = draw(2, 4, 9), draw(4, 4), draw(4)
    head, states = causal_conv1d_fn(x[..., :split], weight, bias, return_final_states=True, activation='silu')
    tail = causal_conv1d_fn(x[..., split:], weight, bias, initial_states=states, activation='silu')
    torch.testing.assert_close(torch.cat([head, tail], -1), causal_conv1d(x, weight, bias, 'silu'), **EXACT)


def test_causal_conv1d_fn_carries_states_over_a_step_shorter_than_the_filter(draw):
    x, weight, states = draw(2, 4, 1), draw(4, 4), draw(2, 4, 3)
    _, latest = causal_conv1d_fn(x, weight, initial_states=states, return_final_states=True)
    assert torch.equal(latest, torch.cat([states[..., 1:], x], -1))


def test_causal_conv1d_fn_fills_the_states_that_it_is_given(draw):
    x, weight, states = draw(2, 4, 9), draw(4, 4), draw(2, 4, 3)
    _, returned = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=states)
    assert returned is states and torch.equal(states, x[..., -3:])


def test_causal_conv1d_fn_differentiates_through_initial_states(draw):
    x, weight, states = draw(1, 2, 3), draw(2, 3), draw(1, 2, 2)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, states)]
    assert torch.autograd.gradcheck(lambda x, w, s: causal_conv1d_fn(
        x, w, initial_states=s, return_final_states=True), inputs)


def test_causal_conv1d_fn_of_width_one_has_no_states(draw):
    _, states = causal_conv1d_fn(draw(2, 4, 9), draw(4, 1), return_final_states=True)
    assert states.shape == (2, 4, 0)


def test_causal_conv1d_fn_refuses_packed_sequences(draw):
    with pytest.raises(NotImplementedError, match='seq_idx'):
        causal_conv1d_fn(draw(1, 2, 3), draw(2, 4), seq_idx=torch.zeros(1, 3, dtype=torch.int32))


def test_causal_conv1d_fn_refuses_states_of_another_width(draw):
    with pytest.raises(ValueError, match=r'initial_states has shape \(1, 2, 4\), expected .* \(1, 2, 3\)'):
        causal_conv1d_fn(draw(1, 2, 3), draw(2, 4), initial_states=draw(1, 2, 4))


def test_causal_conv1d_fn_refuses_an_unused_state_buffer(draw):
    with pytest.raises(ValueError, match='final_states_out.*return_final_states'):
        causal_conv1d_fn(draw(1, 2, 3), draw(2, 4), final_states_out=draw(1, 2, 3))


@pytest.mark.parametrize('size', [3, 5], ids=['S3', 'S5'])
def test_causal_conv1d_update_step_by_step_is_the_convolution(draw, size):
    x, weight, bias = draw(2, 4, 6), draw(4, 4), draw(4)
    state = torch.zeros(2, 4, size, dtype=torch.float64)
    steps = [causal_conv1d_update(x[..., t], state, weight, bias, 'silu') for t in range(6)]
    torch.testing.assert_close(torch.stack(steps, -1), causal_conv1d(x, weight, bias, 'silu'), **EXACT)


def test_causal_conv1d_update_takes_several_steps(draw):
    x, weight, state = draw(2, 4, 6), draw(4, 4), torch.zeros(2, 4, 3, dtype=torch.float64)
    halves = [causal_conv1d_update(half, state, weight) for half in x.split(3, dim=-1)]
    torch.testing.assert_close(torch.cat(halves, -1), causal_conv1d(x, weight), **EXACT)
    assert torch.equal(state, x[..., -3:])


def test_causal_conv1d_update_refuses_a_short_state(draw):
    with pytest.raises(ValueError, match='keeps 2 inputs, expected at least W - 1 = 3'):
        causal_conv1d_update(draw(1, 2), draw(1, 2, 2), draw(2, 4))


@pytest.mark.parametrize('name', ['cache_seqlens', 'conv_state_indices'])
def test_causal_conv1d_update_refuses_ring_buffers(draw, name):
    with pytest.raises(NotImplementedError, match=name):
        causal_conv1d_update(draw(1, 2), draw(1, 2, 3), draw(2, 4), **{name: torch.zeros(1, dtype=torch.int32)})


def test_selective_state_update_step_by_step_is_the_scan(scan_inputs):
    expected = selective_scan(**scan_inputs)
    state = torch.zeros(2, 4, 3, dtype=torch.float64)
    u, delta, A, B, C, D, z, bias, softplus = scan_inputs.values()
    steps = [selective_state_update(state, *(map_[..., t] for map_ in (u, delta)), A, B[..., t], C[..., t], D,
                                    z[..., t], bias, softplus) for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, -1), expected, **EXACT)


def test_selective_state_update_refuses_heads(draw):
    with pytest.raises(NotImplementedError, match='Mamba-2'):
        selective_state_update(draw(1, 2, 3, 4), *[draw(1, 2, 3)] * 2, *[draw(2, 3, 4)] * 3)


def written_out_mixer(xz: torch.Tensor, mixer: dict[str, torch.Tensor], B=None, C=None, **scan) -> torch.Tensor:
    """mamba_inner_fn in torch functions and our scan, (B, L, C)."""
    x, z = xz.chunk(2, dim=1)
    weight = mixer['conv1d_weight']
    x = F.silu(F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight, mixer['conv1d_bias'], groups=x.shape[1]))
    projected = torch.einsum('rd,bdl->brl', mixer['x_proj_weight'], x)
    delta = torch.einsum('dr,brl->bdl', mixer['delta_proj_weight'], projected[:, :2])
    B = projected[:, 2:5] if B is None else B
    C = projected[:, -3:] if C is None else C
    out = selective_scan(x, delta, mixer['A'], B, C, mixer['D'], z, mixer['delta_bias'], True)
    return torch.einsum('cd,bdl->blc', mixer['out_proj_weight'], out) + mixer['out_proj_bias']


def test_mamba_inner_fn_is_the_written_out_mixer(draw, mixer):
    xz = draw(2, 8, 9)
    torch.testing.assert_close(mamba_inner_fn(xz, **mixer), written_out_mixer(xz, mixer), **EXACT)


def test_mamba_inner_fn_gradients_are_those_of_the_written_out_mixer(draw, mixer):
    tensors = {'xz': draw(2, 8, 9), **mixer}
    weight = draw(2, 9, 6)
    for tensor in tensors.values():
        tensor.requires_grad_()
    gradients, expected = (
        torch.autograd.grad((out * weight).sum(), tensors.values())
        for out in (mamba_inner_fn(**tensors), written_out_mixer(tensors['xz'], mixer)))
    torch.testing.assert_close(gradients, expected, **EXACT)


@pytest.mark.parametrize('shape', [(4, 3), (2, 3, 9), (2, 2, 3, 9)], ids=['constant', 'varying', 'grouped'])
@pytest.mark.parametrize('given', ['B', 'C', 'BC'])
def test_mamba_inner_fn_takes_given_coefficients(draw, mixer, shape, given):
    xz, coefficients = draw(2, 8, 9), {name: draw(*shape) for name in given}
    mixer['x_proj_weight'] = mixer['x_proj_weight'][:8 - 3 * len(given)]
    torch.testing.assert_close(
        mamba_inner_fn(xz, **mixer, **coefficients), written_out_mixer(xz, mixer, **coefficients), **EXACT)


def test_mamba_inner_fn_adds_projection_biases_and_normalises(draw, mixer):
    xz, (bias_b, bias_c, rms_b, rms_c), rms_dt = draw(2, 8, 9), draw(4, 3), draw(2)
    out = mamba_inner_fn(
        xz, **mixer, B_proj_bias=bias_b, C_proj_bias=bias_c, b_rms_weight=rms_b, c_rms_weight=rms_c,
        dt_rms_weight=rms_dt, b_c_dt_rms_eps=1e-3)
    signal = causal_conv1d(xz[:, :4], mixer['conv1d_weight'], mixer['conv1d_bias'], 'silu')
    delta, B, C = (mixer['x_proj_weight'] @ signal).split([2, 3, 3], dim=1)

    def normalised(x, weight):
        return x * (x.square().mean(1, keepdim=True) + 1e-3).rsqrt() * weight[:, None]

    scanned = selective_scan(
        signal, mixer['delta_proj_weight'] @ normalised(delta, rms_dt), mixer['A'],
        normalised(B + bias_b[:, None], rms_b), normalised(C + bias_c[:, None], rms_c), mixer['D'], xz[:, 4:],
        mixer['delta_bias'], True)
    expected = scanned.transpose(1, 2) @ mixer['out_proj_weight'].T + mixer['out_proj_bias']
    torch.testing.assert_close(out, expected, **EXACT)


def test_mamba_inner_fn_names_a_projection_of_wrong_size(draw, mixer):
    mixer['x_proj_weight'] = draw(7, 4)
    with pytest.raises(ValueError, match='x_proj_weight has 7 rows, expected 8'):
        mamba_inner_fn(draw(2, 8, 9), **mixer)


def test_mamba_inner_fn_runs_under_autocast(draw, mixer):
    xz = draw(2, 8, 9).float()
    single = {name: tensor.float().requires_grad_() for name, tensor in mixer.items()}
    with torch.autocast('cpu', torch.bfloat16):
        out = mamba_inner_fn(xz.bfloat16(), **single)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(tensor.grad.isfinite().all() for tensor in single.values())
