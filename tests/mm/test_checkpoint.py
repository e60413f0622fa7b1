"""Checkpoints appear whole or not at all, weights of every origin load, and the best model opens in timm."""
import errno
import json
import os

import pytest
import timm
import torch
from mmengine.runner import CheckpointLoader
from safetensors import safe_open
from safetensors.torch import save_file

from visionssm.checkpoints import CheckpointError
from visionssm.checkpoints.load import save_torch
from visionssm.openmmlab.checkpoint import is_whole, load_weights
from visionssm.utils.files import atomic_write

ONE_EPOCH = dict(by_epoch=True, max_epochs=1)
BEST = dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2, save_best='accuracy/top1'))


def toy_net(**kwargs):
    return timm.create_model('test_vit', img_size=8, patch_size=4, in_chans=1, **{'num_classes': 4, **kwargs})


@pytest.fixture
def full_disk(monkeypatch):
    """After `start()` the disk takes half of what is written to a file, then reports that it is full."""
    state = {'full': False}
    real_fsync = os.fsync

    def fsync(descriptor):
        if state['full']:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync)
    return lambda: state.update(full=True)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, full_disk):
    path = tmp_path / 'epoch_1.pth'
    atomic_write(b'old', path)
    full_disk()
    with pytest.raises(OSError, match=r'cannot write .*epoch_1\.pth.*No space left.*--resume') as caught:
        save_torch({'weights': torch.ones(10_000)}, path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b'old'
    assert [file.name for file in tmp_path.iterdir()] == ['epoch_1.pth']


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs the device that is always full')
def test_a_device_that_is_really_full_raises_the_same_error(tmp_path, monkeypatch):
    real_open = open
    monkeypatch.setattr('builtins.open', lambda file, *args, **kwargs: real_open('/dev/full', *args, **kwargs))
    with pytest.raises(OSError, match='No space left'):
        atomic_write(b'x' * 100_000, tmp_path / 'file')
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_in_training_keeps_the_earlier_checkpoints(train_toy, toy_config, tmp_path, full_disk):
    train_toy(toy_config('run', train_cfg=ONE_EPOCH, default_hooks=BEST))
    before = {path.name: path.read_bytes() for path in (tmp_path / 'run').glob('*.pth')}
    full_disk()
    with pytest.raises(OSError, match='No space left'):
        train_toy(toy_config('run', resume=True, default_hooks=BEST))
    assert {path.name: path.read_bytes() for path in (tmp_path / 'run').glob('*.pth')} == before
    assert all(is_whole(tmp_path / 'run' / name) for name in before)
    assert not list((tmp_path / 'run').glob('.*.tmp'))


def test_the_newest_checkpoints_are_kept(train_toy, toy_config, tmp_path):
    train_toy(toy_config('run', default_hooks=BEST))
    assert sorted(path.name for path in (tmp_path / 'run').glob('epoch_*.pth')) == ['epoch_2.pth', 'epoch_3.pth']
    assert len(list((tmp_path / 'run').glob('best_*.pth'))) == 1


def test_an_old_checkpoint_goes_only_after_the_new_one_is_there(train_toy, toy_config, tmp_path, full_disk):
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1))
    train_toy(toy_config('run', train_cfg=ONE_EPOCH, default_hooks=hooks))
    full_disk()
    with pytest.raises(OSError, match='No space left'):
        train_toy(toy_config('run', resume=True, default_hooks=hooks))
    assert is_whole(tmp_path / 'run' / 'epoch_1.pth')


@pytest.mark.parametrize('damage', [b'', b'PK\x03\x04', 'cut', 'flip'], ids=['empty', 'head', 'cut', 'flipped-byte'])
def test_damage_is_noticed(tmp_path, damage):
    path = tmp_path / 'file.pth'
    save_torch({'weights': torch.ones(10_000)}, path)
    assert is_whole(path)
    content = bytearray(path.read_bytes())
    if damage == 'flip':
        content[len(content) // 2] ^= 1
    path.write_bytes({'cut': content[:-100], 'flip': content}.get(damage, damage))
    assert not is_whole(path)


@pytest.fixture
def trained(train_toy, toy_config, tmp_path):
    """A one-epoch run with averaged weights and an exported best model."""
    return train_toy(toy_config('run', train_cfg=ONE_EPOCH, default_hooks=BEST,
                                custom_hooks=[dict(type='EMAHook', decay=0.5)]))


def test_the_best_model_opens_in_timm_both_ways(trained, tmp_path):
    folder = tmp_path / 'run' / 'best'
    by_path = timm.create_model('test_vit', img_size=8, patch_size=4, in_chans=1, num_classes=4,
                                checkpoint_path=str(folder / 'model.safetensors'))
    by_config = timm.create_model(f'local-dir:{folder}', pretrained=True)
    averaged = torch.load(next((tmp_path / 'run').glob('best_*.pth')), weights_only=False)['state_dict']
    for net in (by_path, by_config):
        assert all(torch.equal(value, averaged[f'model.{key}']) for key, value in net.state_dict().items())
    assert by_config.pretrained_cfg['mean'] == pytest.approx([0.3])


def test_the_exported_file_describes_itself(trained, tmp_path):
    folder = tmp_path / 'run' / 'best'
    with safe_open(folder / 'model.safetensors', 'pt') as file:
        metadata = file.metadata()
    config = json.loads(metadata['config'])
    assert config == json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'test_vit'
    assert config['label_names'] == [f'quadrant {i}' for i in range(4)]
    assert json.loads(metadata['notes'])['epoch'] == 1


def test_a_training_checkpoint_loads_without_running_code(trained, tmp_path):
    checkpoint = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=True)
    assert checkpoint['meta']['iter'] == 8


def test_the_history_of_scalars_survives_a_resume(trained, train_toy, toy_config):
    before = trained.message_hub.get_scalar('train/loss').data[0]
    after = train_toy(toy_config('run', resume=True, custom_hooks=[dict(type='EMAHook', decay=0.5)]))
    history = after.message_hub.get_scalar('train/loss').data[0]
    assert len(history) == 24
    assert history[:8].tolist() == before.tolist()
    assert after.message_hub.get_info('best_score') == trained.message_hub.get_info('best_score')


@pytest.mark.parametrize('origin', ['runner', 'safetensors', 'scheme', 'plain', 'published'])
def test_weights_of_every_origin_load(trained, tmp_path, origin):
    best = tmp_path / 'run' / 'best' / 'model.safetensors'
    wanted = timm.create_model(f'local-dir:{best.parent}', pretrained=True).state_dict()
    torch.save(wanted, tmp_path / 'plain.pth')
    torch.save({'model': wanted, 'epoch': 3}, tmp_path / 'published.pth')
    source = {'runner': next((tmp_path / 'run').glob('best_*.pth')), 'safetensors': best, 'scheme': f'visionssm://{best}',
              'plain': tmp_path / 'plain.pth', 'published': tmp_path / 'published.pth'}[origin]
    net = toy_net()
    load_weights(net, source)
    assert all(torch.equal(value, wanted[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize('prefix', ['', 'visionssm://'], ids=['file', 'scheme'])
def test_mmengines_loader_reads_safetensors(tmp_path, prefix):
    path = tmp_path / 'w.safetensors'
    save_file({'a': torch.ones(3)}, path)
    loaded = CheckpointLoader.load_checkpoint(f'{prefix}{path}', map_location='cpu', logger=None)
    assert torch.equal(loaded['state_dict']['a'], torch.ones(3))


def test_training_starts_from_weights_of_other_classes(trained, train_toy, toy_config, tmp_path):
    cfg = toy_config('fine', load_from=str(tmp_path / 'run' / 'best' / 'model.safetensors'), train_cfg=ONE_EPOCH)
    cfg.model.model.num_classes = 7
    cfg.optim_wrapper.optimizer.lr = 0.0
    tuned = train_toy(cfg).model.model.state_dict()
    wanted = timm.create_model(f'local-dir:{tmp_path / "run" / "best"}', pretrained=True).state_dict()
    assert torch.equal(tuned['blocks.0.attn.qkv.weight'], wanted['blocks.0.attn.qkv.weight'])
    assert tuned['head.weight'].shape[0] == 7


def test_weights_of_another_model_list_what_differs(trained, tmp_path):
    with pytest.raises(CheckpointError, match=r'does not fit(.|\n)*mis-shaped'):
        load_weights(toy_net(num_classes=7), tmp_path / 'run' / 'best' / 'model.safetensors')
    with pytest.raises(CheckpointError, match=r'missing(.|\n)*unexpected'):
        load_weights(timm.create_model('test_resnet'), tmp_path / 'run' / 'best' / 'model.safetensors')


def test_an_unknown_name_in_the_scheme_names_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown model 'vim_tinny'.*'vim_tiny'"):
        load_weights(toy_net(), 'visionssm://vim_tinny')


def test_a_missing_metric_is_told(train_toy):
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, save_best='accuracy/top2', rule='greater'))
    with pytest.raises(CheckpointError, match=r"save_best='accuracy/top2' is no metric.*accuracy/top1"):
        train_toy(default_hooks=hooks, train_cfg=ONE_EPOCH)
