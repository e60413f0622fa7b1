"""The example of docs/adding_a_model.md: a new family in one file, in a copy of the package."""
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHECK = """
import timm, torch, visionssm
assert {'line_mamba_tiny', 'line_mamba_pico'} <= set(visionssm.list_models('classification'))
assert 'line_mamba' in visionssm.models._official.families()
model = timm.create_model('line_mamba_pico', num_classes=5)
assert sum(p.numel() for p in model.parameters()) < 500_000
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
x, y = torch.randn(10, 3, 32, 32), torch.arange(10) % 5
losses = []
for _ in range(5):
    loss = torch.nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
maps = timm.create_model('line_mamba_pico', features_only=True)(torch.randn(1, 3, 64, 96))
assert [tuple(m.shape) for m in maps] == [(1, 16, 16, 24), (1, 32, 8, 12), (1, 64, 4, 6), (1, 128, 2, 3)]
state_dict = visionssm.to_official('line_mamba', model)
assert {'layers.0.downsample.conv.weight', 'head.bias', 'norm.weight'} <= state_dict.keys()
again = visionssm.from_official('line_mamba', state_dict)
assert torch.equal(again.eval()(x), model.eval()(x))
dense = {key: v for key, v in state_dict.items() if not key.startswith(('head.', 'norm.'))}
dense.update({f'outnorm1.{name}': torch.ones(32) for name in ('weight', 'bias')})
assert [m.shape[1] for m in visionssm.from_official('line_mamba', dense)(x)] == [32]
print('well')
"""


@pytest.fixture
def package(tmp_path: Path, repo_root: Path) -> Path:
    """A copy of the checkout's package with the example in it."""
    text = (repo_root / 'docs' / 'adding_a_model.md').read_text()
    (example,) = re.findall(r'^```python\n("""LineMamba\n.*?)^```$', text, flags=re.DOTALL | re.MULTILINE)
    for folder in ('visionssm', 'tests/timm_conformance'):
        shutil.copytree(repo_root / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'kernels').symlink_to(repo_root / 'kernels')
    (tmp_path / 'visionssm' / 'models' / 'line_mamba.py').write_text(example)
    return tmp_path


def python(package: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(package), str(package / 'kernels')])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=package, env={**os.environ, 'PYTHONPATH': path}, capture_output=True,
        text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_example_is_listed_trains_and_converts(run_python: Callable, package: Path):
    path = os.pathsep.join([str(package), str(package / 'kernels')])
    done = run_python('-c', CHECK, cwd=package, env={**os.environ, 'PYTHONPATH': path})
    assert done.stdout.strip() == 'well', done.stderr


def test_the_example_obeys_the_rules_of_style(package: Path, repo_root: Path):
    pytest.importorskip('ruff')
    python(package, '-m', 'ruff', 'check', '--config', str(repo_root / 'ruff.toml'), 'visionssm/models/line_mamba.py')


@pytest.mark.slow
def test_the_example_passes_the_tests_of_timm(package: Path, repo_root: Path):
    if not list((repo_root / 'build').glob('timm-*/tests')):
        pytest.skip("timm's tests are not here: tests/timm_conformance/run.py fetches them")
    (package / 'build').symlink_to(repo_root / 'build')
    assert ' passed' in python(package, 'tests/timm_conformance/run.py', '-k', 'line_mamba')
