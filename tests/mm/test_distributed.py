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
        cfg.train_dataloader.dataset.transform = dict(type='ShiftFlip')
        cfg.optim_wrapper.clip_grad = dict(max_norm=1.0)
        cfg.custom_hooks = [dict(type='LossHook', path=str(tmp_path / f'{name}.npy')),
                            dict(type='EMAHook', decay=0.9)]
        if wrapper:
            cfg.model_wrapper_cfg = wrapper
        return cfg

    return make


def losses(tmp_path, name):
    return np.load(tmp_path / f'{name}.npy')


@pytest.mark.slow
@pytest.mark.parametrize('kind', WRAPPERS)
def test_two_processes_train_like_one(plain_config, train_toy, run_tool, tmp_path, free_port, kind):
    train_toy(plain_config('one', 8))
    done = run_tool(plain_config('two', 4, WRAPPERS[kind]), nproc=2, port=free_port)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = losses(tmp_path, 'one'), losses(tmp_path, 'two')
    assert len(one) == len(two) == 24
    # observed 2e-7 for losses and 6e-5 for weights, whose rounding Adam's first steps amplify
    np.testing.assert_allclose(two, one, rtol=2e-6)
    weights = [torch.load(tmp_path / name / 'epoch_3.pth', weights_only=False) for name in ('one', 'two')]
    logged = [whole['message_hub']['log_scalars']['train/loss']['log_history'] for whole in weights]
    torch.testing.assert_close(*logged, rtol=2e-6, atol=0)
    for part in ('state_dict', 'ema_state_dict'):
        assert weights[0][part].keys() == weights[1][part].keys()
        for key, value in weights[0][part].items():
            torch.testing.assert_close(weights[1][part][key], value, rtol=0, atol=6e-4, msg=key)


@pytest.mark.slow
def test_a_sharded_checkpoint_resumes_sharded_and_whole(plain_config, train_toy, run_tool, tmp_path, free_port):
    first = str(tmp_path / 'whole' / 'epoch_1.pth')
    configs = [plain_config('whole', 4, WRAPPERS['fsdp']),
               plain_config('again', 4, WRAPPERS['fsdp'], resume=True, load_from=first),
               plain_config('mixed', 4, dict(type='FullyShard', min_params=10_000, param_dtype='bfloat16',
                                             reduce_dtype='float32'))]
    done = run_tool(configs, nproc=2, port=free_port)
    assert done.returncode == 0, done.stderr[-3000:]
    train_toy(plain_config('one', 8, resume=True, load_from=first))
    whole, again, one = (torch.load(tmp_path / name / 'epoch_3.pth', weights_only=False)
                         for name in ('whole', 'again', 'one'))
    for part in ('state_dict', 'ema_state_dict'):
        assert all(torch.equal(value, again[part][key]) for key, value in whole[part].items())
        for key, value in whole[part].items():
            torch.testing.assert_close(one[part][key], value, rtol=0, atol=6e-4, msg=key)
    # half-precision parameters in the blocks (observed 2e-3), checkpoints in float32 all the same
    np.testing.assert_allclose(losses(tmp_path, 'mixed'), losses(tmp_path, 'whole'), rtol=0.02)
    mixed = torch.load(tmp_path / 'mixed' / 'epoch_3.pth', weights_only=True)['state_dict']
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
