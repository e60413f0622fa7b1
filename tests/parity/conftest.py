"""Finding and reading golden fixtures: made by the official code, outside the repository but for the smallest ones."""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from visionssm.models._official import find_official

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = [Path(os.environ['VISIONSSM_GOLDEN'])] if 'VISIONSSM_GOLDEN' in os.environ else []
# families that share the folder of another one
SHARED_FOLDERS = {'mambairv2': 'mambair'}
PLACES += [ROOT.parent / 'shared' / 'golden', ROOT / 'tests' / 'golden']


@dataclass
class Golden:
    """One fixture: its tensors, and its metadata with the JSON fields read."""

    family: str
    path: Path
    meta: dict
    tensors: dict[str, torch.Tensor]

    @property
    def dense(self) -> bool:
        return self.meta['kind'] == 'dense'

    @property
    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.part('state_dict.')

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def read(family: str, path: Path) -> Golden:
    with safe_open(path, 'pt') as file:
        meta = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    for key in ('config', 'extra_inputs', 'grad_keys', 'tolerance'):
        if key in meta:
            meta[key] = json.loads(meta[key])
    return Golden(family, path, meta, tensors)


def belongs(path: Path, family: str, kinds: tuple[str, ...]) -> bool:
    with safe_open(path, 'pt') as file:
        meta = file.metadata() or {}
    return meta.get('kind', '') in kinds and meta.get('family', family) == family


def golden_paths(family: str, *kinds: str) -> list[Path]:
    """The fixtures of a family in the first folder that holds any."""
    for place in PLACES:
        folder = place / SHARED_FOLDERS.get(family, family)
        found = sorted(path for path in folder.glob('**/*.safetensors') if belongs(path, family, kinds))
        if found:
            return found
    return []


def key_lists(family: str) -> list[Path]:
    """The lists of keys and shapes of the official full-size models, which stand beside the outer fixtures."""
    folder = SHARED_FOLDERS.get(family, family)
    found = sorted(path for place in PLACES for path in (place.parent / 'keys' / folder).glob('*.json'))
    if folder not in SHARED_FOLDERS.values():
        return found
    classes = find_official(family).classes
    return [path for path in found if json.loads(path.read_text())['official_class'] in classes]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise over the files of the family, or families, that the test module names."""
    names = getattr(metafunc.module, 'FAMILIES', None) or [getattr(metafunc.module, 'FAMILY', None)]
    sources = {
        'golden': lambda family: golden_paths(family, 'model', 'dense'),
        'op_golden': lambda family: golden_paths(family, 'op'),
        'table': lambda family: golden_paths(family, 'table'),
        'key_list': key_lists,
    }
    for argument in sources.keys() & set(metafunc.fixturenames):
        params = []
        for family in names:
            found = [pytest.param((family, path), id=f'{family}-{path.stem}') for path in sources[argument](family)]
            reason = f'no {argument} files of {family} here: set VISIONSSM_GOLDEN to the folder of fixtures'
            params += found or [pytest.param(None, marks=pytest.mark.skip(reason=reason), id=f'{family}-absent')]
        metafunc.parametrize(argument, params, indirect=True)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return read(*request.param)


@pytest.fixture
def op_golden(request: pytest.FixtureRequest) -> Golden:
    return read(*request.param)


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Golden:
    return read(*request.param)


@pytest.fixture
def key_list(request: pytest.FixtureRequest) -> tuple[str, dict]:
    family, path = request.param
    return family, json.loads(path.read_text())
