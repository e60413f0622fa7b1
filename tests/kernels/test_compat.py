"""Stand-ins for mamba_ssm and causal_conv1d: found, filled, never in the way of a real package, undone."""
import importlib
import importlib.util
import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from visionssm_kernels import compat
from visionssm_kernels.drop_in import causal_conv1d_fn, mamba_inner_fn, selective_scan_fn

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def neither_installed():
    for name in ('mamba_ssm', 'causal_conv1d'):
        if importlib.util.find_spec(name) is not None:
            pytest.skip(f'{name} is installed here, so nothing stands in for it')


@pytest.fixture
def output_of(run_python):
    """Runs code in an interpreter of its own that sees `folder` and the packages of this checkout: what it prints."""
    def run(code: str, folder: Path) -> str:
        paths = [str(folder), str(ROOT), str(ROOT / 'kernels')]
        result = run_python('-c', textwrap.dedent(code), env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)})
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run


def make_package(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / '__init__.py').write_text(textwrap.dedent(code))


THIRD_PARTY = """
    import torch
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def mixer(x, weight, A):
        x = causal_conv1d_fn(x, weight, activation='silu')
        B = C = x[:, :A.shape[1]]
        return selective_scan_fn(x, x, A, B, C, delta_softplus=True)
"""


def test_third_party_package_runs_in_a_fresh_process(output_of, tmp_path):
    make_package(tmp_path, 'toy_mamba_user', THIRD_PARTY)
    out = output_of("""
        import visionssm_kernels
        visionssm_kernels.compat.mamba_ssm()
        import torch
        from toy_mamba_user import mixer
        x = torch.randn(2, 6, 9, requires_grad=True)
        mixer(x, torch.randn(6, 4), -torch.rand(6, 3)).sum().backward()
        print(tuple(x.grad.shape), bool(x.grad.isfinite().all()))
        """, tmp_path)
    assert out == '(2, 6, 9) True'


def test_importing_our_package_installs_nothing(output_of, tmp_path):
    out = output_of("""
        import importlib.util
        import visionssm_kernels
        print(importlib.util.find_spec('mamba_ssm'), importlib.util.find_spec('causal_conv1d'))
        """, tmp_path)
    assert out == 'None None'


def test_installed_package_is_not_shadowed(output_of, tmp_path):
    make_package(tmp_path, 'mamba_ssm', "__version__ = 'real'")
    out = output_of("""
        import visionssm_kernels
        handle = visionssm_kernels.compat.mamba_ssm()
        import causal_conv1d, mamba_ssm
        print(mamba_ssm.__version__, handle.packages)
        """, tmp_path)
    assert out == "real ('causal_conv1d',)"


def test_installed_package_gets_no_submodules_of_ours(output_of, tmp_path):
    make_package(tmp_path, 'mamba_ssm', '')
    out = output_of("""
        import visionssm_kernels
        visionssm_kernels.compat.mamba_ssm()
        try:
            import mamba_ssm.ops
        except ModuleNotFoundError as error:
            print(error.name)
        """, tmp_path)
    assert out == 'mamba_ssm.ops'


def test_module_put_in_place_by_hand_is_left_alone(output_of, tmp_path):
    out = output_of("""
        import sys, types
        own = sys.modules['mamba_ssm'] = types.ModuleType('mamba_ssm')
        import visionssm_kernels
        handle = visionssm_kernels.compat.mamba_ssm()
        handle.remove()
        print(sys.modules['mamba_ssm'] is own, handle.packages)
        """, tmp_path)
    assert out == "True ('causal_conv1d',)"


def test_find_spec_finds_the_stand_in():
    with compat.mamba_ssm():
        assert importlib.util.find_spec('mamba_ssm').submodule_search_locations is not None
        assert importlib.util.find_spec('mamba_ssm.ops.selective_scan_interface') is not None


@pytest.mark.parametrize('name', ['mamba_ssm', 'causal_conv1d', 'mamba_ssm.ops.triton.layernorm'])
def test_module_has_version_and_spec(name):
    with compat.mamba_ssm():
        module = importlib.import_module(name)
        assert module.__version__.endswith('+visionssm')
        assert module.__spec__.name == name


def test_names_are_our_functions():
    with compat.mamba_ssm():
        from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn as conv
        from mamba_ssm import mamba_inner_fn as inner
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as scan
    assert (conv, inner, scan) == (causal_conv1d_fn, mamba_inner_fn, selective_scan_fn)


@pytest.mark.parametrize('name', sorted(compat.stand_in._CONTENTS))
def test_every_module_imports(name):
    with compat.mamba_ssm():
        module = importlib.import_module(name)
        for names in compat.stand_in._CONTENTS[name].values():
            assert all(callable(getattr(module, attribute)) for attribute in names)


def test_missing_submodule_is_named():
    with compat.mamba_ssm(), pytest.raises(ModuleNotFoundError, match='mamba_ssm.ops.triton.ssd_combined'):
        importlib.import_module('mamba_ssm.ops.triton.ssd_combined')


def test_missing_name_is_named_in_an_import():
    with compat.mamba_ssm(), pytest.raises(ImportError, match="'Mamba2' from 'mamba_ssm'"):
        from mamba_ssm import Mamba2  # noqa: F401


def test_missing_attribute_tells_what_there_is():
    with compat.mamba_ssm():
        module = importlib.import_module('mamba_ssm')
        with pytest.raises(AttributeError, match="no 'Mamba2'.*'selective_scan_fn'"):
            module.Mamba2()


def test_second_call_changes_nothing():
    with compat.mamba_ssm():
        before = list(sys.meta_path)
        module = importlib.import_module('mamba_ssm')
        with compat.mamba_ssm() as second:
            assert second.packages == ('causal_conv1d', 'mamba_ssm')
            assert sys.meta_path == before
        assert importlib.import_module('mamba_ssm') is module


def test_removal_leaves_no_trace():
    finders = list(sys.meta_path)
    handle = compat.mamba_ssm()
    importlib.import_module('mamba_ssm.modules.mamba_simple')
    handle.remove()
    assert importlib.util.find_spec('mamba_ssm') is None
    assert not [name for name in sys.modules if name.startswith('mamba_ssm')]
    assert sys.meta_path == finders


def test_removing_twice_is_harmless():
    with compat.mamba_ssm():
        inner = compat.mamba_ssm()
        inner.remove()
        inner.remove()
        assert importlib.util.find_spec('mamba_ssm') is not None


@pytest.mark.parametrize('name', ['selective_scan_ref', 'mamba_inner_ref'])
def test_references_keep_their_names(name):
    with compat.mamba_ssm():
        module = importlib.import_module('mamba_ssm.ops.selective_scan_interface')
        assert getattr(module, name).__wrapped__.__name__ == name.replace('_ref', '_fn')


def test_selective_scan_ref_agrees_with_selective_scan_fn():
    generator = torch.Generator().manual_seed(0)
    u, delta, B, C = (torch.randn(2, size, 7, generator=generator, dtype=torch.float64) for size in (4, 4, 3, 3))
    A = -torch.rand(4, 3, generator=generator, dtype=torch.float64)
    with compat.mamba_ssm():
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
    torch.testing.assert_close(
        selective_scan_ref(u, delta, A, B, C, delta_softplus=True),
        selective_scan_fn(u, delta, A, B, C, delta_softplus=True), atol=1e-10, rtol=0)
