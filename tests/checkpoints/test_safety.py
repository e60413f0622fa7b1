"""Hostile files: none runs anything, none takes more memory than its size explains, and each is told to be hostile."""
import builtins
import collections
import io
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from visionssm.checkpoints import CheckpointError, load_state_dict, read_checkpoint, read_ultralytics, unwrap
from visionssm.checkpoints.archive import check_archive

READERS = {'state dicts': read_checkpoint, 'ultralytics': read_ultralytics}


class Run:
    """Calls a function when it is unpickled, in one of the ways that pickle has."""

    def __init__(self, function, *arguments, how: str = 'reduce') -> None:
        self.call, self.how = (function, arguments), how

    def __reduce_ex__(self, protocol: int) -> tuple:
        if self.how == 'reduce':
            return self.call
        if self.how == 'state':  # an object whose state is the result of the call
            return collections.OrderedDict, (), {'state': Run(*self.call[0:1], *self.call[1])}
        return nn.Identity, (), None, iter([Run(*self.call[0:1], *self.call[1])]), None


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / 'ran'


def payloads(marker: Path) -> dict[str, object]:
    touch = f'touch {marker}'
    code = f'open({str(marker)!r}, "w")'
    return {
        'system': Run(os.system, touch),
        'eval': Run(builtins.eval, code),
        'exec': Run(builtins.exec, code),
        'open': Run(builtins.open, str(marker), 'w'),
        'in the state': Run(os.system, touch, how='state'),
        'in the items': Run(os.system, touch, how='items'),
        'getattr of a module': Run(getattr, Run(__import__, 'os'), 'system'),
        'deep in a partial': {'a': [Run(Run, os.system, touch)]},
        'array of objects': np.array([Run(os.system, touch)], dtype=object),
    }


@pytest.mark.parametrize('reader', READERS)
@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('place', ['model', 'ema', 'optimizer'])
def test_nothing_that_a_file_holds_runs(tmp_path: Path, marker: Path, reader: str, legacy: bool, place: str):
    weights = {'w': torch.ones(2)}
    for name, payload in payloads(marker).items():
        path = tmp_path / 'evil.pth'
        torch.save({'model': weights, 'ema': {'w': torch.ones(2)}, place: payload}, path,
                   _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError):
            READERS[reader](path)
        assert not marker.exists(), name


def test_the_payloads_are_live(tmp_path: Path, marker: Path):
    """What the tests above show is worth something only if these files do run where nobody looks."""
    for name in ('system', 'eval', 'in the state'):
        torch.save(payloads(marker)[name], tmp_path / 'evil.pth')
        torch.load(tmp_path / 'evil.pth', weights_only=False)
        assert marker.exists(), name
        marker.unlink()


def test_a_plain_pickle_and_the_tar_format_run_nothing(tmp_path: Path, marker: Path):
    evil = pickle.dumps({'w': payloads(marker)['system']})
    (tmp_path / 'plain.pth').write_bytes(evil)
    with tarfile.open(tmp_path / 'tar.pth', 'w') as tar:
        for name in ('storages', 'tensors', 'pickle', '../../ran'):
            info = tarfile.TarInfo(name)
            info.size = len(evil)
            tar.addfile(info, io.BytesIO(evil))
    for name in ('plain.pth', 'tar.pth'):
        for read in READERS.values():
            with pytest.raises(CheckpointError):
                read(tmp_path / name)
    assert not marker.exists()


def test_shells_do_not_run_what_their_state_holds(tmp_path: Path, marker: Path):
    """`__setstate__` and `__reduce_ex__` of foreign classes belong to shells; state does not reach methods."""
    model = nn.Sequential(nn.Linear(1, 1))
    model.__dict__['__setstate__'] = model.__dict__['forward'] = 'os.system'
    torch.save({'model': model, 'ema': None}, tmp_path / 'm.pt')
    assert set(read_ultralytics(tmp_path / 'm.pt')['state_dict']) == {'0.weight', '0.bias'}
    assert not marker.exists()


def repack(path: Path, change=None, compress: int = zipfile.ZIP_STORED, extra: dict[str, bytes] | None = None) -> Path:
    """Write an archive of `torch.save` again with other content, names or compression."""
    with zipfile.ZipFile(path) as source:
        content = {info.filename: source.read(info) for info in source.infolist()}
    target = path.with_name('changed.pth')
    with zipfile.ZipFile(target, 'w', compress) as archive:
        for name, data in {**content, **(extra or {})}.items():
            archive.writestr(name, change(data) if change and name.endswith('data.pkl') else data)
    return target


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / 'w.pth'
    torch.save({'w': torch.ones(7)}, path)
    return path


@pytest.mark.parametrize('name', ['../../ran', '/etc/ran', 'w/../../ran', 'C:\\ran', 'w\\..\\ran'])
def test_names_that_lead_out_of_the_archive_are_refused(saved: Path, name: str):
    with pytest.raises(CheckpointError, match='whose name leads out of the archive'):
        read_checkpoint(repack(saved, extra={name: b'x'}))


def test_a_zip_bomb_is_refused_unread(saved: Path):
    path = repack(saved, compress=zipfile.ZIP_DEFLATED, extra={'w/data/9': bytes(5 << 20)})
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="'w/data/9' of .* bytes that grows to 5242880"):
        read_checkpoint(path)


def test_entries_that_share_their_bytes_are_refused(saved: Path):
    """One block of data, listed by many entries: each is honest, their sum is not."""
    with zipfile.ZipFile(saved) as source:
        pickled = source.read('w/data.pkl')
    block, packed = bytes(1 << 16), b''
    local = struct.pack('<4s5H3I2H', b'PK\x03\x04', 20, 0, 0, 0, 0, zlib.crc32(block), len(block), len(block), 8, 0)
    packed += local + b'w/data/0' + block
    central = b''
    for i in range(100):
        name = f'w/data/{i:02}'.encode()
        central += struct.pack('<4s6H3I5H2I', b'PK\x01\x02', 20, 20, 0, 0, 0, 0, zlib.crc32(block), len(block),
                               len(block), len(name), 0, 0, 0, 0, 0, 0) + name
    end = struct.pack('<4s4H2IH', b'PK\x05\x06', 0, 0, 100, 100, len(central), len(packed), 0)
    path = saved.with_name('shared.pth')
    path.write_bytes(packed + central + end)
    assert pickled
    with pytest.raises(CheckpointError, match='they share their bytes'):
        check_archive(path)


def claim(elements: int, shape: int):
    """Changes a pickle of seven ones so that it claims other sizes."""
    def change(data: bytes) -> bytes:
        number = {value: b'\x8a\x08' + struct.pack('<q', value) for value in (elements, shape)}
        assert data.count(b'K\x07') == 2
        head, middle, tail = data.split(b'K\x07')
        return head + number[elements] + middle + number[shape] + tail
    return change


@pytest.mark.parametrize(('elements', 'shape', 'message'), [
    (10**12, 10**12, 'claim'), (1000, 1000, 'claims 4000 bytes, of which 28 are stored'),
    (7, 10**12, 'claim to hold over'), (-7, 7, 'a storage of -7 elements')])
def test_tensors_larger_than_their_file_are_refused(saved: Path, elements: int, shape: int, message: str):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(repack(saved, claim(elements, shape)))


def test_expanded_tensors_of_absurd_size_are_refused(tmp_path: Path):
    torch.save({'w': torch.ones(1).expand(10**9)}, tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match='claim to hold over 3815 MiB'):
        read_checkpoint(tmp_path / 'w.pth')
    torch.save({'w': torch.ones(1).expand(10**6)}, tmp_path / 'w.pth')
    assert load_state_dict(tmp_path / 'w.pth')['w'].shape == (10**6,)


def test_absurd_sizes_in_the_old_format_are_refused(tmp_path: Path):
    path = tmp_path / 'w.pth'
    torch.save({'w': torch.ones(7)}, path, _use_new_zipfile_serialization=False)
    assert load_state_dict(path)['w'].numel() == 7
    data = path.read_bytes()
    assert data.count(b'K\x07') == 2
    path.write_bytes(claim(10**10, 7)(data))
    with pytest.raises(CheckpointError, match='claim 40000000000 bytes'):
        read_checkpoint(path)


def test_a_request_for_memory_without_content_is_refused(tmp_path: Path):
    torch.save({'w': Run(bytearray, 10**12)}, tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match='asks for a .*bytearray of 1000000000000 elements'):
        read_checkpoint(tmp_path / 'w.pth')


def test_honest_files_of_every_kind_pass(tmp_path: Path):
    shared = torch.randn(64, 64)
    content = {
        'model': {'a': shared, 'b': shared, 'c': shared[3], 'h': shared.half(), 'i': torch.arange(3),
                  'p': nn.Parameter(shared), 'n': torch.zeros(0)},
        'best': np.float64(82.5), 'epoch': np.int64(7), 'ok': np.bool_(True), 'lr': np.float32(0.5)}
    for legacy in (False, True):
        torch.save(content, tmp_path / 'c.pth', _use_new_zipfile_serialization=not legacy)
        found = read_checkpoint(tmp_path / 'c.pth')
        assert {key: found[key] for key in ('best', 'epoch', 'ok', 'lr')} == {
            'best': 82.5, 'epoch': 7, 'ok': True, 'lr': 0.5}
        assert not isinstance(found['best'], np.generic)
        assert torch.equal(found['model']['b'], shared)


def test_a_type_of_numpy_that_is_no_number_becomes_nothing(tmp_path: Path):
    torch.save({'w': torch.ones(1), 'name': np.str_('x'), 'when': np.datetime64('2024-01-01')}, tmp_path / 'c.pth')
    found = read_checkpoint(tmp_path / 'c.pth')
    assert found['name'] in (None, 'x') and found['when'] is None


def test_what_the_user_allowed_stays_allowed(tmp_path: Path):
    torch.save({'w': torch.ones(1)}, tmp_path / 'c.pth')
    with torch.serialization.safe_globals([(str, 'numpy.dtype')]):
        read_checkpoint(tmp_path / 'c.pth')
        assert (str, 'numpy.dtype') in torch.serialization.get_safe_globals()


def test_averages_of_mmengine_and_torch_are_unwrapped():
    weights = {'a': torch.ones(1)}
    average = {'steps': torch.tensor(9), 'module.a': weights['a']}
    assert unwrap({'state_dict': {'a': torch.zeros(1)}, 'ema_state_dict': average}, ema=True) == weights
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1)).state_dict()
    assert set(unwrap({'ema_state_dict': average}, ema=True)) == {'weight', 'bias'}
    assert unwrap({'model_state_dict': weights, 'epoch': 3, 'min_loss': .1}) == weights
    assert set(unwrap({'steps': torch.ones(1), 'a': torch.ones(1)})) == {'steps', 'a'}
