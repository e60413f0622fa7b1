"""The tool that makes the table of exports: it goes on after a stop, keeps failures, and the page shows its rows."""
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.export
pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('make_export_table')


@pytest.fixture
def in_folder(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int]]]:
    """Let the tool write elsewhere and measure nothing; return what it asked to be measured."""
    asked = []

    def measure(name: str, size: tuple[int, int], dynamic: bool, runs: int) -> dict:
        asked.append((name, tuple(size)))
        if name == 'dis_pico':
            return {'error': 'no memory'}
        return {'pictures': [1, 3] if dynamic else [1], 'relative_error': 3e-7, 'nodes': 12, 'megabytes': 1.25,
                'onnxruntime_ms': 30., 'pytorch_ms': 20., 'file': 'dropped'}

    monkeypatch.setattr(tool, 'measure', measure)
    monkeypatch.setattr(tool, 'PAGE', tmp_path / 'page.md')
    monkeypatch.setattr(tool, 'ROWS', tmp_path / 'rows.json')
    tool.PAGE.write_text(f'before\n{tool.BEGIN}\nold\n{tool.END}\nafter\n')
    return asked


def test_the_committed_page_shows_the_committed_rows(tool: ModuleType, capsys: pytest.CaptureFixture):
    assert tool.main(['--check']) == 0, capsys.readouterr().err


def test_every_family_is_in_the_table(tool: ModuleType):
    known = tool.tasks()
    assert {tool.family(name, known[name]) for name in tool.MODELS} == {
        tool.family(name, task) for name, task in known.items()}


def test_each_model_is_compared_at_two_sizes_in_the_table(tool: ModuleType, in_folder: list):
    assert tool.main(['vim_pico', '--dynamic']) == 0
    assert in_folder == [('vim_pico', (32, 32)), ('vim_pico', (24, 32))]
    page = tool.PAGE.read_text()
    assert page.startswith('before\n') and page.endswith('\nafter\n') and 'old' not in page
    row = next(line for line in page.splitlines() if '`vim_pico`' in line)
    assert [cell.strip() for cell in row.strip('|').split('|')] == [
        '`vim_pico`', 'classification', '32 x 32', '1, 3', '3.0e-07', '12', '1.2', '30', '20', '1.50']
    assert 'onnxruntime' in page and tool.main(['--check']) == 0
    tool.PAGE.write_text(page.replace('3.0e-07', '1.0e-07'))
    assert tool.main(['--check']) == 1


def test_finished_rows_are_not_measured_again_and_failed_ones_are(tool: ModuleType, in_folder: list):
    assert tool.main(['vim_pico', 'dis_pico']) == 1
    assert 'failed: no memory' in tool.PAGE.read_text()
    in_folder.clear()
    assert tool.main(['vim_pico', 'dis_pico']) == 1
    assert {name for name, _ in in_folder} == {'dis_pico'}
    rows = json.loads(tool.ROWS.read_text())
    for row in rows.values():
        row['setup']['torch'] = 'older'
    tool.ROWS.write_text(json.dumps(rows))
    tool.main(['vim_pico'])
    assert ('vim_pico', (32, 32)) in in_folder


@pytest.mark.parametrize(('arguments', 'rows', 'message'), [
    (['vim_picc'], '{}', 'vim_picc'),
    (['vim_pico'], '{', 'damaged'),
])
def test_bad_input_is_told(tool: ModuleType, in_folder: list, arguments: list[str], rows: str, message: str,
                           capsys: pytest.CaptureFixture):
    tool.ROWS.write_text(rows)
    assert tool.main(arguments) == 1
    assert message in capsys.readouterr().err and not in_folder


def test_a_failed_export_is_a_row(tool: ModuleType):
    assert 'multiples of 32' in tool.measure('mamba_yolo_pico', (20, 20), False, 0)['error']
