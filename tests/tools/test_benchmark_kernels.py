"""tools/benchmark_kernels.py: contestants compute the same; what is asked, kept, refused; tables, limits, picture."""
import json
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import visionssm_kernels
from visionssm_kernels import _dispatch
from visionssm_kernels._native import native_why_not
from visionssm_kernels._testing import relative_rms

SHAPES = {'selective_scan': (2, 4, 7, 3), 'selective_scan_2d': (2, 3, 3, 5, 2), 'wavefront_scan_2d': (1, 3, 4, 3, 2),
          'nc_ssd': (2, 5, 4, 3, 2, 2), 'ssd': (1, 6, 4, 3, 2, 2)}
OPTIONS = {'rounds': 2, 'min_seconds': 0., 'max_seconds': 0., 'compile_seconds': .2}


@pytest.fixture(scope='module')
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('benchmark_kernels')


@pytest.fixture
def cases(tool: ModuleType) -> ModuleType:
    return sys.modules['_kernel_cases']


@pytest.fixture
def peers(tool: ModuleType) -> ModuleType:
    return sys.modules['_kernel_peers']


@pytest.fixture
def asked(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let the tool measure nothing: ours takes 1 ms and 10 bytes, peers ten times as much; return what it asked for."""
    seen = []

    def measure(settings: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
        seen.append(settings)
        ours = {'contestant': 'native', 'chosen': True, 'ms': 1., 'least_ms': 1., 'rounds_ms': [1., 1.],
                'difference': 1e-7, 'peak_memory': 10}
        return [ours, *({**ours, 'contestant': name, 'chosen': False, 'ms': 10., 'rounds_ms': [10., 10.],
                         'peak_memory': 100} for name in settings['contestants'] if name not in tool.OURS)]

    monkeypatch.setattr(tool, 'measure', measure)
    return seen


def settings(op: str, contestants: list[str], stage: str = 'forward+backward', **more: Any) -> dict[str, Any]:
    return {'op': op, 'shape': list(SHAPES[op]), 'pass': stage, 'dtype': 'float32', 'device': 'cpu', 'threads': 1,
            'contestants': contestants, 'memory': False, 'bandwidth': False, **more}


def agrees(cases: ModuleType, op: str, name: str, layout: str = '') -> float:
    """The largest difference of a contestant's output and gradients from the definition, in float64."""
    inputs, dout = cases.make_inputs(cases.OPS[op], SHAPES[op], torch.float64, torch.device('cpu'), layout)
    contestant = cases.make_contestant(cases.OPS[op], name, SHAPES[op])
    found = cases.compute(contestant, cases.prepare(contestant, 'forward+backward', inputs, dout)())
    assert found.keys() == {'', *inputs}
    return cases._largest_difference(found, cases._truth(cases.OPS[op], SHAPES[op], 'forward+backward', inputs, dout))


@pytest.mark.parametrize(('op', 'name'), [
    *((op, 'plain') for op in SHAPES if op != 'selective_scan_2d'), ('selective_scan', 'parallel'),
    ('selective_scan_2d', 'four-scans'), ('selective_scan_2d', 'cross-scan'), ('selective_scan_2d', 'chunked'),
])
def test_peers_compute_the_op_and_all_its_gradients(cases, op, name):
    assert agrees(cases, op, name) < 1e-10


@pytest.mark.parametrize('name', ['four-scans', 'cross-scan', 'chunked'])
def test_peers_compute_the_op_on_channels_last_maps(cases, name):
    assert agrees(cases, 'selective_scan_2d', name, cases.CHANNELS_LAST) < 1e-10


def test_channels_are_innermost_for_the_op_and_for_its_bare_scans(cases):
    op, shape = cases.OPS['selective_scan_2d'], SHAPES['selective_scan_2d']
    inputs, dout = cases.make_inputs(op, shape, torch.float64, torch.device('cpu'), cases.CHANNELS_LAST)
    assert all(x.stride(-3) == 1 for x in (*(inputs[name] for name in ('u', 'delta', 'B', 'C')), dout))
    scans, douts = cases.make_contestant(op, 'four-scans', shape).arrange(inputs, dout)
    assert all(x.stride(1) == 1 for x in (*(scans[f'{name}{k}'] for name in ('u', 'delta', 'B', 'C')
                                            for k in range(4)), *douts))


@pytest.mark.parametrize('length', [1, 2, 3, 8, 21])
def test_the_parallel_scan_takes_every_length(peers, length):
    decay, drive = torch.rand(2, length, 3, 2, dtype=torch.float64), torch.randn(2, length, 3, 2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (decay, drive)]
    states, state = [], torch.zeros(2, 3, 2, dtype=torch.float64)
    for l in range(length):
        state = decay[:, l] * state + drive[:, l]
        states.append(state)
    expected, found = torch.stack(states, 1), peers._ParallelScan.apply(decay, drive)
    weight = torch.randn_like(found)
    for a, b in zip([found, *torch.autograd.grad(found, leaves, weight)],
                    [expected, *torch.autograd.grad(expected, leaves, weight, materialize_grads=True)], strict=True):
        torch.testing.assert_close(a, b)


def test_the_matrix_products_are_those_of_the_op(cases):
    op, shape = cases.OPS['nc_ssd'], SHAPES['nc_ssd']
    inputs, dout = cases.make_inputs(op, shape, torch.float64, torch.device('cpu'))
    contestant = cases.make_contestant(op, 'matmuls', shape)
    (out,), gradients = cases.prepare(contestant, 'forward+backward', inputs, dout)()
    out, dB, dC = (x.unflatten(0, (-1, shape[4])) for x in (out, gradients['B'], gradients['C']))  # by group
    out = out.unflatten(3, (-1, shape[3])).permute(0, 2, 3, 1, 4).flatten(2, 3) + inputs['D'][:, None] * inputs['x']
    truth = cases._truth(op, shape, 'forward+backward', inputs, dout)
    assert relative_rms(out, truth['']) < 1e-12
    for name, gradient in (('B', dB), ('C', dC)):
        assert relative_rms(gradient.transpose(1, 2), truth[name]) < 1e-12


@pytest.mark.parametrize(('op', 'name'), [
    ('selective_scan', 'mamba_ssm'), ('selective_scan_2d', 'cross-scan+mamba_ssm'), ('ssd', 'mamba_ssm')])
def test_kernels_of_mamba_ssm_are_called_as_that_package_defines_them(cases, monkeypatch, op, name):
    def chunk_scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
                   cu_seqlens=None, dt_softplus=False):
        return visionssm_kernels.ssd(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states,
                                     dt_softplus=dt_softplus)

    with visionssm_kernels.compat.mamba_ssm():
        monkeypatch.setitem(sys.modules, 'mamba_ssm.ops.triton.ssd_combined',
                            SimpleNamespace(mamba_chunk_scan_combined=chunk_scan))
        assert agrees(cases, op, name) < 1e-10


def test_a_backend_runs_both_passes_itself_and_nothing_in_its_place(cases, monkeypatch):
    chosen, select = [], _dispatch.select_backend
    monkeypatch.setattr(_dispatch, 'select_backend', lambda *args: chosen.append(select(*args)) or chosen[-1])
    monkeypatch.setenv(_dispatch.ENV_BACKEND, 'reference')
    rows = cases.measure(settings('selective_scan', ['chunked']), OPTIONS)
    assert 'error' not in rows[0] and {module.__name__.rpartition('.')[2] for module in chosen[2:]} == {'chunked'}
    assert os.environ[_dispatch.ENV_BACKEND] == 'reference' and not _dispatch.is_strict()
    row, = cases.measure(settings('ssd', ['native']), OPTIONS)
    assert 'no such backend' in row['error']


def test_rows_hold_times_differences_and_the_reasons_of_those_that_do_not_run(cases, monkeypatch):
    def wrong(shape: tuple[int, ...]) -> Any:
        return cases.Contestant(lambda u, **others: 1.001 * visionssm_kernels.selective_scan(
            u, **others, delta_softplus=True))

    monkeypatch.setitem(cases.OPS['selective_scan'].peers, 'parallel', wrong)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: lambda **inputs: time.sleep(5))
    monkeypatch.setattr(cases, 'COPY', 2 ** 12)
    rows = {row['contestant']: row for row in cases.measure(settings(
        'selective_scan', ['plain', 'parallel', 'compiled', 'mamba_ssm', 'attention', 'chunked'],
        bandwidth=True), OPTIONS)}
    assert 'not timed' in rows['parallel']['error'] and 'ms' not in rows['parallel']
    assert rows['compiled']['error'] == 'compiling took more than 0.2 s'
    assert 'mamba_ssm is not installed' in rows['mamba_ssm']['error']
    assert rows['plain']['difference'] < 1e-5 and len(rows['plain']['rounds_ms']) == 2
    assert 'difference' not in rows['attention'] and rows['attention']['ms'] > 0
    assert rows['chunked']['bandwidth'] > 0 and rows['chunked']['copy_bandwidth'] > 0
    json.dumps(rows)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_short_dtypes_are_compared_with_what_they_can_hold(cases, dtype):
    rows = cases.measure(settings('selective_scan', ['plain', 'chunked'], dtype=dtype), OPTIONS)
    assert all(1e-5 < row['difference'] < cases.BOUNDS[dtype][1] for row in rows)


def test_the_bytes_to_move_are_inputs_and_outputs_once(cases):
    inputs, dout = {'u': torch.zeros(3, 2), 'B': torch.zeros(5, dtype=torch.bfloat16)}, torch.zeros(3, 2)
    assert cases.moved_bytes(inputs, dout, 'forward') == 34 + 24
    assert cases.moved_bytes(inputs, dout, 'forward+backward') == 3 * 34 + 2 * 24


def test_long_cases_get_fewer_rounds_and_quick_contestants_more_runs(cases, monkeypatch):
    monkeypatch.setattr(cases, 'timed', lambda run, device: run)
    plan = [{'slow': None, 'quick': 1.}, {'slow': 10e3}, torch.device('cpu'), 10, .5]
    assert cases._plan_rounds(*plan, 60) == (5, {'slow': 1, 'quick': 50})
    assert cases._plan_rounds(*plan, 5)[0] == 3 and cases._plan_rounds(*plan, 1e3)[0] == 10


def test_memory_is_that_of_tensors(cases, monkeypatch):
    monkeypatch.setattr(cases, 'MANY_STATES', 0)
    shape = {'shape': [1, 64, 32, 32, 1], 'memory': True}
    rows = cases.measure(settings('selective_scan_2d', ['cross-scan', 'chunked'], 'forward', **shape), OPTIONS)
    # a copy of the map for each route, and what each route returns
    assert 8 * 64 * 32 * 32 * 4 < rows[0]['peak_memory'] < 40 * 64 * 32 * 32 * 4


@pytest.mark.skipif(bool(native_why_not('cpu')), reason='the native library is not built')
def test_the_native_scan_of_a_map_takes_half_the_memory_of_the_cross_scan(cases):
    asked = settings('selective_scan_2d', ['native', 'cross-scan'], shape=[1, 128, 16, 16, 16], memory=True)
    native, pipeline = (row['peak_memory'] for row in cases.measure(asked, OPTIONS))
    assert native <= pipeline / 2, 'the limit at a size where the sums for B and C are a large part'


def test_a_time_limit_ends_what_it_holds_and_nothing_later(peers):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r'waiting took more than 0\.05 s'), peers.time_limit(.05, 'waiting'):
        time.sleep(5)
    with peers.time_limit(.05, 'waiting'):
        pass
    time.sleep(.1)
    assert time.monotonic() - start < 4


def test_presets_measure_what_the_limits_are_about(tool):
    for preset, device, gpu in (('cpu', 'cpu', False), ('gpu', 'cuda', True)):
        jobs = tool.plan(tool.main.parse(['--preset', preset, '--device', device]))
        found = {(job['op'], tuple(job['shape']), job['pass'], job['dtype']): job for job in jobs}
        for bar in (bar for bar in tool.BARS if bar.gpu is gpu):
            for case in ((bar.op, s, p, d) for s in bar.shapes for p in bar.passes for d in bar.dtypes):
                assert bar.peer in found[case]['contestants'] and (bar.kind != 'memory' or found[case]['memory'])
        assert {job['bandwidth'] for job in jobs} == {gpu}
    fewer = tool.plan(tool.main.parse(['--preset', 'cpu', '--op', 'nc_ssd', '--passes', 'forward', '--shape', '1', '2',
                                       '3', '4', '1', '2', '--contestants', 'plain', 'parallel', 'chunked']))
    assert [(job['op'], job['shape'], job['pass'], job['contestants']) for job in fewer] == [
        ('nc_ssd', [1, 2, 3, 4, 1, 2], 'forward', ['plain', 'chunked'])]


def test_all_ops_are_measured_at_sizes_of_models(tool):
    jobs = tool.plan(tool.main.parse(['--op', 'all', '--dtype', 'float32', 'bfloat16']))
    assert {job['op'] for job in jobs} == set(tool.OPS) and {job['dtype'] for job in jobs} == {'float32', 'bfloat16'}
    assert all(name in tool.STYLES for job in jobs for name in job['contestants'])
    assert [96, 192, 384, 768] == [shape[1] for shape in tool.OPS['selective_scan_2d'].shapes[:4]]


def test_finished_cases_are_kept_and_reported(tool, run, asked, monkeypatch, tmp_path):
    command = ['--op', 'selective_scan', '--shape', 1, 2, 3, 4, '--shape', 1, 2, 5, 4]
    whole = tool.measure

    def stop(settings: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
        if settings['shape'][2] == 5:
            raise KeyboardInterrupt
        return whole(settings, options)

    monkeypatch.setattr(tool, 'measure', stop)
    code, _, said = run(*command)
    assert code == 130 and 'finished cases are kept' in said and 'about' in said
    monkeypatch.setattr(tool, 'measure', whole)
    code, report, said = run(*command)
    assert code == 0 and len(asked) == 4 and said.count('kept from') == 1
    assert '| 1 x 2 x 5 x 4 | plain | 10.000 | 1.000 | 10.00 (10.00 to 10.00) | 0.0001 | 1.0e-07 |' in report
    code, again, _ = run('--render', '--plot', tmp_path / 'plot.png', '--markdown', tmp_path / 'table.md')
    assert code == 0 and again == report == (tmp_path / 'table.md').read_text() and len(asked) == 4
    with Image.open(tmp_path / 'plot.png') as picture:
        assert picture.width > 1000 and len(picture.convert('RGB').getcolors(10 ** 6)) > 10


def test_limits_are_judged_for_the_backend_that_models_run_with(tool, run, asked, monkeypatch):
    shape = (1, 2, 3, 4, 5)
    monkeypatch.setattr(tool, 'BARS', (
        tool.Bar('selective_scan_2d', 'four-scans', 'time', .2, (shape,), ('forward',)),
        tool.Bar('selective_scan_2d', 'cross-scan', 'memory', .5, (shape,), ('forward',)),
        tool.Bar('selective_scan_2d', 'cross-scan', 'speed', 2, (shape, (1, 1, 1, 1, 1)), ('forward',)),
        tool.Bar('selective_scan_2d', 'cross-scan', 'speed', 99, (shape,), ('forward',), gpu=True)))
    command = ['--op', 'selective_scan_2d', '--shape', *shape, '--bars']
    code, report, _ = run(*command)
    case, layouts = 'selective_scan_2d, forward, float32, beside', ('', 'channels last, ')
    assert code == 0 and report.partition('## Limits')[2].split('\n')[2:] == [
        *(f'- met: {case} four-scans, {shape}: {layout}0.10 (0.10 to 0.10) of its time, at most 0.2'
          for layout in layouts),
        *(f'- met: {case} cross-scan, {shape}: {layout}0.10 of its memory, at most 0.5' for layout in layouts),
        *(f'- met: {case} cross-scan, {shape}: {layout}10.00 (10.00 to 10.00) times as fast, at least 2'
          for layout in layouts),
        f'- not measured: {case} cross-scan, (1, 1, 1, 1, 1)', '']
    monkeypatch.setattr(tool, 'BARS', (tool.Bar('selective_scan_2d', 'cross-scan', 'speed', 11, (shape,)),))
    code, report, _ = run(*command)
    assert code == 1 and '- not met: ' in report


@pytest.mark.parametrize(('arguments', 'code', 'text'), [
    (('--op', 'scan'), 2, 'invalid choice'),
    (('--shape', 1, 2, 3), 2, '--shape of selective_scan takes B D L N'),
    (('--shape', 1, 2, 0, 3), 2, 'each 1 or more'),
    (('--op', 'all', '--shape', 1, 2, 3, 4), 2, '--shape is of one op'),
    (('--rounds', 0), 2, '--rounds must be 1 or more'),
    (('--threads', 10 ** 6), 1, f'{10 ** 6} is more than the'),
    (('--compile-seconds', 0), 2, '--compile-seconds must be above 0'),
    (('--compile-seconds', 'nan'), 2, '--compile-seconds must be above 0'),
    (('--min-seconds', 'inf'), 2, '--min-seconds must be 0 or more'),
    (('--contestants', 'matmuls'), 1, 'no op asked for has matmuls'),
    (('--preset', 'gpu'), 2, 'give --device'),
    (('--render', '--preset', 'cpu'), 2, '--render takes --json'),
    (('--render',), 1, 'holds nothing to report'),
    (('--device', 'nonsense'), 1, 'nonsense'),
], ids=str)
def test_bad_options_end_in_one_line(run, asked, arguments, code, text):
    found, out, said = run(*arguments)
    assert found == code and text in said and out == '' and not asked and 'Traceback' not in said
