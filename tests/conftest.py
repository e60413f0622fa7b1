"""Settings of every test: fixed seed, a bounded number of threads, the folder of golden fixtures."""
import importlib.util
import logging
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
TWO_STAGES = {'depths': (1, 1), 'dims': (16, 32)}
SHALLOW = {
    'dis_pico': {'depth': 2},
    'mamba2d_pico': {**TWO_STAGES, 'mixers': ('scan_local', 'rope_attention'), 'downsamples': ('conv7', 'conv3'),
                     'residual_scales': (1., 1.)},
    'mambair_pico': {'depths': (1,)},
    'mambairv2_pico': {'depths': (2,)},  # the second block shifts its windows
    'mhs_vm_pico': TWO_STAGES,
    'spatial_mamba_pico': TWO_STAGES,
    'vim2_pico': TWO_STAGES,
    'vim_pico': {'depth': 2},
    'vm_unet_pico': {**TWO_STAGES, 'depths_decoder': (1, 1)},
    'vmamba_pico': TWO_STAGES,
    'vssd_pico': {'depths': (1, 1), 'num_heads': (1, 2), 'mixers': ('ssd', 'attention')},
}


def pytest_configure(config: pytest.Config) -> None:
    """Parallel workers share the cores: one thread each; a single process takes two."""
    if not hasattr(config, 'workerinput') and config.getoption('numprocesses', None):
        return  # it hands tests out and runs none: they need not wait until it has imported PyTorch
    import torch
    workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
    torch.set_num_threads(1 if workers > 1 else min(2, torch.get_num_threads()))
    if workers > 1:
        os.environ.setdefault('OMP_NUM_THREADS', '1')  # of the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first: one that began last would keep one worker busy and leave the others idle."""
    items.sort(key=lambda item: item.get_closest_marker('slow') is None)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    import torch
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    """A training sets the package's logger up for itself; the next test gets it as it was."""
    logger = logging.getLogger('visionssm')
    level, handlers, filters = logger.level, list(logger.handlers), list(logger.filters)
    yield
    logger.setLevel(level)
    logger.handlers[:], logger.filters[:] = handlers, filters


@pytest.fixture(scope='session')
def repo_root() -> Path:
    """The checkout that is under test."""
    return ROOT


@pytest.fixture(scope='session')
def shallow() -> Callable[[str], dict]:
    """Options that leave a pico one layer of each kind: what tracing and compiling take follows their number."""
    return lambda name: SHALLOW.get(name, {})


@pytest.fixture(scope='session')
def load_tool(repo_root: Path) -> Callable[[str], ModuleType]:
    """Imports `tools/NAME.py` anew, so that what a test changes in it is its own."""
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, repo_root / 'tools' / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(repo_root / 'tools')  # as Python does for a script
            spec.loader.exec_module(module)
        return module

    return load


# What `python ARGUMENTS` does, in a copy of an interpreter.
AS_MAIN = """
import os, runpy, sys, tempfile, torch
tempfile.tempdir = None  # the environment's
for stream, path in enumerate(streams, 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
os.environ.clear()
os.environ.update(env)
os.chdir(folder)
torch.set_num_threads(int(env.get('OMP_NUM_THREADS', torch.get_num_threads())))
sys.path[:0] = filter(None, env.get('PYTHONPATH', '').split(os.pathsep))
kind, *rest = sys.argv = arguments
if kind == '-c':
    sys.argv = ['-c', *rest[1:]]
    exec(rest[0], {'__name__': '__main__'})
elif kind == '-m':
    sys.argv = rest
    runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
    runpy.run_path(kind, run_name='__main__')
"""


@pytest.fixture(scope='session')
def start_python() -> Callable[..., BaseProcess]:
    """Starts `python ARGUMENTS` in a folder, with an environment, and its two streams written to files.

    The process is a copy of one that has imported timm, and nothing of ours: that takes longer than most tests.
    """
    def start(*arguments: str, streams: tuple[Path | str, Path | str], cwd: Path = ROOT,
              env: dict[str, str] | None = None) -> BaseProcess:
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['timm'])
        given = {'arguments': list(arguments), 'streams': list(map(str, streams)), 'folder': str(cwd),
                 'env': dict(os.environ if env is None else env)}
        process = context.Process(target=exec, args=(AS_MAIN, given))
        process.start()
        return process

    return start


@pytest.fixture(scope='session')
def run_python(start_python: Callable[..., BaseProcess], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Runs `python ARGUMENTS` as `start_python` does to its end, and returns its code and what it wrote."""
    def run(*arguments: str, timeout: float = 110, **options: object) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp('streams')
        streams = folder / 'out.txt', folder / 'err.txt'
        process = start_python(*arguments, streams=streams, **options)
        process.join(timeout)
        late = process.is_alive()
        process.kill()
        process.join()
        assert not late, f'no end within {timeout} s: {streams[1].read_text()[-3000:]}'
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in streams))

    return run
