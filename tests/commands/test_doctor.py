"""`visionssm doctor`: it names what is missing and why, and finds a kernel that computes wrongly."""
import importlib.metadata
import os

import pytest
import torch

from visionssm.commands import doctor
from visionssm_kernels import backend_report
from visionssm_kernels._dispatch import BackendState, _registry, backend_states
from visionssm_kernels.selective_scan import chunked


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VISIONSSM_CACHE', str(tmp_path))


def test_a_healthy_machine_has_no_problems_and_every_kernel_is_right(run, tmp_path):
    done = run('doctor', '--json')
    report = done.json
    assert done.code == 0 and report['problems'] == []
    tested = {(row['op'], row['backend']) for row in report['self_test']}
    assert tested == {(state.op, state.backend) for state in backend_states() if state.state != 'cannot run'}
    assert {op for op, _ in tested} == set(_registry)
    assert all(row['error'] < 1e-5 for row in report['self_test'] if row['device'] == 'cpu')
    assert report['folders'][0] == {**report['folders'][0], 'path': str(tmp_path), 'writable': True}
    torch_row, = (row for row in report['packages'] if row['name'] == 'torch')
    assert torch_row['version'] == importlib.metadata.version('torch') and torch_row['extras'] == []


def test_it_reads_well(run):
    out = run('doctor').out
    for state in backend_states():
        assert f'{state.op} ' in out and state.reason in out
    assert 'opencv-python-headless' in out and out.rstrip().endswith('No problems')


def test_a_wrong_kernel_and_one_that_breaks_down_are_problems(run, monkeypatch):
    forward = chunked.forward

    def wrong(*args):
        out, *others = forward(*args)
        return out * 1.01, *others

    monkeypatch.setattr(chunked, 'forward', wrong)
    done = run('doctor', '--json')
    assert done.code == 1
    problem, = done.json['problems']
    assert problem.startswith('selective_scan with chunked on cpu: out0 is wrong by 1.0e-02')

    def broken(*args):
        raise RuntimeError('illegal instruction')

    monkeypatch.setattr(chunked, 'forward', broken)
    done = run('doctor')
    assert done.code == 1 and 'selective_scan with chunked on cpu: RuntimeError: illegal instruction' in done.out
    assert run('doctor', '--no-selftest').code == 0


def test_a_missing_fast_path_is_explained(run, monkeypatch):
    monkeypatch.setenv('VISIONSSM_NATIVE', '0')
    report = run('doctor', '--no-selftest', '--json').json
    assert ('causal_conv1d, dilated_conv2d, nc_ssd, selective_scan, wavefront_scan_2d on cpu run with chunked instead '
            'of native: VISIONSSM_NATIVE=0') in report['advice']
    assert report['self_test'] is None and report['system']['instructions'] == ''


def test_a_slow_backend_that_was_asked_for_is_pointed_out(monkeypatch):
    monkeypatch.setenv('VISIONSSM_BACKEND', 'reference')
    assert 'VISIONSSM_BACKEND asks for reference' in doctor.advice(backend_states())


def test_operators_that_strict_mode_makes_an_error_are_a_problem(run, monkeypatch):
    monkeypatch.setenv('VISIONSSM_STRICT', '1')
    assert run('doctor', '--no-selftest').code == 0, 'each operator has what models ask for'
    monkeypatch.setenv('VISIONSSM_BACKEND', 'triton')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    done = run('doctor', '--no-selftest', '--json')
    assert done.code == 1 and "cannot run with the backend that 'triton' means" in done.json['problems'][0]
    for op in _registry:
        assert f'{op} on cpu' in done.json['problems'][0]


@pytest.mark.parametrize('given', ['0', 'abc', '2,x', '-1'])
def test_a_number_of_threads_that_is_ignored_is_pointed_out(monkeypatch, given):
    monkeypatch.setenv('OMP_NUM_THREADS', given)
    assert any(f'OMP_NUM_THREADS={given} is no number' in line for line in doctor.advice(backend_states()))
    monkeypatch.setenv('OMP_NUM_THREADS', '2,1')
    assert not any('OMP_NUM_THREADS' in line for line in doctor.advice(backend_states()))


def test_missing_and_old_packages_come_with_their_command(monkeypatch):
    monkeypatch.setattr(importlib.metadata, 'requires', lambda name: [
        'torch>=99', "nonsuch>=1; extra == 'mm'", "nonsuch>=1; extra == 'seg'", "visionssm[mm]; extra == 'seg'",
        "winonly; sys_platform == 'win32'", "ruff; extra == 'dev'"])
    old, missing = doctor.packages()
    assert (old.name, old.state, old.install) == ('torch', 'too old', "pip install 'visionssm'")
    assert (missing.extras, missing.state, missing.install) == (
        ('mm', 'seg'), 'missing', "pip install 'visionssm[mm]'")


def test_a_core_package_that_is_too_old_is_a_problem(run, monkeypatch):
    monkeypatch.setattr(importlib.metadata, 'requires', lambda name: ['torch>=99'])
    done = run('doctor', '--no-selftest')
    assert done.code == 1 and f'torch {torch.__version__.split("+")[0]}' in done.out and '>=99' in done.out


def test_a_checkout_that_is_not_installed_still_lists_the_core(monkeypatch):
    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, 'requires', unknown)
    assert {package.name for package in doctor.packages()} == set(doctor.CORE)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_cache_that_cannot_be_written_is_named(run, monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    monkeypatch.setenv('VISIONSSM_CACHE', str(tmp_path / 'weights'))
    folder = run('doctor', '--no-selftest', '--json').json['folders'][0]
    assert not folder['writable'] and 'cannot be written' in folder['problem']


def test_a_cache_below_a_file_is_named(run, monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('VISIONSSM_CACHE', str(tmp_path / 'file' / 'weights'))
    assert 'is a file' in run('doctor', '--no-selftest', '--json').json['folders'][0]['problem']


def test_variables_are_shown_without_passwords(run, monkeypatch):
    monkeypatch.setenv('HTTPS_PROXY', 'http://me:secret@proxy:8080')
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    monkeypatch.setenv('VISIONSSM_OFFLINE', '1')
    done = run('doctor', '--no-selftest', '--json')
    assert done.json['variables']['HTTPS_PROXY'] == 'http://***@proxy:8080' and done.json['offline']
    assert 'secret' not in done.out


def test_the_report_of_the_kernels_says_the_same():
    state = next(state for state in backend_states() if state.state == 'chosen')
    assert isinstance(state, BackendState)
    assert any(line.split() == [*state[:3], 'chosen'] for line in backend_report().splitlines())
