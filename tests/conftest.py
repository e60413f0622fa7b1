"""Settings of every test: fixed seed, a bounded number of threads, the folder of golden fixtures."""
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Parallel workers share the cores: one thread each; a single process takes two."""
    workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
    torch.set_num_threads(1 if workers > 1 else min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
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
