"""Choice of a backend: order by device, overrides, strict mode, report, log lines."""
import logging
import os

import pytest
import torch

from visionssm_kernels import _dispatch, backend_report, set_strict, use_backend
from visionssm_kernels._native import native_why_not

CPU, META = torch.device('cpu'), torch.device('meta')


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """An op of this module's own, in which nothing but a refusal distinguishes the backends."""
    monkeypatch.setattr(_dispatch, '_registry', {})
    monkeypatch.setattr(_dispatch, '_logged', set())
    monkeypatch.delenv(_dispatch.ENV_BACKEND, raising=False)
    monkeypatch.delenv(_dispatch.ENV_STRICT, raising=False)
    set_strict(None)
    for name, module in (('native', 'json'), ('chunked', 'math'), ('reference', 'string'), ('triton', 'csv')):
        refuse = {'native': lambda device: None if device == 'cpu' else 'CPU only',
                  'triton': lambda device: 'no compiler'}
        _dispatch.register_backend('op', name, module, *([refuse[name]] if name in refuse else []))
    yield
    set_strict(None)


def selected(device=CPU):
    return _dispatch.select_backend('op', device).__name__


def test_device_decides():
    assert selected(CPU) == 'json'
    assert selected(META) == 'math'


@pytest.mark.parametrize(('name', 'module'), [('reference', 'string'), ('chunked', 'math'), ('native', 'json'),
                                              ('cpu', 'json'), ('auto', 'json')])
def test_context_manager_decides(name, module):
    with use_backend(name):
        assert selected() == module
    assert selected() == 'json'


def test_innermost_context_wins_and_outlives_errors():
    with use_backend('reference'):
        with pytest.raises(KeyError), use_backend('chunked'):
            raise KeyError
        assert selected() == 'string'


def test_environment_decides_unless_a_context_does(monkeypatch):
    monkeypatch.setenv(_dispatch.ENV_BACKEND, 'chunked')
    assert selected() == 'math'
    with use_backend('reference'):
        assert selected() == 'string'


def test_cpu_takes_chunked_where_native_cannot_run():
    with use_backend('cpu'):
        assert selected(META) == 'math'


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="use_backend got 'gpu'; allowed: auto, cpu, native"), use_backend('gpu'):
        pass
    monkeypatch.setenv(_dispatch.ENV_BACKEND, 'fast')
    with pytest.raises(ValueError, match="VISIONSSM_BACKEND got 'fast'"):
        selected()


def test_asked_for_backend_that_cannot_run_falls_back_with_a_warning(caplog):
    with caplog.at_level(logging.INFO, 'visionssm'), use_backend('triton'):
        assert selected() == 'json'
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ('WARNING', 'op runs on cpu with backend native (triton: no compiler)')]


@pytest.mark.parametrize('how', ['function', 'environment'])
def test_strict_mode_raises_instead(how, monkeypatch):
    if how == 'function':
        set_strict(True)
    else:
        monkeypatch.setenv(_dispatch.ENV_STRICT, '1')
    with use_backend('triton'), pytest.raises(RuntimeError, match="backend 'triton': no compiler. Strict mode forbids"):
        selected()
    assert selected() == 'json'


@pytest.mark.parametrize(('name', 'device', 'state'), [
    ('triton', CPU, 'can run'), ('native', CPU, 'chosen'), ('auto', CPU, 'chosen'),
    ('native', META, 'can run')], ids=str)
def test_the_report_of_strict_mode_is_what_it_does(monkeypatch, name, device, state):
    monkeypatch.setenv(_dispatch.ENV_STRICT, '1')
    monkeypatch.setattr(_dispatch, '_ORDER', {**_dispatch._ORDER, 'meta': ('native', 'chunked')})
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: META)
    with use_backend(name):
        states = [found for found in _dispatch.backend_states() if found.device == device.type]
        best, = (found.state for found in states if found.backend == ('native' if device is CPU else 'chunked'))
        assert best == state and (state == 'chosen') == any(found.state == 'chosen' for found in states)
        if state == 'chosen':
            assert selected(device) == 'json'
        else:
            with pytest.raises(RuntimeError, match='Strict mode forbids'):
                selected(device)


def test_switches_are_0_or_1(monkeypatch):
    monkeypatch.setenv(_dispatch.ENV_STRICT, 'yes')
    with pytest.raises(ValueError, match="VISIONSSM_STRICT got 'yes'; allowed: 0, 1"):
        _dispatch.is_strict()
    monkeypatch.setenv('VISIONSSM_NATIVE', 'no')
    with pytest.raises(ValueError, match="VISIONSSM_NATIVE got 'no'"):
        native_why_not('cpu')
    for value in ('', '0'):
        monkeypatch.setenv(_dispatch.ENV_STRICT, value)
        assert not _dispatch.is_strict()


def test_first_use_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, 'visionssm'):
        selected()
        selected()
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ('INFO', 'op runs on cpu with backend native')]


def test_report_names_choice_and_reasons():
    lines = [line.split(maxsplit=3) for line in backend_report().splitlines()]
    assert ['op', 'cpu', 'native', 'chosen'] in lines
    assert ['op', 'cpu', 'triton', 'cannot run: no compiler'] in lines
    with use_backend('reference'):
        assert 'reference  chosen' in backend_report()


@pytest.mark.parametrize(('variable', 'value', 'chosen'), [
    ('VISIONSSM_NATIVE', '0', 'chunked'), ('VISIONSSM_BACKEND', 'reference', 'reference')])
def test_environment_of_a_process(run_python, variable, value, chosen):
    code = ('import torch, visionssm_kernels as k\n'
            'x = torch.randn(1, 3, 5)\n'
            'k.selective_scan(x, x, -torch.rand(3, 2), torch.randn(1, 2, 5), torch.randn(1, 2, 5))\n'
            'print(k.backend_report())')
    done = run_python('-c', code, env=os.environ | {variable: value})
    chosen_lines = [line.split() for line in done.stdout.splitlines() if line.endswith('chosen')]
    assert ['selective_scan', 'cpu', chosen, 'chosen'] in chosen_lines
    assert done.stderr == ''


def test_ops_without_any_backend_for_a_device_say_why():
    _dispatch.register_backend('lonely', 'triton', 'csv', lambda device: 'no compiler')
    with pytest.raises(RuntimeError, match='lonely has no backend for cpu: native: this op has no such backend'):
        _dispatch.select_backend('lonely', CPU)


