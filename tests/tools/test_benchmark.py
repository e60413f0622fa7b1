"""tools/benchmark.py: what it asks to be measured, what it keeps, its tables, fits, limits and picture."""
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visionssm.analysis import cells

MS = {'vim_pico': 30., 'vmamba_pico': 20., 'test_vit': 10.}


@pytest.fixture(scope='module')
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('benchmark')


@pytest.fixture
def asked(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let the tool measure nothing; memory is linear for all but test_vit; return what it asked for."""
    settings_seen = []

    def measure(settings: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
        settings_seen.append(settings)
        pixels = settings['size'] ** 2
        rows = [{'model': name, 'ms': MS.get(name, 40.), 'least_ms': 1., 'images_per_s': 50.,
                 'rounds_ms': [MS.get(name, 40.)] * 3, 'held_memory': 10 ** 8,
                 'peak_memory': 10 ** 8 + (pixels ** 2 if name == 'test_vit' else 1000 * pixels)}
                for name in [*settings['models'], *settings['peers']]]
        return [{'model': row['model'], 'error': 'out of | memory'} if row['model'] == 'vssd_pico' else row
                for row in rows]

    monkeypatch.setattr(tool, 'measure', measure)
    return settings_seen


def row_of(report: str, model: str) -> list[str]:
    line = next(line for line in report.splitlines() if line.startswith(f'| `{model}`'))
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_models_and_peers_are_measured_and_one_that_refuses_a_size_is_recorded(run, tmp_path):
    code, report, said = run('vmamba_pico', 'mamba_yolo_pico', '--peers', 'test_convnext', '--size', 65,
                             '--rounds', 2, '--warmup', 0, '--threads', 1, '--no-memory')
    assert code == 0 and 'mamba_yolo_pico does not run with inputs of (1, 3, 65, 65)' in said
    cell, = json.loads((tmp_path / 'all.json').read_text())['cells']
    assert [len(row.get('rounds_ms', [])) for row in cell['rows']] == [2, 0, 2]
    assert cell['environment']['threads'] == 1 and cell['environment']['torch'] == torch.__version__
    assert 'selective_scan' in cell['environment']['kernels']
    assert row_of(report, 'mamba_yolo_pico')[1].startswith('failed: ') and float(row_of(report, 'vmamba_pico')[1]) > 0


def test_a_cell_that_ends_its_process_is_recorded(tool, monkeypatch):
    def die(*args: Any, **kwargs: Any) -> None:
        raise ChildProcessError('memory ran out\nand more')

    monkeypatch.setattr(tool, 'compare_apart', die)
    settings = {'models': ['vim_pico'], 'peers': ['test_vit'], 'task': 'forward', 'dtype': 'float32', 'device': 'cpu',
                'channels_last': False, 'compiled': False, 'threads': 1, 'memory': True, 'size': 32, 'batch_size': 1}
    assert tool.measure(settings, {}) == [{'model': name, 'error': 'memory ran out'}
                                          for name in ('vim_pico', 'test_vit')]


def test_the_published_comparison_is_a_preset(tool):
    asked = tool.plan(tool.main.parse(['--preset', 'classification']))
    assert {(224, 1), (224, 8), (1024, 1)} <= {(cell['size'], cell['batch_size']) for cell in asked}
    assert 'swin_tiny_patch4_window7_224' in asked[0]['peers'] and 'mambaout_tiny' in asked[0]['peers']
    measured = {*asked[0]['models'], *asked[0]['peers']}
    for bar in tool.BARS:
        assert {*bar.models, tool.resolve(bar.peer)} <= measured
    train, = tool.plan(tool.main.parse(['--preset', 'training', '--channels-last']))
    assert (train['task'], train['batch_size'], train['dtype'], train['channels_last']) == (
        'train', 128, 'bfloat16', True)
    fewer = tool.plan(tool.main.parse(['vim_tiny', '--preset', 'training', '--peers', '--size', '32', '64']))
    assert [(cell['models'], cell['peers'], cell['size'], cell['batch_size']) for cell in fewer] == [
        (['vim_tiny'], [], 32, 128), (['vim_tiny'], [], 64, 128)]


def test_after_a_stop_only_what_is_missing_is_measured(tool, run, asked, monkeypatch, tmp_path):
    command = ['vim_pico', '--peers', 'test_vit', '--size', 32, 48, 64]
    whole = tool.measure

    def stop(settings: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
        if settings['size'] == 48:
            raise KeyboardInterrupt
        return whole(settings, options)

    monkeypatch.setattr(tool, 'measure', stop)
    code, _, said = run(*command)
    assert code == 130 and 'finished cells are kept' in said
    monkeypatch.setattr(tool, 'measure', whole)
    code, report, said = run(*command)
    assert code == 0 and [cell['size'] for cell in asked] == [32, 48, 64] and '32 x 32: kept from' in said
    assert report.count('time / test_vit') == 3
    assert run(*command, '--again')[0] == 0 and len(asked) == 6

    def beside(settings: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Any]]:
        monkeypatch.setattr(tool, 'measure', whole)
        assert run('vim_pico', '--size', 80)[0] == 0
        return whole(settings, options)

    monkeypatch.setattr(tool, 'measure', beside)
    assert run(*command, '--size', 96)[0] == 0
    kept = json.loads((tmp_path / 'all.json').read_text())['cells']
    assert [cell['settings']['size'] for cell in kept] == [32, 48, 64, 96, 80]
    asked.clear()
    monkeypatch.setattr(cells, 'describe_machine', lambda device: {'device': 'another', 'date': '', 'load average': 0})
    assert run(*command)[0] == 0 and len(asked) == 3


def test_tables_hold_times_ratios_failures_and_memory(run, asked):
    code, report, _ = run('vim_pico', 'vssd_pico', '--peers', 'test_vit', '--size', 32, 64, 128, 256)
    assert code == 0 and '## Forward, batch 1, float32, cpu' in report and 'Measured on: ' in report
    assert row_of(report, 'vim_pico') == ['`vim_pico`', '30.00', '50.0', '101', '3.00 (3.00 to 3.00)']
    assert row_of(report, 'vssd_pico')[1] == 'failed: out of / memory'
    memory = report[report.index('## Memory'):]
    assert row_of(memory, 'vim_pico') == ['`vim_pico`', '32, 64, 128, 256', 'pixels^1.00 (residual 0.0 %)',
                                          '-0.0 MB + 1000 B a pixel (within 0.0 %)', 'yes']
    name, _, law, _, linear = row_of(memory, 'test_vit')
    assert law == 'pixels^2.00 (residual 0.0 %)' and linear == 'no' and '`vssd_pico`' not in memory


@pytest.mark.parametrize('constant', [0, 3e7, 3e8])
def test_linear_and_quadratic_memory_are_told_apart(tool, constant):
    pixels = np.array([224, 384, 512, 1024]) ** 2.
    noise = np.array([1.02, .98, 1.03, 1])
    line = tool.fit_memory(pixels, noise * (constant + 500 * pixels))
    assert line['linear'] is True and line['slope'] == pytest.approx(500, rel=.1)
    square = tool.fit_memory(pixels, noise * (constant + 5e-3 * pixels ** 2))
    assert square['linear'] is False and square['deviation'] > 2 * line['deviation']
    if not constant:
        assert line['exponent'] == pytest.approx(1, abs=.03) and square['exponent'] == pytest.approx(2, abs=.03)
        assert 0 < line['residual'] < .05


def test_a_curve_that_sizes_do_not_show_is_not_judged(tool):
    assert tool.fit_memory([32 ** 2], [1e6]) is None
    assert tool.fit_memory([32 ** 2, 64 ** 2], [0, 1e6]) is None
    assert tool.fit_memory([224 ** 2, 512 ** 2], [1e8, 5e8])['linear'] is None
    assert tool.fit_memory([224 ** 2, 384 ** 2, 512 ** 2], [1e8, 1.001e8, 1.002e8])['linear'] is None


def test_limits_are_judged_by_the_median_of_quotients(tool, run, asked, monkeypatch):
    monkeypatch.setattr(tool, 'BARS', (tool.Bar(('vmamba_pico', 'vim_pico'), 'test_vit', 32, (1, 8), 2.),
                                       tool.Bar(('test_vit',), 'test_vit', 64, (1,), 1.)))
    code, report, _ = run('vmamba_pico', '--peers', 'test_vit', '--size', 32, '--bars')
    assert code == 0 and '- met: vmamba_pico / test_vit, batch 1, 32 x 32: 2.00' in report
    assert '- not measured: vim_pico / test_vit, batch 1' in report and report.count('not measured') == 4
    code, report, _ = run('vim_pico', '--peers', 'test_vit', '--size', 32, 64, '--bars')
    assert code == 1 and '- not met: vim_pico / test_vit, batch 1, 32 x 32: 3.00 (3.00 to 3.00), limit 2.0' in report
    assert '- not met: test_vit / test_vit, batch 1, 64 x 64: 1.00' in report, 'faster is below 1'


def test_quotients_are_taken_within_rounds(tool):
    rows = [{'model': 'a', 'rounds_ms': [10, 20, 60], 'least_ms': 10}, {'model': 'b', 'rounds_ms': [5, 20, 20]}]
    for row in rows:
        row |= {'ms': 20, 'least_ms': 5}
    cell = {'rows': [*rows, {'model': 'c', 'error': 'none'}]}
    assert tool.ratio(cell, 'a', 'b') == (2, 1.5, 2.5) and tool.ratio(cell, 'a', 'c') is None


def test_pictures_and_tables_are_made_again_without_measuring(run, asked, tmp_path):
    assert run('vim_pico', 'vmamba_pico', '--peers', 'test_vit', '--size', 32, 64, '--batch-size', 1, 8)[0] == 0
    code, report, _ = run('--render', '--plot', tmp_path / 'new' / 'plot.png', '--markdown', tmp_path / 'table.md')
    assert code == 0 and len(asked) == 4 and (tmp_path / 'table.md').read_text() == report
    with Image.open(tmp_path / 'new' / 'plot.png') as picture:
        # a row of panels for each batch, in several colours
        assert picture.width > 1000 and picture.height > 1000 and len(picture.convert('RGB').getcolors(10 ** 6)) > 10


def test_families_have_colours_and_peers_dashes(tool):
    styles = tool._styles({'vim_tiny': False, 'vim_pico': False, 'deit_tiny_patch16_224': True,
                           'deit_small_patch16_224': True, 'resnet18': True, 'vim2_tiny': False})
    assert styles['vim_tiny']['color'] == styles['vim_pico']['color']
    assert styles['vim_tiny']['marker'] != styles['vim_pico']['marker']
    assert styles['deit_tiny_patch16_224']['linestyle'] != styles['deit_small_patch16_224']['linestyle'] != '-'
    assert len({styles[name]['color'] for name in styles}) == 4 and styles['vim2_tiny']['linestyle'] == '-'


@pytest.mark.parametrize(('arguments', 'code', 'text'), [
    ((), 2, 'give models or --preset'),
    (('vim_pcio',), 1, "Did you mean 'vim_pico'"),
    (('vim_pico', '--peers', 'nonsense_net'), 1, "Unknown model 'nonsense_net'"),
    (('vim_pico', '--size', 0), 2, '--size must be 1 or more'),
    (('vim_pico', '--threads', 10 ** 6), 1, f'{10 ** 6} is more than the'),
    (('vim_pico', '--min-seconds', -1), 2, '--min-seconds must be 0 or more'),
    (('vim_pico', '--min-seconds', 'nan'), 2, '--min-seconds must be 0 or more'),
    (('vim_pico', '--plot', 'plot.pdf'), 1, 'must end in .png'),
    (('vim_pico', '--device', 'nonsense'), 1, 'nonsense'),
    (('vim_pico', '--render'), 2, 'no models'),
    (('--render',), 1, 'holds nothing to report'),
], ids=str)
def test_bad_options_end_in_one_line(run, asked, arguments, code, text):
    found, out, said = run(*arguments)
    assert found == code and text in said and out == '' and not asked and 'Traceback' not in said


def test_what_cannot_be_written_or_read_is_refused_before_the_work(run, asked, monkeypatch, tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'is a file' in run('vim_pico', '--plot', tmp_path / 'file' / 'plot.png')[2]
    for option in ('--plot', '--markdown'):
        assert f'{option} {tmp_path} is a folder' in run('vim_pico', option, tmp_path)[2]
        if Path('/proc').is_dir():  # takes no files from anybody, though root has the right to write
            assert f'{option} /proc/new/x.png: the folder /proc cannot' in run('vim_pico', option, '/proc/new/x.png')[2]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'matplotlib', None)
        code, _, said = run('vim_pico', '--plot', tmp_path / 'plot.png')
        assert code == 1 and "--plot needs matplotlib, which is not installed: pip install 'visionssm[mm]'" in said
    of_kernels = '{"cells": [{"settings": {"op": "ssd"}, "environment": {}, "rows": []}]}'
    for damaged in ('{', '[]', '{"cells": [{}]}', of_kernels):
        (tmp_path / 'all.json').write_text(damaged)
        code, _, said = run('vim_pico')
        assert code == 1 and 'is no file of this tool, or is damaged' in said
    assert not asked


@pytest.fixture
def gpu_script(repo_root: Path, tmp_path: Path) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs the script with a Python that writes down how it is called, and fails where a pattern of the shell says."""
    python, log = tmp_path / 'python', tmp_path / 'log'
    python.write_text('#!/bin/sh\necho "$@" >> "$LOG"\ncase "$*" in $FAIL) exit 1;; *freeze*) echo torch==1.0;; esac\n'
                      'while [ $# -gt 1 ]; do [ "$1" = --json ] && touch "$2"; shift; done; exit 0\n')
    python.chmod(0o755)

    def call(*arguments: str, fail: str = 'nothing') -> tuple[int, str, list[str]]:
        log.write_text('')
        environment = {'PATH': '/usr/bin:/bin', 'PYTHON': str(python), 'LOG': str(log), 'FAIL': fail}
        done = subprocess.run([str(repo_root / 'tools' / 'benchmark_gpu.sh'), *arguments], env=environment,
                              capture_output=True, text=True, check=False)
        return done.returncode, done.stderr, log.read_text().splitlines()[1:]

    return call


def test_the_script_for_a_gpu_goes_on_after_a_part_that_fails(gpu_script, tmp_path):
    out = tmp_path / 'out'
    code, _, calls = gpu_script(str(out), 'cpu', fail='*--channels-last*')
    assert code == 1 and [call.split()[1] for call in calls] == ['--preset'] * 5 + ['--render'] * 4
    assert [Path(call.split()[0]).stem for call in calls].count('benchmark_kernels') == 2
    for name in ('kernels', 'classification'):
        assert '--bars' in next(call for call in calls if f'{out}/{name}.png' in call)
    for wrong in ((), ('--help',), ('--with-mamba', str(out))):
        code, said, calls = gpu_script(*wrong)
        assert code == 2 and said.startswith('usage: ') and not calls
    code, said, calls = gpu_script(str(out), 'cpu', fail='*torch.zeros*')
    assert code == 1 and 'can use cpu' in said and not calls


def test_the_script_for_a_gpu_builds_mamba_ssm_only_if_asked_and_goes_on_without_it(gpu_script, tmp_path):
    out = str(tmp_path / 'out')
    code, said, calls = gpu_script('--with-mamba-ssm', out, 'cpu', fail='*selective_scan_fn*')
    assert code == 0 and 'could not be built' in said and len(calls) == 5 + 10
    assert (tmp_path / 'out' / 'constraints.txt').read_text() == 'torch==1.0\n'
    assert '--no-binary mamba-ssm' in calls[3] and f'--constraint {out}/constraints.txt' in calls[3]
    code, said, calls = gpu_script('--with-mamba-ssm', out, 'cpu')
    assert code == 0 and 'built' not in said and len(calls) == 1 + 10
