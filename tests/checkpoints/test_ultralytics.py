"""Files of ultralytics: read without running anything that is in them."""
import builtins
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from visionssm.checkpoints import CheckpointError, load_state_dict, read_ultralytics

MODEL = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half()


class Run:
    """Calls a function with arguments when it is unpickled."""

    def __init__(self, function: Callable, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def write(path: Path, **entries) -> Path:
    torch.save({'model': MODEL, 'ema': None, 'epoch': -1, **entries}, path)
    return path


def with_attributes(model: nn.Module, **attributes) -> nn.Module:
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def test_the_weights_come_out_in_float32_and_integers_as_they_are(tmp_path: Path):
    found = read_ultralytics(write(tmp_path / 'best.pt'))
    expected = MODEL.state_dict()
    assert list(found['state_dict']) == list(expected)
    for key, value in found['state_dict'].items():
        assert torch.equal(value, expected[key].float() if expected[key].is_floating_point() else expected[key])
        assert value.dtype in (torch.float32, torch.int64) and not value.requires_grad


def test_names_and_number_of_classes_come_along(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    assert read_ultralytics(write(tmp_path / 'a.pt', model=model))['nc'] is None
    model = with_attributes(model, names=['cat', 'dog'])
    found = read_ultralytics(write(tmp_path / 'b.pt', model=model))
    assert found['names'] == {0: 'cat', 1: 'dog'} and found['nc'] == 2
    model = with_attributes(model, names={0: 'cat'}, nc=1)
    found = read_ultralytics(write(tmp_path / 'c.pt', model=model))
    assert found['names'] == {0: 'cat'} and found['nc'] == 1


def test_averaged_weights_of_an_unfinished_run_are_taken(tmp_path: Path):
    average = nn.Sequential(nn.Linear(1, 1))
    assert list(read_ultralytics(write(tmp_path / 'last.pt', model=None, ema=average))['state_dict']) == [
        '0.weight', '0.bias']


def test_buffers_that_are_not_stored_stay_out(tmp_path: Path):
    model = nn.Sequential(nn.Linear(1, 1))
    model.register_buffer('cache', torch.zeros(3), persistent=False)
    model.register_buffer('kept', torch.zeros(3))
    assert set(read_ultralytics(write(tmp_path / 'best.pt', model=model))['state_dict']) == {
        'kept', '0.weight', '0.bias'}


@pytest.mark.parametrize('function', [os.system, subprocess.check_output, pickle.loads, print, exec],
                         ids=lambda f: f.__name__)
def test_files_that_call_functions_are_refused_and_call_nothing(tmp_path: Path, function: Callable):
    target = tmp_path / 'ran'
    path = write(tmp_path / 'evil.pt', date=Run(function, f'touch {target}'))
    with pytest.raises(CheckpointError, match=rf'was not read: it names Python objects .*{function.__name__}'):
        read_ultralytics(path)
    assert not target.exists()


def test_eval_is_refused(tmp_path: Path):
    path = write(tmp_path / 'evil.pt', date=Run(builtins.eval, '1 + 1'))
    with pytest.raises(CheckpointError, match=r'builtins\.eval'):
        read_ultralytics(path)


def test_functions_below_known_modules_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The name of a module alone opens nothing: what it names becomes a shell."""
    ran: list[str] = []
    module = ModuleType('ultralytics.evil')
    monkeypatch.setitem(sys.modules, 'ultralytics', ModuleType('ultralytics'))
    monkeypatch.setitem(sys.modules, 'ultralytics.evil', module)

    def run(argument: str) -> None:
        ran.append(argument)

    run.__module__, run.__qualname__, run.__name__ = 'ultralytics.evil', 'run', 'run'
    module.run = run
    path = write(tmp_path / 'best.pt', date=Run(run, 'it ran'))
    assert read_ultralytics(path)['state_dict']
    assert not ran


def test_getattr_is_a_shell(tmp_path: Path):
    """Models hold a partial of their own methods; with a real getattr that would be a way to any function."""
    path = write(tmp_path / 'best.pt', model=with_attributes(nn.Sequential(nn.Linear(1, 1)), hook=Run(
        getattr, nn.Linear(1, 1), 'forward')))
    assert set(read_ultralytics(path)['state_dict']) == {'0.weight', '0.bias'}


def test_files_without_a_model_are_explained(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match='no checkpoint file'):
        read_ultralytics(tmp_path / 'none.pt')
    with pytest.raises(CheckpointError, match="holds no pickled model under 'ema' or 'model'. It holds: ema, epoch"):
        read_ultralytics(write(tmp_path / 'plain.pt', model=MODEL.state_dict()))
    cut = write(tmp_path / 'cut.pt')
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match='cut off, damaged'):
        read_ultralytics(cut)
    model = nn.Sequential(nn.Linear(1, 1))
    model._buffers['wrong'] = 'a string'
    with pytest.raises(CheckpointError, match='not built like a torch.nn.Module: wrong is no tensor'):
        read_ultralytics(write(tmp_path / 'wrong.pt', model=model))
    model = nn.Sequential()
    model._modules['self'] = model
    with pytest.raises(CheckpointError, match='not built like a torch.nn.Module: .*recursion'):
        read_ultralytics(write(tmp_path / 'cycle.pt', model=model))


def test_the_general_reader_points_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = ModuleType('ultralytics')
    module.Model = type('Model', (nn.Sequential,), {'__module__': 'ultralytics.tasks'})
    monkeypatch.setitem(sys.modules, 'ultralytics', module)
    monkeypatch.setitem(sys.modules, 'ultralytics.tasks', module)
    path = write(tmp_path / 'best.pt', model=module.Model(nn.Linear(1, 1)))
    with pytest.raises(CheckpointError, match='read_ultralytics'):
        load_state_dict(path)
    assert set(read_ultralytics(path)['state_dict']) == {'0.weight', '0.bias'}
