"""Model cards: complete, right, and the same in the documentation as on the command line."""
import dataclasses
from collections.abc import Callable
from types import ModuleType

import pytest

import visionssm
from visionssm.checkpoints import entries
from visionssm.commands import cards


@pytest.fixture(scope='module')
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('make_model_cards')


def test_the_documentation_is_what_catalogue_and_registry_give(tool, capsys):
    assert tool.main(['--check', '--quick']) == 0, capsys.readouterr().err


@pytest.mark.parametrize('name', ['vim_tiny', 'vim2_tiny', 'vmamba_tiny', 'vssd_tiny', 'spatial_mamba_tiny',
                                  'mamba2d_nano', 'mhs_vm_unet_4h', 'mamba_yolo_tiny', 'mambair_light_sr_x2',
                                  'mambairv2_light_sr_x2', 'dis_small_patch2'])
def test_the_stored_sizes_of_a_model_of_each_family_are_those_measured_now(name):
    stored = dict(cards.measured()[name])
    stored.pop('measured', None)
    assert cards.measure_model(name) == stored


def test_every_model_has_stored_sizes_and_a_family_of_the_catalogue(tool):
    assert sorted(cards.measured()) == visionssm.list_models()
    assert {cards.family_of(name) for name in cards.tasks()} == set(cards.families())


def test_a_stale_page_is_refused_and_what_differs_is_named(tool, tmp_path, capsys, monkeypatch):
    text = (tool.DOCS / 'models' / 'vim.md').read_text()
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models' / 'vim.md').write_text(text.replace('7,148,008', '7,148,009'))
    for name in ('checkpoints.md', 'comparison.md'):
        (tmp_path / name).write_text((tool.DOCS / name).read_text())
    for name, value in (('DOCS', tmp_path), ('ROOT', tmp_path.parent), ('MEASURED', tmp_path / 'measured.json')):
        monkeypatch.setattr(tool, name, value)
    assert tool.main(['--check', '--quick']) == 1
    assert '7,148,009' in capsys.readouterr().err
    assert tool.main(['--quick']) == 0
    assert tool.main(['--check', '--quick']) == 0
    assert (tmp_path / 'models' / 'vim.md').read_text() == text
    (tmp_path / 'models' / 'vim.md').write_text('# Vim\n')
    with pytest.raises(ValueError, match='must have one part each of <!-- generated: models -->'):
        tool.main(['--check', '--quick'])


def test_numbers_of_model_files_belong_to_weights_and_do_not_contradict_the_catalogue():
    known = {entry.name: entry for entry in entries()}
    for name in cards.tasks():
        module = cards.model_module(name)
        tagged = {f'{model}.{tag}' for model, default in module.default_cfgs.items() for tag in default.tags if tag}
        for key, results in getattr(module, 'official_results', {}).items():
            assert key in tagged, f'{module.__name__}: {key}'
            assert results.keys() <= {'top1', 'top5', 'trained_on'}, key
            assert {**results, **known[key].metric} == {**known[key].metric, **results}, key


def test_a_paper_becomes_an_entry_for_bibtex():
    card = cards.model_card('vm_unet', cards.measured()['vm_unet'])
    assert card.bibtex().startswith('@misc{vm_unet,\n  title = {{VM-UNet: ')
    assert 'eprint = {2402.02491}' in card.bibtex()
    assert dataclasses.replace(card, paper=None).bibtex() == ''


def test_metrics_are_named_with_their_data():
    assert cards.format_metric('top1', 82.6) == 'top-1 82.6'
    assert cards.format_metric('psnr_y_urban100', 34.6) == 'PSNR (Y) 34.60 dB on Urban100'
    for entry in entries():
        assert all('_' not in cards.format_metric(*item) for item in entry.metric.items()), entry.name


def test_weights_that_only_a_models_file_names_are_weights_too(monkeypatch):
    monkeypatch.setattr(cards, 'entries', lambda family=None: [])
    found, = cards.weights_of('vim_tiny')
    assert (found.name, found.licence, found.trained_on) == ('vim_tiny.in1k', 'apache-2.0', 'ImageNet-1K')
    assert cards.stated(found) == {'top1': 76.1, 'top5': 93.0}
    assert cards.link_of(found).endswith('vim_t_midclstok_76p1acc.pth')
