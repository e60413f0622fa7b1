"""Two processes with half the batch each train like one process: replicated and sharded, on the CPU with gloo."""
import os

import numpy as np
import pytest
import torch

from visionssm.openmmlab.dist import init_cpu_group, shard

WRAPPERS = {'ddp': None, 'fsdp': dict(type='FullyShard', min_params=10_000)}


@pytest.fixture
def plain_config(toy_config, tmp_path):
    """The toy run without random augmentation, which writes its losses to NAME.npy."""

    def make(name, batch_size, wrapper=None, **overrides):
        cfg = toy_config(name, **overrides)
        cfg.train_dataloader.batch_size = batch_size
        cfg.train_dataloader.dataset.update(size=32, transform=dict(type='ShiftFlip'))
        cfg.optim_wrapper.clip_grad = dict(max_norm=1.0)
        cfg.custom_hooks = [dict(type='LossHook', path=str(tmp_path / f'{name}.npy')),
                            dict(type='EMAHook', decay=0.9)]
        if wrapper:
            cfg.model_wrapper_cfg = wrapper
        return cfg

    return make


def losses(tmp_path, name):
    return np.load(tmp_path / f'{name}.npy')


def assert_near(one, two, kind):
    """Observed 6e-5: Adam's first steps amplify rounding."""
    for part in ('state_dict', 'ema_state_dict'):
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=0, atol=6e-4, msg=f'{kind}: {key}')


@pytest.mark.slow
def test_two_processes_train_like_one_and_sharded_checkpoints_resume_sharded_and_whole(
        plain_config, train_toy, torchrun, tmp_path):
    first = str(tmp_path / 'fsdp' / 'epoch_1.pth')
    # one start for all: it takes longer than the training
    torchrun(
        *(plain_config(kind, 4, wrapper) for kind, wrapper in WRAPPERS.items()),
        plain_config('again', 4, WRAPPERS['fsdp'], resume=True, load_from=first),
        plain_config('mixed', 4, dict(WRAPPERS['fsdp'], param_dtype='bfloat16', reduce_dtype='float32'),
                     train_cfg=dict(by_epoch=True, max_epochs=1)))
    train_toy(plain_config('one', 8))
    train_toy(plain_config('rest', 8, resume=True, load_from=first))
    one, ddp, fsdp, again, rest = (torch.load(tmp_path / name / 'epoch_3.pth', weights_only=False)
                                   for name in ('one', 'ddp', 'fsdp', 'again', 'rest'))
    for kind, two in (('ddp', ddp), ('fsdp', fsdp)):
        assert len(losses(tmp_path, 'one')) == len(losses(tmp_path, kind)) == 12
        np.testing.assert_allclose(losses(tmp_path, kind), losses(tmp_path, 'one'), rtol=2e-6, err_msg=kind)
        logged = [whole['message_hub']['log_scalars']['train/loss']['log_history'] for whole in (one, two)]
        torch.testing.assert_close(*logged, rtol=2e-6, atol=0)
        assert_near(one, two, kind)
    for part in ('state_dict', 'ema_state_dict'):
        assert all(torch.equal(value, again[part][key]) for key, value in fsdp[part].items())
    assert_near(fsdp, rest, 'resumed by one process')
    # half-precision parameters in the blocks (observed 2e-3), checkpoints in float32 all the same
    np.testing.assert_allclose(losses(tmp_path, 'mixed'), losses(tmp_path, 'fsdp')[:4], rtol=0.02)
    mixed = torch.load(tmp_path / 'mixed' / 'epoch_1.pth', weights_only=True)['state_dict']
    assert all(value.dtype is torch.float32 for value in mixed.values())


@pytest.mark.parametrize(('launcher', 'env'), [
    ('slurm', dict(SLURM_PROCID='1', SLURM_NTASKS='4', SLURM_LOCALID='1', MASTER_ADDR='node')),
    ('mpi', dict(OMPI_COMM_WORLD_RANK='1', OMPI_COMM_WORLD_SIZE='4', OMPI_COMM_WORLD_LOCAL_RANK='1'))])
def test_launchers_are_translated_for_processes_without_a_gpu(monkeypatch, launcher, env):
    joined = []
    monkeypatch.setattr('torch.distributed.init_process_group', lambda backend, **_: joined.append(backend))
    monkeypatch.setattr(os, 'environ', dict(env))
    init_cpu_group(launcher, backend='nccl')
    assert joined == ['gloo']
    assert [os.environ[key] for key in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')] == ['1', '4', '1']


def test_a_launcher_that_did_not_start_the_process_is_told(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(ValueError, match='torchrun --nproc_per_node'):
        init_cpu_group('pytorch')


def test_a_misspelt_option_of_sharding_names_the_nearest():
    with pytest.raises(ValueError, match="'min_parms'.*'min_params'"):
        shard(torch.nn.Linear(2, 2), dict(min_parms=3), 'cpu')


def test_the_first_line_of_dist_train_tells_its_usage(repo_root):
    import subprocess
    done = subprocess.run([str(repo_root / 'tools' / 'dist_train.sh')], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'CONFIG NPROC' in done.stderr
