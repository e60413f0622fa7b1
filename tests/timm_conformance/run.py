"""Run the model tests of the installed timm on this package's models.

timm ships its tests in the source archive only, which is fetched once and kept under `build/`. Arguments are handed to
pytest, for example `-n 2` or `-k torchscript`. Exit status 1 if a test fails or if fewer ran than there must be.
"""
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# What must have run at least once for the small models, so that a change of the plugin or of timm cannot empty the run.
REQUIRED = {
    'test_model_forward', 'test_model_backward', 'test_model_forward_torchscript', 'test_model_forward_features',
    'test_model_forward_intermediates_features', 'test_model_forward_intermediates',
    'test_prune_intermediate_layers_contract', 'test_model_forward_fx', 'test_model_backward_fx',
    'test_model_forward_fx_torchscript', 'test_model_default_cfgs_non_std',
}


def fetch(version: str) -> Path:
    """Return the folder with timm's tests, downloading its source archive where it is not there yet."""
    folder = ROOT / 'build' / f'timm-{version}'
    if not (folder / 'tests' / 'test_models.py').is_file():
        folder.parent.mkdir(exist_ok=True)
        subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
             '--no-binary', 'timm', '--dest', str(folder.parent), f'timm=={version}'], check=True)
        with tarfile.open(folder.parent / f'timm-{version}.tar.gz') as archive:
            wanted = [
                member for member in archive.getmembers()
                if member.isfile() and Path(member.name).parts[1:] in
                {('tests', 'test_models.py'), ('tests', 'conftest.py'), ('tests', '__init__.py'), ('pyproject.toml',)}]
            archive.extractall(folder.parent, members=wanted, filter='data')
    return folder


def main(arguments: list[str]) -> int:
    """Run the tests and check that they ran."""
    folder = fetch(importlib.metadata.version('timm'))
    report = folder / 'report.xml'
    report.unlink(missing_ok=True)
    paths = [str(HERE), str(ROOT), str(ROOT / 'kernels'), os.environ.get('PYTHONPATH', '')]
    status = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'plugin', '-c', str(folder / 'pyproject.toml'), '--rootdir', str(folder),
         '-p', 'no:cacheprovider', '-q', f'--junitxml={report}', *arguments, str(folder / 'tests' / 'test_models.py')],
        cwd=folder, env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}, check=False).returncode
    if status:
        return status
    cases = ElementTree.parse(report).iter('testcase')
    passed = {case.get('name').split('[')[0] for case in cases if not len(case)}
    # A selection of the caller's own is not measured against the whole.
    missing = set() if '-k' in arguments else REQUIRED - passed
    if missing or not passed:
        print(f'These tests of timm did not run or were skipped: {", ".join(sorted(missing)) or "all"}')
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
