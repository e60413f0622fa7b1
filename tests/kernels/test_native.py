"""The native library: threads, forks, instruction sets, absence, accuracy of its exponential, numbers at its ends."""
import os
import re
import textwrap

import pytest
import torch

from visionssm_kernels import _native, selective_scan, selective_scan_2d, use_backend
from visionssm_kernels._testing import assert_same_results, results_and_gradients, scan_inputs
from visionssm_kernels.causal_conv1d import cpu as causal_conv1d_cpu
from visionssm_kernels.dilated_conv2d import cpu as dilated_conv2d_cpu
from visionssm_kernels.nc_ssd import cpu as nc_ssd_cpu
from visionssm_kernels.selective_scan import cpu as selective_scan_cpu
from visionssm_kernels.wavefront_scan_2d import cpu as wavefront_cpu

pytestmark = pytest.mark.usefixtures('needs_native', 'poisoned_memory')


def scan(**inputs):
    with use_backend('native'):
        return selective_scan(**inputs, delta_softplus=True, return_last_state=True)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize('groups', [(1, 1), (2, 2), (1, 2), (4, 1), (1, 0)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(groups, threads):
    inputs = scan_inputs(2, 200, 150, 9, *groups)
    results = []
    for count in (1, 2, 3, 16):
        threads(count)
        results.append(results_and_gradients(scan, inputs))
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


@pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='threads are counted in /proc')
def test_threads_of_pytorch_survive_ops_with_few_tasks(run_python):
    """The OpenMP runtime ends threads that a smaller team leaves out; PyTorch would have to start them again."""
    code = textwrap.dedent("""
        import os, torch, visionssm_kernels as ops
        torch.set_num_threads(4)
        numbers, make = torch.randn(1 << 18), torch.rand
        calls = {
            'scan': lambda: ops.selective_scan(*2 * [make(1, 24, 300)], -make(24, 4), *2 * [make(1, 4, 300)]),
            'wavefront': lambda: ops.wavefront_scan_2d(*3 * [make(1, 24, 9, 9)], *2 * [-make(24, 4)],
                                                       *3 * [make(1, 4, 9, 9)]),
            'causal': lambda: ops.causal_conv1d(make(1, 20, 2000), make(20, 4)),
            'dilated': lambda: ops.dilated_conv2d(make(1, 20, 40, 40), make(1, 20, 3, 3), (1,)),
            'nc_ssd': lambda: ops.nc_ssd(make(1, 200, 1, 16), make(1, 200, 1), -make(1), *2 * [make(1, 200, 1, 16)])}
        numbers.exp()
        before = set(os.listdir('/proc/self/task'))
        for name, call in calls.items():
            with ops.use_backend('native'):
                call()
            numbers.exp()
            print(name, len(set(os.listdir('/proc/self/task')) - before))
        """)
    done = run_python('-c', code, env=os.environ | {'VISIONSSM_STRICT': '1'})
    assert done.returncode == 0, done.stderr
    assert dict(line.split() for line in done.stdout.splitlines()) == dict.fromkeys(
        ('scan', 'wavefront', 'causal', 'dilated', 'nc_ssd'), '0')


def test_repeated_calls_give_equal_bits():
    inputs = scan_inputs(2, 200, 150, 5)
    first, second = results_and_gradients(scan, inputs), results_and_gradients(scan, inputs)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_2d_results_do_not_depend_on_the_number_of_threads(threads):
    make = torch.randn
    inputs = {'u': make(1, 100, 9, 8), 'delta': make(1, 4, 100, 9, 8), 'A': -torch.rand(400, 2),
              'B': make(1, 4, 2, 9, 8), 'C': make(1, 4, 2, 9, 8)}
    results = []
    for count in (1, 2, 16):
        threads(count)
        with use_backend('native'):
            results.append(results_and_gradients(selective_scan_2d, inputs | {'delta': inputs['delta'].abs()}))
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


@pytest.mark.parametrize(('dim', 'groups'), [(16, 1), (100, 1), (400, 1), (200, 4)])
def test_gradients_of_matrices_are_exact_however_many_slabs_add_to_them(dim, groups):
    inputs = scan_inputs(1, dim, 70, 11, groups, 2 * groups, extras=False)
    wide = {name: x.double() for name, x in inputs.items()}
    with use_backend('reference'):
        expected = results_and_gradients(selective_scan, wide)
    with use_backend('native'):
        found = [results_and_gradients(selective_scan, {
            name: x.mT.contiguous().mT if innermost and x.ndim > 2 else x for name, x in inputs.items()})
            for innermost in (False, True)]
    assert_same_results(found[0], expected, 1e-5, 1e-5)
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork on this platform')
def test_a_forked_child_scans_on_many_threads_and_gets_equal_bits(run_python):
    """The maps are so small that PyTorch's own operations stay on one thread, which would hang.

    In a process of its own: PyTorch refuses gradients in children of one whose autograd has started threads.
    """
    code = textwrap.dedent("""
        import functools, os, torch
        from visionssm_kernels import selective_scan, use_backend
        from visionssm_kernels._testing import results_and_gradients, scan_inputs
        torch.set_num_threads(2)
        scan, inputs = functools.partial(selective_scan, delta_softplus=True), scan_inputs(1, 48, 40, 3)
        with use_backend('native'):
            expected = results_and_gradients(scan, inputs)
            child = os.fork()
            found = results_and_gradients(scan, inputs)
        same = all(torch.equal(x, found[name]) for name, x in expected.items())
        if child == 0:
            os._exit(not same)
        assert same and os.waitpid(child, 0)[1] == 0
        """)
    done = run_python('-c', code, env=os.environ | {'VISIONSSM_STRICT': '1'})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('isa', _native.INSTRUCTION_SETS)
def test_instruction_sets_agree(isa, monkeypatch):
    inputs = scan_inputs(2, 40, 130, 6)
    expected = results_and_gradients(scan, {name: x.double() for name, x in inputs.items()})
    monkeypatch.setenv('VISIONSSM_NATIVE_ISA', isa)
    assert_same_results(results_and_gradients(scan, inputs), expected, 1e-5, 1e-5)


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv('VISIONSSM_NATIVE_ISA', 'mmx')
    with pytest.raises(ValueError, match="VISIONSSM_NATIVE_ISA got 'mmx'; allowed: base, avx2, avx512"):
        scan(**scan_inputs(1, 2, 3, 2))


@pytest.mark.parametrize('isa', _native.INSTRUCTION_SETS)
def test_exponential_is_accurate_over_its_range(isa, monkeypatch):
    """One step from state e: the second output of two steps with B = (1, 0) is the decay itself."""
    monkeypatch.setenv('VISIONSSM_NATIVE_ISA', isa)
    exponent = torch.linspace(-86, 88, 4096)
    u = torch.tensor([1.0, 0.0]).expand(1, 4096, 2)
    delta = torch.ones(1, 4096, 2)
    ones = torch.ones(1, 1, 2)
    with use_backend('native'):
        y = selective_scan(u, delta, exponent[:, None], ones, ones)[0, :, 1]
    # the rate times log2(e) and its product with the step are rounded: 2^-23 of the exponent, beside the polynomial
    relative = (y.double() / exponent.double().exp() - 1).abs()
    assert (relative <= 1.5e-7 + 1.3e-7 * exponent.double().abs()).all()


@pytest.mark.parametrize(('exponent', 'expected'), [(-200.0, 0.0), (-torch.inf, 0.0), (0.0, 1.0), (88.7, 3.32597e38)])
def test_exponential_at_the_ends(exponent, expected):
    with use_backend('native'):
        y = selective_scan(torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, 2), torch.tensor([[exponent]]),
                           torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    assert y[0, 0, 1].item() == pytest.approx(expected, abs=2e-38, rel=1e-4)


@pytest.mark.parametrize('isa', _native.INSTRUCTION_SETS)
def test_decays_below_the_range_are_zero_and_not_the_smallest_number(isa, monkeypatch):
    monkeypatch.setenv('VISIONSSM_NATIVE_ISA', isa)
    inputs = scan_inputs(1, 20, 9, 3, extras=False)
    inputs |= {'delta': torch.full((1, 20, 9), 1e30), 'A': -1 - torch.rand(20, 3)}
    assert not results_and_gradients(lambda **x: selective_scan(**x), inputs, ['A'])['grad_A'].any()


@pytest.mark.parametrize('isa', _native.INSTRUCTION_SETS)
@pytest.mark.parametrize('softplus', [True, False])
@pytest.mark.parametrize('name', ['delta', 'A', 'delta_bias'])
def test_nan_of_any_kind_spreads_as_in_the_reference(name, softplus, isa, monkeypatch):
    """All bits set, as in files that mark missing values so; not the NaN that arithmetic makes."""
    monkeypatch.setenv('VISIONSSM_NATIVE_ISA', isa)
    inputs = scan_inputs(1, 20, 10, 3) | {'delta': torch.rand(1, 20, 10)}
    inputs[name].flatten()[inputs[name].numel() // 2:][:1].view(torch.int32).fill_(-1)

    def where_nan(backend):
        with use_backend(backend):
            results = results_and_gradients(lambda **x: selective_scan(**x, delta_softplus=softplus), inputs)
        return {key: x.isnan() for key, x in results.items()}

    found = where_nan('native')
    assert all(torch.equal(found[key], expected) for key, expected in where_nan('reference').items())


def test_infinite_inputs_without_skip_weights_give_infinite_outputs():
    u = torch.tensor([[[1., torch.inf, 1.]]])
    with use_backend('native'):
        y = selective_scan(u, torch.ones(1, 1, 3), -torch.ones(1, 1), torch.ones(1, 1, 3), torch.ones(1, 1, 3))
    assert y[0, 0, 1:].tolist() == [torch.inf, torch.inf]


def test_softplus_is_accurate_from_tiny_to_large():
    delta = torch.linspace(-80, 40, 2001).reshape(1, 2001, 1)
    ones = torch.ones(1, 1, 1)
    with use_backend('native'):
        y = selective_scan(torch.ones_like(delta), delta, torch.zeros(2001, 1), ones, ones, delta_softplus=True)
    # the argument of the exponential is rounded, which costs 2^-24 of it: most at -80
    torch.testing.assert_close(y, torch.nn.functional.softplus(delta), atol=0, rtol=6e-6)


@pytest.mark.parametrize(('change', 'reason'), [
    ('absent', 'the native library is not built'), ('broken', 'does not load'),
    ('old', f'has ABI {_native.ABI}, this package needs 99')])
def test_missing_library_is_explained_and_replaced(change, reason, monkeypatch, tmp_path):
    if change == 'old':
        monkeypatch.setattr(_native, 'ABI', 99)
    else:
        monkeypatch.setattr(_native, 'LIBRARY', tmp_path / 'libvisionssm_native.so')
        if change == 'broken':
            _native.LIBRARY.write_bytes(b'no library')
    _native._load.cache_clear()
    try:
        assert reason in _native.native_why_not('cpu')
        inputs = scan_inputs(1, 3, 5, 2)
        with use_backend('chunked'):
            expected = selective_scan(**inputs)
        assert torch.equal(selective_scan(**inputs), expected)
    finally:
        monkeypatch.undo()
        _native._load.cache_clear()


def test_library_reports_its_instruction_set():
    assert _native.native_library().visionssm_isa().decode() in _native.INSTRUCTION_SETS


@pytest.mark.parametrize('op, fields', [
    ('selective_scan', selective_scan_cpu.ARGUMENTS.fields), ('causal_conv1d', causal_conv1d_cpu.ARGUMENTS.fields),
    ('wavefront_scan', wavefront_cpu.ARGUMENTS.fields), ('dilated_conv2d', dilated_conv2d_cpu.ARGUMENTS.fields),
    ('nc_ssd', nc_ssd_cpu.ARGUMENTS.fields),
], ids=lambda x: x if isinstance(x, str) else '')
def test_arguments_are_packed_as_the_header_says(op, fields, repo_root):
    header = (repo_root / 'kernels' / 'csrc' / f'{op}.h').read_text()
    body = re.sub(r'/\*.*?\*/', '', header[header.index('typedef struct {') + 16:header.index('_args;')], flags=re.S)
    names = re.findall(r'(\w+)(?:\[(\d)\])?(?=[,;])', body)
    assert [(name, int(count or 1)) for name, count in names] == fields
