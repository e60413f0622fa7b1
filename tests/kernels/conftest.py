"""Shared by the kernel tests: the folder of operator fixtures, poisoned memory, the CPU backends."""
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from visionssm_kernels._dispatch import triton_why_not
from visionssm_kernels._native import native_why_not

REPO_ROOT = Path(__file__).resolve().parents[2]


def golden_folders() -> list[Path]:
    """Folders that may hold golden fixtures, the fullest first."""
    named = os.environ.get('VISIONSSM_GOLDEN')
    full = [Path(named)] if named else [REPO_ROOT.parent / 'shared' / 'golden']
    return [*full, REPO_ROOT / 'tests' / 'golden']


@pytest.fixture(scope='session')
def operator_fixture():
    """Returns a function that finds an operator fixture by file name, or skips."""
    def find(name: str) -> Path:
        for folder in golden_folders():
            if (folder / 'ops' / name).exists():
                return folder / 'ops' / name
        pytest.skip(f'ops/{name} is in none of the folders of golden fixtures (VISIONSSM_GOLDEN names one)')
    return find


@pytest.fixture(scope='session')
def family_fixture():
    """Returns a function that finds an operator fixture of a family by file name, or skips."""
    def find(family: str, name: str) -> Path:
        for folder in golden_folders():
            if (folder / family / 'ops' / name).exists():
                return folder / family / 'ops' / name
        pytest.skip(f'{family}/ops/{name} is in none of the folders of golden fixtures (VISIONSSM_GOLDEN names one)')
    return find


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills torch.empty with NaN, so that an output nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=['native', 'chunked', 'reference'])
def cpu_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on the CPU; native is skipped where the library is not built."""
    if request.param == 'native' and (reason := native_why_not('cpu')):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def needs_native() -> None:
    """Skips where the native library is not built."""
    if reason := native_why_not('cpu'):
        pytest.skip(reason)


@pytest.fixture(scope='session')
def device() -> torch.device:
    """Where Triton runs: the accelerator, else the CPU under the interpreter; skips where it runs on neither."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device('cpu')
    if reason := triton_why_not(accelerator.type):
        pytest.skip(reason)
    return accelerator
