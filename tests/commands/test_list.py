"""`visionssm list`: which models there are, without building any."""
import pytest

import visionssm
from visionssm.checkpoints import find_entry


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VISIONSSM_CACHE', str(tmp_path))


def names(done) -> list[str]:
    return [row['name'] for row in done.json]


def test_all_models_are_listed_with_size_and_weights(run):
    done = run('list', '--json')
    assert done.code == 0 and sorted(names(done)) == visionssm.list_models()
    row, = (row for row in done.json if row['name'] == 'vssd_tiny')
    assert (row['task'], row['family'], row['parameters']) == ('classification', 'vssd', 24270724)
    assert [(weights['tag'], weights['state']) for weights in row['weights']] == [
        ('in1k', 'to fetch'), ('mesa_in1k', 'to fetch')]


def test_patterns_tasks_and_families_choose(run):
    assert names(run('list', 'vmamba_t*', '--json')) == ['vmamba_tiny', 'vmamba_tiny_m2', 'vmamba_tiny_s2l5',
                                                         'vmamba_tiny_v0']
    assert set(names(run('list', '--task', 'segmentation', 'pico', '--json'))) == {'mhs_vm_unet_pico', 'vm_unet_pico'}
    assert all(name.startswith('mambairv2_') for name in names(run('list', '--family', 'mambairv2', '--json')))
    published = names(run('list', '--pretrained', '--json'))
    assert 'vim_tiny' in published and 'spatial_mamba_tiny' in published
    assert not {'vim_pico', 'dis_small_patch2', 'vim2_tiny'} & set(published)


def test_weights_in_the_cache_are_here(run, tmp_path):
    entry = find_entry('vmamba_tiny.in1k')
    place = tmp_path / entry.family / entry.file
    place.parent.mkdir()
    place.write_bytes(b'weights')
    place.with_name(f'{entry.file}.json').write_text('{"sha256": "0"}')
    assert 'in1k (here)' in run('list', 'vmamba_tiny').out


def test_what_does_not_exist_is_said(run):
    done = run('list', 'resnet')
    assert (done.code, done.out, done.err) == (1, '', 'error: no model is like that.\n')
    done = run('list', '--family', 'vmanba')
    assert done.code == 1 and "Unknown family 'vmanba'" in done.err and 'vmamba' in done.err


def test_listing_builds_no_model(run, monkeypatch):
    monkeypatch.setattr('visionssm.commands.cards.create_model', None)
    assert run('list').code == 0
