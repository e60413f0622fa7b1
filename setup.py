"""Build entry: setup.cfg holds the metadata; this file finds both packages and what lies outside them."""
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError, ExecError, PlatformError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent


class BuildPy(build_py):
    """Copies configs/ into the wheel as visionssm/configs; a checkout finds them at its root."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, 'visionssm', 'configs')
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / 'configs', target, ignore=shutil.ignore_patterns('__pycache__'))



class BuildNative(build_ext):
    """Builds the native CPU kernels: a plain C library, loaded with ctypes, for no Python or torch in particular.

    It is optional: without a working compiler one line says so, and the package runs on PyTorch alone.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split('.')) + '.so'

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols

    def build_extensions(self) -> None:
        compile_files = self.compiler.compile

        def compile_at_once(sources: list[str], *args: object, **kwargs: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_files([source], *args, **kwargs), sources)
                return [file for files in made for file in files]

        self.compiler.compile = compile_at_once
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError):
            # Apple's compiler has no OpenMP of its own: one thread is better than no library
            ext.extra_compile_args.remove('-fopenmp')
            ext.extra_link_args.remove('-fopenmp')
            try:
                super().build_extension(ext)
            except (CCompilerError, ExecError, PlatformError) as error:
                print(f'visionssm: the native CPU kernels were not built ({error}); PyTorch code serves in their place')


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for every Python 3 of the platform, as no file in it depends on the version."""

    def get_tag(self) -> tuple[str, str, str]:
        return 'py3', 'none', super().get_tag()[2]


NATIVE = Extension(
    'visionssm_kernels.libvisionssm_native', [str(path) for path in sorted(Path('kernels/csrc').glob('*.c'))],
    depends=[str(path) for path in sorted(Path('kernels/csrc').glob('*.h'))], optional=True,
    extra_compile_args=['-O3', '-std=gnu11', '-fopenmp', '-fvisibility=hidden', '-fno-math-errno',
                        '-falign-loops=32', '-Wno-psabi'],
    extra_link_args=['-fopenmp'])

setup(packages=find_packages(include=['visionssm*']) + find_packages('kernels'),
      py_modules=['visionssm_launcher'],
      package_dir={'visionssm_kernels': 'kernels/visionssm_kernels'},
      ext_modules=[NATIVE],
      cmdclass={'bdist_wheel': AnyPythonWheel, 'build_ext': BuildNative, 'build_py': BuildPy})
