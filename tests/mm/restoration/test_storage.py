"""Pictures in folders, LMDBs and MATLAB files: the same pairs from each, and damaged ones refused by name."""
import io
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')
lmdb = pytest.importorskip('lmdb', reason='needs the extra [restoration]')

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from visionssm.openmmlab.restoration import storage  # noqa: E402
from visionssm.openmmlab.restoration.datasets import PairedImages  # noqa: E402
from visionssm.openmmlab.restoration.storage import make_lmdb, open_store  # noqa: E402

NAMES = ('0001', '0002', '0003')


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three good pictures and their halves, of which every pixel is that of the good one at twice the place."""
    for folder in ('HR', 'X2'):
        (tmp_path / folder).mkdir()
    for seed, name in enumerate(NAMES):
        pixels = picture(44, 36, seed)
        Image.fromarray(pixels).save(tmp_path / 'HR' / f'{name}.png')
        Image.fromarray(pixels[::2, ::2]).save(tmp_path / 'X2' / f'{name}x2.png')
    return tmp_path


@pytest.fixture
def bases(folders: Path) -> Path:
    """The same as folders and as LMDBs."""
    make_lmdb([folders / 'HR'], folders / 'HR.lmdb')
    make_lmdb([folders / 'X2'], folders / 'X2.lmdb', strip='x2')
    return folders


def pairs(root: Path, gt: str = 'HR.lmdb', lq: str | None = 'X2.lmdb', **options) -> PairedImages:
    return PairedImages(gt, lq, **{'data_root': str(root), 'scale': 2, 'lq_name': ('{}x{scale}', '{}'), **options})


def write_basicsr(place: Path, entries: dict[str, bytes], meta: str | None) -> Path:
    """An LMDB as BasicSR's own tool leaves it, with a lock file beside the data."""
    with lmdb.open(str(place), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode('ascii'), value)
    if meta is not None:
        (place / 'meta_info.txt').write_text(meta)
    return place


def encoded(pixels: np.ndarray, kind: str = 'PNG') -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(('gt', 'lq'), [('HR.lmdb', 'X2.lmdb'), ('HR.lmdb', 'X2'), ('HR', 'X2.lmdb')])
def test_an_lmdb_gives_the_pairs_of_the_folders(bases, gt, lq):
    plain, packed = pairs(bases, 'HR', 'X2'), pairs(bases, gt, lq)
    assert len(plain) == len(packed) == 3
    for one, other in zip(plain, packed):
        assert torch.equal(one['inputs'], other['inputs']) and torch.equal(one['targets'], other['targets'])
    assert packed[1]['path'] == str(bases / gt / '0002.png' if gt == 'HR' else bases / gt) + (
        '' if gt == 'HR' else ':0002')


def test_bases_of_basicsr_are_read_also_without_the_suffix(tmp_path):
    pixels = picture(20, 16)
    write_basicsr(tmp_path / 'crops', {'a/0001_s001': encoded(pixels), 'b.1': encoded(pixels, 'WEBP')},
                  'a/0001_s001.png (16,20,3) 1\nb.1.png (16,20,3) 1\n')
    store = open_store(tmp_path / 'crops')
    assert store.names == ['a/0001_s001', 'b.1'] and store.pixels(1, 'L').shape == (1, 16, 20)
    assert torch.equal(store.pixels(0), torch.from_numpy(pixels).permute(2, 0, 1))


def test_workers_open_the_base_for_themselves(bases):
    data = pairs(bases, repeat=2)
    # open in this process, from which the workers are forked
    first = data[0]['targets']
    batches = list(DataLoader(data, batch_size=3, num_workers=2, collate_fn=list, multiprocessing_context='fork'))
    assert torch.equal(batches[1][0]['targets'], first) and len(batches) == 2
    again, other = pickle.loads(pickle.dumps(data)), pairs(bases)
    assert torch.equal(again[0]['targets'], first) and torch.equal(other[0]['targets'], first)


def test_a_base_that_was_written_anew_is_opened_anew(bases):
    data = pairs(bases, lq=None, degrade=dict(type='BicubicFault', scale=2))
    before = data[0]['targets']
    for name in ('data.mdb', 'meta_info.txt'):
        (bases / 'HR.lmdb' / name).unlink()
    (bases / 'HR.lmdb').rmdir()
    Image.fromarray(picture(44, 36, 9)).save(bases / 'HR/0001.png')
    make_lmdb([bases / 'HR'], bases / 'HR.lmdb')
    assert not torch.equal(data[0]['targets'], before)


def test_pieces_of_both_pictures_lie_at_the_same_places(folders):
    Image.fromarray(picture(45, 37)).save(folders / 'HR/0001.png')
    Image.fromarray(picture(45, 37)[:36:2, :44:2]).save(folders / 'X2/0001x2.png')
    assert make_lmdb([folders / 'HR'], folders / 'HR.lmdb', 24, 12, multiple=2) == 3 * 6
    assert make_lmdb([folders / 'X2'], folders / 'X2.lmdb', 12, 6, strip='x2') == 3 * 6
    data = pairs(folders)
    assert [pair.target.name for pair in data.pairs[:2]] == ['0001_s001', '0001_s002'] and len(data) == 18
    for sample in data:
        assert sample['targets'].shape == (3, 24, 24)
        assert torch.equal(sample['targets'][:, ::2, ::2], sample['inputs'])
    # the last piece ends with the picture, whatever the step
    whole = torch.from_numpy(picture(45, 37)).permute(2, 0, 1) / 255
    assert torch.equal(data[5]['targets'], whole[:, 12:36, 20:44])


@pytest.mark.parametrize('lq', ['X2', 'X2.lmdb'])
def test_pairs_that_do_not_match_in_name_or_size_are_refused(bases, lq):
    (bases / 'HR/0001.png').rename(bases / 'HR/0007.png')
    with pytest.raises(ValueError, match=r'0007.png has no partner 0007x2 or 0007 in .*X2.* which has 0002|0001'):
        pairs(bases, 'HR', lq)
    (bases / 'HR/0007.png').unlink()
    Image.fromarray(picture(44, 40)).save(bases / 'HR/0002.png')
    with pytest.raises(ValueError, match=r'0002.png has 44 x 40 pixels and .*X2.*0002.* 22 x 18.* 44 x 36'):
        pairs(bases, 'HR', lq)[0]
    with pytest.raises(FileNotFoundError, match='there is no .*X3'):
        pairs(bases, 'HR', lq.replace('2', '3'))


def test_keys_that_do_not_match_are_refused(bases):
    Image.fromarray(picture(22, 18)).save(bases / 'X2/0004x2.png')
    make_lmdb([bases / 'X2'], bases / 'other.lmdb', strip='2')
    with pytest.raises(ValueError, match='0001 has no partner 0001x2 or 0001 in .*other.lmdb, which has 0001x,'):
        pairs(bases, lq='other.lmdb')
    make_lmdb([bases / 'HR'], bases / 'large.lmdb')
    with pytest.raises(ValueError, match=r'HR.lmdb:0001 has 44 x 36 pixels and .*large.lmdb:0001 44 x 36'):
        pairs(bases, lq='large.lmdb')[0]


@pytest.mark.parametrize(('meta', 'reason'), [
    (None, 'bad.lmdb lacks meta_info.txt'),
    ('', 'names no pictures'),
    ('a.png (16,20,3) 1\nb.png\n', r"meta_info.txt, line 2: 'b.png' is not of the form"),
    ('c.png (16,20,3) 1\n', "bad.lmdb has no key 'c', which its meta_info.txt names"),
    ('b.png (16,20,3) 1\n', 'bad.lmdb:b cannot be decoded'),
    ('e.png (16,20,3) 1\n', 'bad.lmdb:e is empty')])
def test_bases_that_cannot_be_used_are_refused_by_name(tmp_path, meta, reason):
    entries = {'a': encoded(picture(20, 16)), 'b': b'no picture', 'e': b''}
    place = write_basicsr(tmp_path / 'bad.lmdb', entries, meta)
    with pytest.raises(ValueError, match=reason):
        open_store(place).pixels(0)


def test_a_base_that_was_cut_off_or_is_none_is_refused(bases):
    data = bases / 'HR.lmdb/data.mdb'
    content = data.read_bytes()
    data.write_bytes(content[:len(content) - 4096])
    with pytest.raises(ValueError, match=r'data.mdb is cut off: it has \d+ bytes and needs \d+'):
        pairs(bases)[0]
    data.write_bytes(b'text' * 4096)
    with pytest.raises(ValueError, match='HR.lmdb cannot be opened as an LMDB'):
        pairs(bases)[0]
    data.unlink()
    with pytest.raises(ValueError, match='HR.lmdb lacks data.mdb'):
        pairs(bases)


def test_the_writer_refuses_and_leaves_nothing_behind(bases, monkeypatch):
    before = sorted(path.name for path in bases.iterdir())
    new = bases / 'new.lmdb'
    with pytest.raises(FileExistsError, match='HR.lmdb exists already'):
        make_lmdb([bases / 'HR'], bases / 'HR.lmdb')
    with pytest.raises(ValueError, match='two pictures are called 0001'):
        make_lmdb([bases / 'HR', bases / 'HR'], new)
    with pytest.raises(ValueError, match=r'0001.png has 44 x 36 pixels, fewer than a piece of 40 x 40'):
        make_lmdb([bases / 'HR'], new, crop=40)
    with pytest.raises(ValueError, match='step is 0'):
        make_lmdb([bases / 'HR'], new, crop=16, step=0)
    with pytest.raises(ValueError, match='must end in .lmdb'):
        make_lmdb([bases / 'HR'], bases / 'new')
    (bases / 'X2/0003x2.png').write_bytes(b'text')
    with pytest.raises(ValueError, match='0003x2.png cannot be decoded'):
        make_lmdb([bases / 'X2'], new)
    assert sorted(path.name for path in bases.iterdir()) == before
    monkeypatch.setattr(storage, 'MAP_SIZE', 2**14)
    assert make_lmdb([bases / 'HR'], new, crop=32, step=4) == 3 * 2 * 4 and len(pairs(bases, 'new.lmdb', None, degrade={
        'type': 'BicubicFault', 'scale': 2})) == 24


def test_the_tool_packs_and_names_what_is_wrong(folders, load_tool, capsys):
    make = load_tool('make_lmdb').main
    assert make([str(folders / 'X2'), str(folders / 'X2.lmdb'), '--crop', '8', '--step', '8', '--strip', 'x2']) == 0
    shown = capsys.readouterr()
    assert 'X2.lmdb: 27 pictures' in shown.out and '3/3' in shown.err
    with pytest.raises(SystemExit, match='exists already'):
        make([str(folders / 'X2'), str(folders / 'X2.lmdb')])
    with pytest.raises(SystemExit, match='there is no'):
        make([str(folders / 'X5'), str(folders / 'X5.lmdb')])


def test_blocks_of_a_matlab_file_are_pairs(tmp_path):
    scipy_io = pytest.importorskip('scipy.io', reason='needs the extra [restoration]')
    blocks = np.random.default_rng(0).integers(0, 255, (2, 3, 16, 20, 3), dtype=np.uint8)
    scipy_io.savemat(tmp_path / 'Gt.mat', {'ValidationGtBlocksSrgb': blocks}, do_compression=True)
    scipy_io.savemat(tmp_path / 'Noisy.mat', {'ValidationNoisyBlocksSrgb': blocks[::-1]})
    data = pairs(tmp_path, 'Gt.mat', 'Noisy.mat', scale=1)
    sample = data[4]
    assert len(data) == 6 and sample['path'].endswith('Gt.mat:00004')
    assert torch.equal(sample['targets'], torch.from_numpy(blocks[1, 1]).permute(2, 0, 1) / 255)
    assert torch.equal(sample['inputs'], torch.from_numpy(blocks[0, 1]).permute(2, 0, 1) / 255)
    assert len(pickle.dumps(data)) < 5000
    (tmp_path / 'Gt.mat').write_bytes(b'text' * 100)
    scipy_io.savemat(tmp_path / 'Noisy.mat', {'x': blocks[..., 0]})
    for name, reason in (('Gt.mat', 'cannot be read as a MATLAB file'), ('Noisy.mat', 'must hold one array')):
        with pytest.raises(ValueError, match=reason):
            open_store(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='there is no'):
        open_store(tmp_path / 'none.mat')
