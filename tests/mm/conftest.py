"""Fixtures that train the toy task, in this process or through the tools."""
import importlib
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

pytest.importorskip('mmengine', reason='needs the extra [mm]')

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@pytest.fixture(autouse=True)
def _toy_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(HERE), str(ROOT), str(ROOT / 'kernels')]))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('PYTHONFAULTHANDLER', '1')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loader(shuffle, batch_size=8, **kwargs):
    return dict(batch_size=batch_size, num_workers=0, sampler=dict(type='SeededSampler', shuffle=shuffle),
                collate_fn=dict(type='collate_images'), dataset=dict(type='ToyImages', **kwargs))


@pytest.fixture
def toy_config(tmp_path, _toy_on_the_path):
    """A function that makes the config of a 3-epoch run with 8 steps an epoch; keywords replace top-level keys."""

    importlib.import_module('toy_engine')

    def make(name='run', **overrides):
        cfg = dict(
            default_scope='visionssm', work_dir=str(tmp_path / name), experiment_name=uuid.uuid4().hex,
            custom_imports=dict(imports=['toy_engine']),
            model=dict(type='ImageClassifier',
                       model=dict(name='test_vit', img_size=8, patch_size=4, in_chans=1, num_classes=4),
                       data_preprocessor=dict(mean=[0.3], std=[0.3])),
            train_dataloader=loader(True, transform=dict(type='ShiftFlip', shift=1, flip=0.5)),
            val_dataloader=loader(False), val_cfg=dict(), val_evaluator=dict(type='Accuracy', topk=(1,)),
            train_cfg=dict(by_epoch=True, max_epochs=3),
            optim_wrapper=dict(constructor='LayerDecayOptimConstructor', optimizer=dict(type='AdamW', lr=2e-3)),
            param_scheduler=[dict(type='CosineAnnealingLR', T_max=3, by_epoch=True, convert_to_iter_based=True)],
            randomness=dict(seed=3), log_level='WARNING')
        cfg.update(overrides)
        return Config(cfg)

    return make


@pytest.fixture
def train_toy(toy_config):
    """A function that trains a config in this process and returns the runner."""

    def run(cfg=None, **overrides):
        from visionssm.openmmlab.runner import VisionRunner
        runner = VisionRunner.from_cfg(cfg or toy_config(**overrides))
        runner.train()
        return runner

    return run


@pytest.fixture
def written(tmp_path):
    """A function that writes configs to files and returns their paths."""

    def write(*configs):
        paths = [str(tmp_path / f'{uuid.uuid4().hex}.py') for _ in configs]
        for config, path in zip(configs, paths, strict=True):
            config.dump(path)
        return paths

    return write


@pytest.fixture
def run_tool(run_python, written, tmp_path):
    """A function that runs tools/train.py on a config and returns what it did."""
    return lambda config: run_python(str(ROOT / 'tools' / 'train.py'), *written(config), cwd=tmp_path)


@pytest.fixture
def torchrun(written, free_port, tmp_path):
    """A function that trains configs one after the other in two processes of torchrun."""

    def run(*configs, timeout=250):
        command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1',
                   f'--master_port={free_port}', str(HERE / 'train_many.py'), *written(*configs)]
        done = subprocess.run([*command, '--launcher', 'pytorch'], capture_output=True, text=True, timeout=timeout,
                              cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.fixture
def train_in_two(start_python, written, free_port, tmp_path):
    """A function that trains configs one after the other in the same two processes, told what torchrun tells."""

    def run(*configs, timeout=250):
        paths, errors = written(*configs), [tmp_path / f'{rank}.txt' for rank in range(2)]
        world = dict(os.environ, WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                     MASTER_PORT=str(free_port))
        processes = [
            start_python(str(HERE / 'train_many.py'), *paths, '--launcher', 'pytorch', cwd=tmp_path,
                         streams=(os.devnull, errors[rank]), env=dict(world, RANK=str(rank), LOCAL_RANK=str(rank)))
            for rank in range(2)]
        until = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, until - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
        assert [process.exitcode for process in processes] == [0, 0], [path.read_text()[-3000:] for path in errors]

    return run


@pytest.fixture
def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def full_state(path):
    checkpoint = torch.load(path, weights_only=False)
    tensors = {f'{part}.{key}': value for part in ('state_dict', 'ema_state_dict')
               for key, value in checkpoint[part].items()}
    for index, slot in checkpoint['optimizer']['state'].items():
        tensors |= {f'optimizer.{index}.{key}': value for key, value in slot.items()}
    return tensors


@pytest.fixture
def assert_same_state():
    """A function that compares two training checkpoints bit by bit: weights, their average, and the optimizer."""

    def compare(one, two):
        one, two = full_state(one), full_state(two)
        assert one.keys() == two.keys()
        different = [key for key in one if not torch.equal(one[key], two[key])]
        assert not different

    return compare
