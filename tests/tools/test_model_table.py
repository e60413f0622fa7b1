"""The table of all models: made from the registry, never by hand, and complete."""
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import visionssm


@pytest.fixture(scope='module')
def tool(repo_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location('make_model_table', repo_root / 'tools' / 'make_model_table.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_is_what_the_registry_gives(tool, capsys):
    assert tool.main(['--check']) == 0, capsys.readouterr().err


def test_a_stale_table_is_refused_and_what_differs_is_named(tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, 'families', lambda: {visionssm.models.vim: ['vim_tiny', 'vim_pico']})
    page = tmp_path / 'models.md'
    assert tool.main(['--check', '--output', str(page)]) == 1
    assert tool.main(['--output', str(page)]) == 0
    assert tool.main(['--check', '--output', str(page)]) == 0
    tiny, = (line for line in page.read_text().splitlines() if line.startswith('| `vim_tiny`'))
    assert [cell.strip() for cell in tiny.split('|')[2:9]] == [
        '`in1k`', '224 x 224', '7.15', '1.47', '76.1', '93.0', 'ImageNet-1K']
    page.write_text(page.read_text().replace('76.1', '77.1'))
    assert tool.main(['--check', '--output', str(page)]) == 1
    assert '77.1' in capsys.readouterr().err


def test_every_registered_model_is_in_a_family(tool):
    names = [name for found in tool.families().values() for name in found]
    assert sorted(names) == visionssm.list_models('classification')


def test_official_results_belong_to_released_weights(tool):
    for module in tool.families():
        tagged = {f'{name}.{tag}' for name, default in module.default_cfgs.items() for tag in default.tags if tag}
        for key, results in getattr(module, 'official_results', {}).items():
            assert key in tagged, f'{module.__name__}: {key}'
            assert results.keys() <= {'top1', 'top5', 'trained_on'}, key
            assert 50 < results.get('top1', 60) < results.get('top5', 100) <= 100, key
