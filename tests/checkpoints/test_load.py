"""Weight files: what is read, what is refused and how, and that writing never leaves a part."""
import argparse
import errno
import os
import pickle
import sys
import threading
import types
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from visionssm.checkpoints import CheckpointError, check_fit, load_state_dict, read_checkpoint, save_safetensors, unwrap
from visionssm.checkpoints.load import safe_settings


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return nn.Linear(3, 2).state_dict()


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value)


def test_written_safetensors_are_read_back(tmp_path: Path, weights):
    path = save_safetensors(weights, tmp_path / 'deep' / 'w.safetensors', {'origin': 'here'})
    assert_same(load_state_dict(path), weights)
    with safetensors.safe_open(path, 'pt') as file:
        assert file.metadata() == {'format': 'pt', 'origin': 'here'}


def test_tensors_that_share_memory_can_be_written(tmp_path: Path):
    shared = torch.randn(4)
    path = save_safetensors({'a': shared, 'b': shared, 'c': shared[1:3]}, tmp_path / 'w.safetensors')
    assert_same(load_state_dict(path), {'a': shared, 'b': shared, 'c': shared[1:3]})


@pytest.mark.parametrize('wrapper', ['model', 'state_dict', 'module'])
def test_training_checkpoint_is_unwrapped(tmp_path: Path, weights, wrapper: str):
    torch.save({wrapper: weights, 'epoch': 3, 'args': argparse.Namespace(lr=1e-3)}, tmp_path / 'c.pth')
    assert_same(load_state_dict(tmp_path / 'c.pth'), weights)


def test_configurations_of_yacs_are_read_as_dictionaries(tmp_path: Path, weights, monkeypatch: pytest.MonkeyPatch):
    """What the training scripts that descend from Swin's leave in their files; the package itself is not needed."""
    module = types.ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    config = module.CfgNode(MODEL=module.CfgNode(NAME='tiny', DEPTHS=[2, 4]))
    config.__dict__['__immutable__'] = True
    torch.save({'model': weights, 'config': config}, tmp_path / 'c.pth')
    monkeypatch.undo()
    assert_same(load_state_dict(tmp_path / 'c.pth'), weights)
    assert read_checkpoint(tmp_path / 'c.pth')['config'] == {'MODEL': {'NAME': 'tiny', 'DEPTHS': [2, 4]}}


@pytest.mark.parametrize(('ema', 'value'), [(False, 1.), (True, 2.)])
def test_averaged_weights_are_taken_on_demand(tmp_path: Path, ema: bool, value: float):
    torch.save({'model': {'w': torch.ones(1)}, 'model_ema': {'w': torch.full((1,), 2.)}}, tmp_path / 'c.pth')
    assert load_state_dict(tmp_path / 'c.pth', ema=ema)['w'].item() == value


@pytest.mark.parametrize(('name', 'value'), [
    ('best_ema.pth', 2.), ('ema_best.pth', 1.), ('best.pth', 1.), ('schema.pth', 1.)])
def test_averaged_weights_are_taken_from_files_named_so(tmp_path: Path, name: str, value: float):
    torch.save({'model': {'w': torch.ones(1)}, 'model_ema': {'w': torch.full((1,), 2.)}}, tmp_path / name)
    assert load_state_dict(tmp_path / name)['w'].item() == value


def test_wrapper_prefixes_are_stripped():
    assert unwrap({'state_dict': {'module._orig_mod.a.module.b': 1}}) == {'a.module.b': 1}


def test_whole_checkpoint_can_be_read(tmp_path: Path, weights):
    torch.save({'model': weights, 'args': argparse.Namespace(lr=0.5)}, tmp_path / 'c.pth')
    assert read_checkpoint(tmp_path / 'c.pth')['args'].lr == 0.5


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        load_state_dict(tmp_path / 'nowhere.pth')


@pytest.mark.parametrize('name', ['empty.pth', 'empty.safetensors'])
def test_empty_file_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r'is empty \(0 bytes\)'):
        load_state_dict(tmp_path / name)


@pytest.mark.parametrize('keep', [0.05, 0.5, 0.95])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_half_written_file_is_refused(tmp_path: Path, weights, suffix: str, keep: float):
    path = tmp_path / f'w{suffix}'
    save_safetensors(weights, path) if suffix == '.safetensors' else torch.save(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * keep)])
    with pytest.raises(CheckpointError, match='cut off, damaged or not a checkpoint'):
        load_state_dict(path)


@pytest.mark.parametrize('content', [b'hello world, I am a text file', b'\x89PNG\r\n\x1a\n' * 9, b'\x80\x02.'])
def test_file_of_another_kind_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / 'w.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match='not a checkpoint|not a dictionary'):
        load_state_dict(tmp_path / 'w.pth')


def test_file_that_would_run_code_is_refused_by_name(tmp_path: Path):
    torch.save({'model': {'w': torch.ones(1)}, 'hook': os.system}, tmp_path / 'c.pth')
    with pytest.raises(CheckpointError, match='posix.system|os.system'):
        load_state_dict(tmp_path / 'c.pth')


def test_file_of_the_old_format_that_would_run_code_is_refused_by_name(tmp_path: Path):
    torch.save({'model': os.system}, tmp_path / 'c.pth', _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match='are not loaded from files: (posix|os).system'):
        load_state_dict(tmp_path / 'c.pth')


def test_pickle_of_another_program_is_refused_without_advice_to_run_it(tmp_path: Path):
    (tmp_path / 'c.pkl').write_bytes(pickle.dumps({'model': os.system}, protocol=4))
    with pytest.raises(CheckpointError, match='UnpicklingError: Unsupported operand'):
        load_state_dict(tmp_path / 'c.pkl')


def test_keys_that_are_no_strings_are_listed_like_others(tmp_path: Path):
    torch.save({1: torch.ones(1)}, tmp_path / 'c.pth')
    with pytest.raises(CheckpointError, match='1 unexpected: 1'):
        check_fit(torch.nn.Identity(), load_state_dict(tmp_path / 'c.pth'))


@pytest.mark.parametrize(('content', 'message'), [
    ([torch.ones(1)], 'holds a list'), ({'epoch': 4, 'lr': 0.1}, 'holds no tensors. It holds: epoch, lr')])
def test_file_without_weights_is_refused(tmp_path: Path, content, message: str):
    torch.save(content, tmp_path / 'c.pth')
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(tmp_path / 'c.pth')


def test_every_difference_is_listed_in_one_error():
    given = {'weight': torch.zeros(2, 4), 'extra': torch.zeros(1), 'more': torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        check_fit(nn.Linear(3, 2), given)
    message = str(error.value)
    assert '1 missing: bias' in message
    assert '2 unexpected: extra, more' in message
    assert '1 mis-shaped: weight is (2, 4), expected (2, 3)' in message


def test_fitting_weights_pass(weights):
    check_fit(nn.Linear(3, 2), weights)


def disk_full(*args, **kwargs) -> None:
    Path(args[1]).write_bytes(b'the first half')
    raise OSError(errno.ENOSPC, 'No space left on device')


def library_error(*args, **kwargs) -> None:
    Path(args[1]).write_bytes(b'the first half')
    raise safetensors.SafetensorError('I/O error: No space left on device (os error 28)')


@pytest.mark.parametrize('fail', [disk_full, library_error])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, weights, monkeypatch, fail):
    path = save_safetensors(weights, tmp_path / 'w.safetensors')
    monkeypatch.setattr(safetensors.torch, 'save_file', fail)
    with pytest.raises(OSError, match='No space left on device'):
        save_safetensors({'weight': torch.zeros(9)}, path)
    monkeypatch.undo()
    assert_same(load_state_dict(path), weights)
    assert [p.name for p in tmp_path.iterdir()] == ['w.safetensors']


def test_written_file_follows_the_umask(tmp_path: Path, weights):
    old = os.umask(0o027)
    try:
        path = save_safetensors(weights, tmp_path / 'w.safetensors')
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_threads_do_not_take_from_each_other_what_their_files_may_name(tmp_path: Path, weights, monkeypatch):
    torch.save({'model': weights, 'args': argparse.Namespace(lr=1e-3)}, tmp_path / 'c.pth')
    reads, goes_on, found = threading.Event(), threading.Event(), []
    load = torch.load

    def wait_and_load(*args, **kwargs):
        reads.set()
        goes_on.wait(10)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, 'load', wait_and_load)
    other = threading.Thread(target=lambda: found.append(load_state_dict(tmp_path / 'c.pth')))
    with safe_settings():
        other.start()
        reads.wait(0.2)  # in vain, where one waits for the other
    goes_on.set()
    other.join()
    assert_same(found[0], weights)
