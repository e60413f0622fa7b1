"""A run that is killed and resumed ends with the same weights, bit for bit, as one that is not."""
import signal
from pathlib import Path

import pytest
import torch

from visionssm.checkpoints import CheckpointError, save_safetensors

MIXUP = dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1)


@pytest.fixture
def random_config(toy_config):
    """The toy run with everything that draws random numbers: augmentation, drop path, Mixup, loader processes."""

    def make(name, by_epoch=True, interval=1, hooks=(), **overrides):
        cfg = toy_config(name, **overrides)
        cfg.model.model.drop_path_rate = 0.2
        cfg.model.mixup = MIXUP
        cfg.train_dataloader.update(num_workers=2, persistent_workers=True)
        cfg.custom_hooks = [dict(type='EMAHook', decay=0.9), *hooks]
        cfg.default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=interval, by_epoch=by_epoch,
                                                 save_best='accuracy/top1'))
        return cfg

    return make


@pytest.mark.parametrize(('by_epoch', 'interval', 'last'), [(True, 1, 'epoch_3'), (False, 5, 'iter_24')],
                         ids=['epoch-checkpoints', 'mid-epoch-checkpoints'])
def test_kill_and_resume_reaches_the_same_weights(random_config, train_toy, run_tool, tmp_path, assert_same_state,
                                                  by_epoch, interval, last):
    train_toy(random_config('whole', by_epoch, interval))
    killed = run_tool(random_config('killed', by_epoch, interval, hooks=[dict(type='KillHook', step=13)]))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / 'killed' / f'{last}.pth').exists()
    resumed = train_toy(random_config('killed', by_epoch, interval, resume=True))
    assert resumed.iter == 24
    assert_same_state(tmp_path / 'whole' / f'{last}.pth', tmp_path / 'killed' / f'{last}.pth')


def test_resume_from_the_middle_of_an_epoch_sees_only_the_rest(random_config, train_toy, tmp_path):
    train_toy(random_config('run', by_epoch=False, interval=5))
    cfg = random_config('again', by_epoch=False, interval=100, resume=True)
    cfg.load_from = str(tmp_path / 'run' / 'iter_20.pth')
    losses = tmp_path / 'losses.npy'
    cfg.custom_hooks.append(dict(type='LossHook', path=str(losses)))
    train_toy(cfg)
    import numpy as np
    assert len(np.load(losses)) == 4


def test_a_run_by_steps_resumes_to_the_same_weights(random_config, train_toy, tmp_path, assert_same_state):
    by_steps = dict(by_epoch=False, max_iters=24, val_interval=8)

    def config(name, **overrides):
        cfg = random_config(name, by_epoch=False, interval=5, train_cfg=by_steps, param_scheduler=None, **overrides)
        cfg.train_dataloader.sampler.infinite = True
        return cfg

    train_toy(config('whole'))
    train_toy(config('again', resume=True, load_from=str(tmp_path / 'whole' / 'iter_10.pth')))
    assert_same_state(tmp_path / 'whole' / 'iter_24.pth', tmp_path / 'again' / 'iter_24.pth')


def test_a_seed_that_was_drawn_is_kept_after_a_resume(random_config, train_toy, tmp_path):
    first = train_toy(random_config('run', randomness=dict(seed=None), train_cfg=dict(by_epoch=True, max_epochs=1)))
    second = train_toy(random_config('run', randomness=dict(seed=None), resume=True))
    assert second.seed == first.seed == second.train_dataloader.sampler.seed == second.train_dataloader.dataset.seed


def test_resume_skips_a_damaged_checkpoint_with_a_warning(train_toy, toy_config, tmp_path, caplog):
    train_toy(toy_config('run'))
    newest = tmp_path / 'run' / 'epoch_3.pth'
    newest.write_bytes(newest.read_bytes()[:5000])
    from visionssm.openmmlab.checkpoint import find_resumable
    assert find_resumable(tmp_path / 'run') == tmp_path / 'run' / 'epoch_2.pth'
    resumed = train_toy(toy_config('run', resume=True))
    assert resumed.epoch == 3
    assert find_resumable(tmp_path / 'run') == newest


def test_resume_without_a_checkpoint_starts_from_the_beginning(train_toy):
    assert train_toy(resume=True, train_cfg=dict(by_epoch=True, max_epochs=1)).epoch == 1


def test_resuming_another_model_lists_what_differs(train_toy, toy_config, tmp_path):
    train_toy(toy_config('run', train_cfg=dict(by_epoch=True, max_epochs=1)))
    cfg = toy_config('run', resume=True)
    cfg.model.model.name = 'test_vit2'
    with pytest.raises(ValueError, match=r'does not fit ImageClassifier(.|\n)*blocks'):
        train_toy(cfg)


def test_resuming_weights_without_training_state_is_refused(train_toy, toy_config, tmp_path):
    train_toy(toy_config('run', train_cfg=dict(by_epoch=True, max_epochs=1)))
    checkpoint = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=False)
    bare = tmp_path / 'bare.pth'
    torch.save({'state_dict': checkpoint['state_dict']}, bare)
    with pytest.raises(ValueError, match='weights only'):
        train_toy(toy_config('again', resume=True, load_from=str(bare)))


def test_an_epoch_of_other_length_resumes_at_its_start(train_toy, toy_config):
    train_toy(toy_config('run', train_cfg=dict(by_epoch=True, max_epochs=2)))
    cfg = toy_config('run', resume=True)
    cfg.train_dataloader.batch_size = 16
    assert train_toy(cfg).iter == 3 * 4


def test_an_epoch_of_other_length_does_not_resume_in_its_middle(random_config, train_toy, tmp_path):
    train_toy(random_config('run', by_epoch=False, interval=5, train_cfg=dict(by_epoch=True, max_epochs=1)))
    cfg = random_config('again', resume=True, load_from=str(tmp_path / 'run' / 'iter_5.pth'))
    cfg.train_dataloader.batch_size = 16
    with pytest.raises(ValueError, match='the middle of an epoch of 8 steps, and an epoch now has 4'):
        train_toy(cfg)


def test_no_unfinished_file_survives_the_next_start(train_toy, toy_config, tmp_path):
    left = tmp_path / 'run' / '.epoch_1.pth.1234.tmp'
    left.parent.mkdir()
    left.write_bytes(b'half')
    train_toy(toy_config('run', train_cfg=dict(by_epoch=True, max_epochs=1)))
    assert not left.exists()
    assert not list(Path(tmp_path / 'run').glob('*.tmp'))


@pytest.mark.parametrize(('name', 'message'), [
    ('absent.pth', "There is no checkpoint file '.*absent.pth'"),
    ('model.safetensors', 'model.safetensors holds weights only and cannot be resumed; .*load_from=')])
def test_what_cannot_be_resumed_is_called_by_its_name(toy_config, train_toy, tmp_path, name, message):
    if name.endswith('.safetensors'):
        save_safetensors({'weight': torch.zeros(2)}, tmp_path / name)
    with pytest.raises((CheckpointError, FileNotFoundError), match=message):
        train_toy(toy_config(resume=True, load_from=str(tmp_path / name)))
