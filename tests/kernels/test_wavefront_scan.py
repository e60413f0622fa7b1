"""wavefront_scan_2d: definition, gradients, official fixtures, backends against each other, layouts, dtypes, errors."""
import functools
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from visionssm_kernels import set_strict, use_backend, wavefront_scan_2d
from visionssm_kernels._testing import (
    assert_close_rms,
    assert_same_results,
    relative_rms,
    results_and_gradients,
    wavefront_inputs,
)
from visionssm_kernels.wavefront_scan_2d import chunked, op, reference

pytestmark = pytest.mark.usefixtures('poisoned_memory')

# B, D, H, W, N: single rows, columns and pixels; bands of 8 rows full, cut and several
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 1, 9, 2), (1, 4, 9, 1, 3), (2, 5, 7, 3, 4), (1, 18, 17, 20, 3), (1, 2, 8, 8, 1)]


@pytest.fixture(autouse=True)
def _strict():
    set_strict(True)
    yield
    set_strict(None)


@pytest.fixture(params=[False, True], ids=['forward', 'reverse'])
def reverse(request) -> bool:
    return request.param


def shape_id(shape: tuple[int, ...]) -> str:
    return 'B{}-D{}-H{}-W{}-N{}'.format(*shape)


def scan(**options):
    return functools.partial(wavefront_scan_2d, **options)


def definition(u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, delta_bias_top, delta_bias_left):
    """The formula once more, by anti-diagonals over dictionaries of pixels."""
    steps = {'top': F.softplus(delta_top + delta_bias_top[:, None, None]),
             'left': F.softplus(delta_left + delta_bias_left[:, None, None])}
    A, B = {'top': A_top, 'left': A_left}, {'top': B_top, 'left': B_left}
    h, y = {}, torch.zeros_like(u)
    for k in range(u.shape[2] + u.shape[3] - 1):
        for i, j in ((i, k - i) for i in range(u.shape[2]) if 0 <= k - i < u.shape[3]):
            def move(side, state, i=i, j=j):
                step = steps[side][:, :, i, j, None]
                return torch.exp(step * A[side]) * state + step * B[side][:, None, :, i, j] * u[:, :, i, j, None]
            updates = [move('left', h.get((i, j - 1), 0.))] if j or not i else []
            updates += [move('top', h[i - 1, j])] if i else []
            h[i, j] = sum(updates) / len(updates)
            y[:, :, i, j] = (h[i, j] * C[:, None, :, i, j]).sum(-1)
    return y + D[:, None, None] * u


def test_reference_is_the_formula():
    inputs = wavefront_inputs(2, 3, 4, 5, 2, dtype=torch.float64)
    with use_backend('reference'):
        torch.testing.assert_close(
            wavefront_scan_2d(**inputs, delta_softplus=True), definition(**inputs), atol=1e-12, rtol=0)


def test_reverse_is_the_scan_of_the_rotated_map(cpu_backend):
    inputs = wavefront_inputs(2, 3, 10, 4, 2, dtype=torch.float64)
    rotated = {name: x.flip(-2, -1) if x.ndim == 4 else x for name, x in inputs.items()}
    with use_backend(cpu_backend):
        expected = wavefront_scan_2d(**rotated, delta_softplus=True).flip(-2, -1)
        actual = wavefront_scan_2d(**inputs, delta_softplus=True, reverse=True)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize('shape', [(2, 2, 3, 3, 2), (1, 1, 1, 3, 1), (1, 1, 9, 2, 1)], ids=shape_id)
def test_gradients_of_the_reference_are_derivatives(shape, reverse):
    inputs = wavefront_inputs(*shape, dtype=torch.float64)

    def call(*tensors):
        return wavefront_scan_2d(*tensors, delta_softplus=True, reverse=reverse)

    with use_backend('reference'):
        assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize('extras', [True, False], ids=['extras', 'plain'])
@pytest.mark.parametrize('shape', SHAPES, ids=shape_id)
@pytest.mark.parametrize('name', ['native', 'chunked'])
def test_backend_agrees_with_the_reference_in_float64(name, shape, extras, reverse, request):
    request.getfixturevalue('needs_native')
    inputs = wavefront_inputs(*shape, extras=extras, dtype=torch.float64)
    call = scan(delta_softplus=extras, reverse=reverse)
    with use_backend('reference'):
        expected = results_and_gradients(call, inputs)
    with use_backend(name):
        assert_same_results(results_and_gradients(call, inputs), expected, 1e-10, 1e-10)


@pytest.mark.parametrize('elements', [1, 2 * 8 * 5 * 3 * 2], ids=['one group of rows', 'two groups'])
def test_bands_of_rows_follow_each_other(elements, monkeypatch):
    monkeypatch.setattr(chunked, '_ELEMENTS', elements)
    inputs = wavefront_inputs(1, 3, 27, 5, 2, dtype=torch.float64)
    with use_backend('reference'):
        expected = results_and_gradients(scan(delta_softplus=True), inputs)
    with use_backend('chunked'):
        assert_same_results(results_and_gradients(scan(delta_softplus=True), inputs), expected, 1e-10, 1e-10)


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 2e-3)],
                         ids=['fp32', 'bf16', 'fp16'])
def test_backend_agrees_with_float64_on_rounded_inputs(dtype, bound, reverse, cpu_backend):
    inputs = wavefront_inputs(2, 20, 9, 7, 5, dtype=dtype)
    call = scan(delta_softplus=True, reverse=reverse)
    with use_backend('reference'):
        expected = results_and_gradients(call, {name: x.double() for name, x in inputs.items()})
    with use_backend(cpu_backend):
        actual = results_and_gradients(call, inputs)
    assert actual['out0'].dtype == dtype
    assert_same_results(actual, expected, bound, 2 * bound)


@pytest.mark.parametrize(('writer', 'reader'), [*itertools.permutations(['native', 'chunked', 'reference'], 2)])
def test_checkpoints_of_one_backend_serve_another(writer, reader, needs_native):
    inputs = wavefront_inputs(2, 17, 18, 3, 2, dtype=torch.float64)
    with use_backend('reference'):
        expected = results_and_gradients(scan(reverse=True), inputs)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with use_backend(writer):
        out = wavefront_scan_2d(**leaves, reverse=True)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    with use_backend(reader):
        grads = torch.autograd.grad(out, list(leaves.values()), weights)
    for name, grad in zip(leaves, grads, strict=True):
        assert_close_rms(grad, expected[f'grad_{name}'], 1e-10, name)


LAYOUTS = {
    'channel-last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'half of a wider tensor': lambda x: torch.cat([x, x], dim=1).chunk(2, dim=1)[1],
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    'expanded': lambda x: x[:, :, :1].expand_as(x),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_strides_do_not_matter(layout, reverse, cpu_backend):
    inputs = wavefront_inputs(2, 18, 6, 5, 3, dtype=torch.float64)
    strided = {name: LAYOUTS[layout](x) if x.ndim == 4 else x.flip(0).flip(0) for name, x in inputs.items()}
    plain = {name: x.contiguous() for name, x in strided.items()}
    with use_backend(cpu_backend):
        expected = results_and_gradients(scan(reverse=reverse), plain)
        assert_same_results(results_and_gradients(scan(reverse=reverse), strided), expected, 1e-12, 1e-12)


def test_upstream_gradient_may_be_expanded_and_the_output_is_laid_out_as_the_input(cpu_backend):
    inputs = {name: LAYOUTS['channel-last'](x) if x.ndim == 4 else x
              for name, x in wavefront_inputs(1, 4, 3, 5, 2, dtype=torch.float64).items()}
    D = inputs['D'].requires_grad_()
    with use_backend(cpu_backend):
        out = wavefront_scan_2d(**inputs)
        out.sum().backward()
    assert out.stride() == inputs['u'].stride()
    torch.testing.assert_close(D.grad, inputs['u'].sum((0, 2, 3)))


@pytest.mark.parametrize('wanted', [('u',), ('A_left',), ('B_top', 'C'), ('delta_bias_left', 'delta_top')], ids=str)
def test_any_subset_of_inputs_may_need_gradients(wanted, cpu_backend):
    inputs = wavefront_inputs(1, 4, 3, 5, 2, dtype=torch.float64)
    with use_backend(cpu_backend):
        whole = results_and_gradients(scan(), inputs)
        part = results_and_gradients(scan(), inputs, wanted)
    assert all(torch.equal(x, whole[name]) for name, x in part.items())


def test_repeated_calls_and_other_thread_counts_give_equal_bits(needs_native):
    inputs = wavefront_inputs(2, 40, 9, 11, 5)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            with use_backend('native'):
                results.append(results_and_gradients(scan(delta_softplus=True), inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


@pytest.mark.parametrize('isa', ['base', 'avx2', 'avx512'])
def test_instruction_sets_agree(isa, monkeypatch, needs_native):
    inputs = wavefront_inputs(1, 20, 9, 5, 6)
    with use_backend('reference'):
        expected = results_and_gradients(scan(delta_softplus=True), {name: x.double() for name, x in inputs.items()})
    monkeypatch.setenv('VISIONSSM_NATIVE_ISA', isa)
    with use_backend('native'):
        assert_same_results(results_and_gradients(scan(delta_softplus=True), inputs), expected, 1e-5, 1e-5)


def test_empty_batch_gives_empty_output_and_zero_gradients(cpu_backend):
    inputs = {name: x.requires_grad_() for name, x in wavefront_inputs(0, 4, 3, 5, 2).items()}
    with use_backend(cpu_backend):
        out = wavefront_scan_2d(**inputs)
        out.sum().backward()
    assert out.shape == (0, 4, 3, 5)
    assert not inputs['A_top'].grad.any() and not inputs['delta_bias_left'].grad.any()


def test_large_steps_forget_without_nan(cpu_backend):
    inputs = wavefront_inputs(1, 3, 4, 5, 2)
    inputs |= {'delta_top': inputs['delta_top'] + 300, 'A_top': inputs['A_top'] - 1, 'A_left': inputs['A_left'] - 1}
    with use_backend(cpu_backend):
        results = results_and_gradients(scan(delta_softplus=True), inputs)
    assert all(x.isfinite().all() for x in results.values())


def test_states_are_kept_for_every_eighth_row_only():
    u, delta, _, A, _, B, _, C, D, *_ = wavefront_inputs(1, 3, 17, 5, 2).values()
    inputs = (u, delta, delta, A, A, B, B, C, D, None, None, True, False)
    out, checkpoints = torch.ops.visionssm.wavefront_scan(*inputs, True)
    assert checkpoints.shape == (1, 3, 2, 5, 3) and reference.ROWS == 8
    assert not checkpoints[:, 0].any() and checkpoints[:, 1:].all()
    same, none = torch.ops.visionssm.wavefront_scan(*inputs, False)
    assert torch.equal(same, out) and none.shape == (1, 0, 2, 5, 3)


def test_a_gradient_without_kept_states_computes_them_again(cpu_backend):
    inputs = [x.requires_grad_() for x in wavefront_inputs(1, 3, 17, 5, 2).values()]
    inputs += [None] * (11 - len(inputs))
    results = []
    with use_backend(cpu_backend):
        for keep in (True, False):
            out = torch.ops.visionssm.wavefront_scan(*inputs, True, False, keep)[0]
            results.append(torch.autograd.grad(out.square().sum(), [x for x in inputs if x is not None]))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_states_are_kept_where_a_gradient_is_wanted_only(monkeypatch):
    kept = []
    empty = op._wavefront_scan_fake
    monkeypatch.setattr(op, '_primitive', lambda *args: kept.append(args[-1]) or empty(*args))
    inputs = wavefront_inputs(1, 3, 4, 5, 2)
    op._checked_scan(**inputs)
    inputs['A_left'].requires_grad_()
    op._checked_scan(**inputs)
    with torch.no_grad():
        op._checked_scan(**inputs)
    assert kept == [False, True, False]


@pytest.mark.parametrize(('change', 'error', 'message'), [
    ({'u': torch.zeros(1, 4, 6)}, ValueError, r'u must be \(B, D, H, W\), got \(1, 4, 6\)'),
    ({'delta_left': torch.zeros(1, 4, 3, 2)}, ValueError, r'delta_left must be .* = \(1, 4, 2, 3\), got \(1, 4, 3'),
    ({'A_left': torch.zeros(4, 3)}, ValueError, r'A_left must be \(D, N\) = \(4, 2\), got \(4, 3\)'),
    ({'B_top': torch.zeros(1, 4, 2, 3)}, ValueError, r'B_top must be \(B, N, H, W\) = \(1, 2, 2, 3\), got'),
    ({'D': torch.zeros(3)}, ValueError, r'D must be \(D,\) = \(4\), got \(3\)'),
    ({'C': torch.zeros(1, 2, 2, 3).double()}, TypeError, 'C is float64, but u is float32'),
    ({'C': torch.zeros(1, 2, 2, 3).long()}, TypeError, 'C must be floating point'),
    ({'A_top': torch.zeros(4, 0)}, ValueError, 'N is 0'),
], ids=['u', 'delta', 'A', 'B', 'D', 'float64', 'integers', 'no states'])
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        wavefront_scan_2d(**(wavefront_inputs(1, 4, 2, 3, 2) | change))


NAMES = {'x': 'u', 'deltaT': 'delta_top', 'deltaL': 'delta_left', 'AT': 'A_top', 'AL': 'A_left', 'BT': 'B_top',
         'BL': 'B_left', 'C': 'C', 'D': 'D'}


def read_official(path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Metadata and tensors, maps channel-first."""
    with safe_open(path, 'pt') as file:
        return file.metadata(), {key: file.get_tensor(key).double() for key in file.keys()}


def channel_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


@pytest.mark.parametrize('case', ['2x9', '4x4', '7x3_n16'])
def test_official_scans(case, cpu_backend, family_fixture):
    meta, tensors = read_official(family_fixture('mamba2d', f'wavefront_scan_{case}.safetensors'))
    inputs = {ours: channel_first(tensors[f'input.{theirs}']).requires_grad_() for theirs, ours in NAMES.items()}
    with use_backend(cpu_backend):
        out = wavefront_scan_2d(**inputs)
        (out * channel_first(tensors['loss_weight'])).sum().backward()
    assert relative_rms(out, channel_first(tensors['output64'])) <= 1e-10
    for theirs, ours in NAMES.items():
        expected = channel_first(tensors[f'grad.{theirs}'])
        assert (inputs[ours].grad - expected).abs().max() <= float(meta['grad_rtol']) * expected.abs().max(), ours


def test_official_scan_behind_its_projections(cpu_backend, family_fixture):
    meta, tensors = read_official(family_fixture('mamba2d', 'wavefront_proj_6x9.safetensors'))
    config = json.loads(meta['config'])
    leaves = {key.removeprefix('input.'): x.requires_grad_() for key, x in tensors.items() if key.startswith('input.')}
    rank, state = config['R'], config['N']
    parts = (leaves['x'] @ leaves['x_proj_weight'].T).split([rank, rank, state, state, state], dim=-1)
    with use_backend(cpu_backend):
        out = wavefront_scan_2d(
            channel_first(leaves['x']), *(channel_first(parts[k] @ leaves[f'dt_proj{side}_weight'].T)
                                          for k, side in enumerate('TL')),
            -torch.exp(leaves['AT_log']), -torch.exp(leaves['AL_log']), *(channel_first(x) for x in parts[2:]),
            leaves['D'], leaves['dt_projT_bias'], leaves['dt_projL_bias'], delta_softplus=True)
        (out * channel_first(tensors['loss_weight'])).sum().backward()
    assert relative_rms(out, channel_first(tensors['output64'])) <= 1e-6
    for name, leaf in leaves.items():
        expected = tensors[f'grad.{name}']
        assert (leaf.grad - expected).abs().max() <= float(meta['grad_rtol']) * expected.abs().max(), name
