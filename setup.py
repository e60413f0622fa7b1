"""Build entry: setup.cfg holds the metadata; this file finds both packages and what lies outside them."""
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildPy(build_py):
    """Copies configs/ into the wheel as visionssm/configs; a checkout finds them at its root."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, 'visionssm', 'configs')
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / 'configs', target, ignore=shutil.ignore_patterns('__pycache__'))


setup(packages=find_packages(include=['visionssm*']) + find_packages('kernels'),
      package_dir={'visionssm_kernels': 'kernels/visionssm_kernels'},
      cmdclass={'build_py': BuildPy})
