"""What the design forbids, checked on the source itself: import directions, near copies, length, device literals."""
import ast
import difflib
import itertools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'visionssm'
KERNELS = ROOT / 'kernels' / 'visionssm_kernels'
SOURCES = sorted([*PACKAGE.rglob('*.py'), *KERNELS.rglob('*.py')])
TOOLS = sorted((ROOT / 'tools').glob('*.py'))

MM = {'mmengine', 'mmcv', 'mmdet', 'mmseg'}
# folder below the root -> top-level names it may not import, and packages of ours that it may import
LAYERS = {
    'kernels/visionssm_kernels': {'visionssm_kernels'},
    'visionssm/utils': {'visionssm.utils'},
    'visionssm/checkpoints': {'visionssm.checkpoints', 'visionssm.utils'},
    'visionssm/layers': {'visionssm.layers', 'visionssm.utils', 'visionssm_kernels'},
    'visionssm/models': {'visionssm.models', 'visionssm.layers', 'visionssm.checkpoints', 'visionssm.utils',
                         'visionssm_kernels'},
    'visionssm/segmentation': {'visionssm.segmentation', 'visionssm.models', 'visionssm.layers',
                               'visionssm.checkpoints', 'visionssm.utils', 'visionssm_kernels'},
    'visionssm/detection': {'visionssm.detection', 'visionssm.models', 'visionssm.layers',
                            'visionssm.checkpoints', 'visionssm.utils', 'visionssm_kernels'},
    'visionssm/restoration': {'visionssm.restoration', 'visionssm.models', 'visionssm.layers',
                              'visionssm.checkpoints', 'visionssm.utils', 'visionssm_kernels'},
    'visionssm/diffusion': {'visionssm.diffusion', 'visionssm.models', 'visionssm.layers',
                            'visionssm.checkpoints', 'visionssm.utils', 'visionssm_kernels'},
    'visionssm/analysis': {'visionssm.analysis', 'visionssm._factory', 'visionssm.export', 'visionssm.restoration',
                           'visionssm.models', 'visionssm.layers', 'visionssm.checkpoints', 'visionssm.data',
                           'visionssm.utils', 'visionssm_kernels'},
    'visionssm/export': {'visionssm.export', 'visionssm._factory', 'visionssm.checkpoints', 'visionssm.utils',
                         'visionssm_kernels'},
    'visionssm/data': {'visionssm.data', 'visionssm.utils'},
    'visionssm/commands': {'visionssm.commands', 'visionssm.cli', 'visionssm.conversion', 'visionssm.hub',
                           'visionssm._factory', 'visionssm.analysis', 'visionssm.export', 'visionssm.models',
                           'visionssm.checkpoints', 'visionssm.utils', 'visionssm_kernels'},
    'visionssm/demo': {'visionssm.demo', 'visionssm.openmmlab', 'visionssm.analysis', 'visionssm.restoration',
                       'visionssm.data', 'visionssm._factory', 'visionssm.checkpoints', 'visionssm.utils'},
}
OPTIONAL = MM | {'cv2', 'matplotlib', 'scipy', 'albumentations', 'diffusers', 'tensorboard', 'mamba_ssm',
                 'causal_conv1d'}
MAX_LINES = [('visionssm/models/', 1000), ('visionssm/layers/', 350), ('kernels/', 400), ('tests/', 400), ('', 500)]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Absolute dotted names that a file imports anywhere in it, relative imports resolved."""
    base = KERNELS.parent if path.is_relative_to(KERNELS) else ROOT
    package = path.relative_to(base).with_suffix('').parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = list(package[:len(package) - node.level + 1]) if node.level else []
            module = '.'.join([*prefix, *([node.module] if node.module else [])])
            if module in ('visionssm', ''):
                yield from ((node.lineno, f'{module}.{alias.name}') for alias in node.names)
            else:
                yield node.lineno, module


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def normalised_body(node: ast.FunctionDef) -> list[str]:
    """The lines of a function without its docstring and comments, as the syntax tree prints them."""
    body = node.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return [line for part in body for line in ast.unparse(part).splitlines()]


def test_there_are_sources_to_check():
    assert len(SOURCES) > 20


@pytest.mark.parametrize('folder', LAYERS)
def test_imports_point_downwards(folder: str):
    wrong = []
    for path in (p for p in SOURCES if relative(p).startswith(folder + '/')):
        for line, name in imported_names(path):
            if name.split('.')[0] not in ('visionssm', 'visionssm_kernels') or name == 'visionssm._version':
                continue
            if not any(name == ok or name.startswith(ok + '.') for ok in LAYERS[folder]):
                wrong.append(f'{relative(path)}:{line} imports {name}')
    assert not wrong, '\n'.join(wrong)


def test_only_the_outer_rim_imports_optional_packages():
    rim = ('visionssm/openmmlab/', 'visionssm/registry.py', 'visionssm/diffusion/_diffusers.py')
    wrong = [f'{relative(path)}:{line} imports {name}' for path in SOURCES if not relative(path).startswith(rim)
             for line, name in imported_names(path) if name.split('.')[0] in OPTIONAL - {'gradio'}]
    assert not wrong, '\n'.join(wrong)


def test_only_the_page_imports_gradio():
    wrong = [f'{relative(path)}:{line}' for path in SOURCES if relative(path) != 'visionssm/demo/app.py'
             for line, name in imported_names(path) if name.split('.')[0] == 'gradio']
    assert not wrong, '\n'.join(wrong)


def test_only_triton_files_import_triton():
    wrong = [f'{relative(path)}:{line}' for path in SOURCES if path.name != 'triton_impl.py'
             for line, name in imported_names(path) if name.split('.')[0] == 'triton']
    assert not wrong, '\n'.join(wrong)


def test_importing_the_package_loads_nothing_optional(run_python):
    code = ('import sys, visionssm\n'
            f'heavy = sorted({sorted(OPTIONAL)!r} & sys.modules.keys())\n'
            'heavy += [name for name in sys.modules if name[:9] == "visionssm" and name.endswith("triton_impl")]\n'
            'print(",".join(heavy))').replace(f'{sorted(OPTIONAL)!r}', f'set({sorted(OPTIONAL)!r})')
    done = run_python('-c', code)
    assert (done.returncode, done.stdout.strip()) == (0, ''), done.stderr


def test_importing_the_package_costs_little_beyond_timm(run_python):
    code = ('import time, timm\nstart = time.process_time()\nimport visionssm\n'
            'print(time.process_time() - start)')
    runs = [float(run_python('-c', code).stdout) for _ in range(2)]
    assert min(runs) <= 0.6, f'import visionssm takes {min(runs):.2f} s of processor time after import timm'


def test_device_names_stay_in_the_back_ends():
    allowed = {'_dispatch.py', 'triton_impl.py'}
    wrong = [f'{relative(path)}:{number}' for path in SOURCES if path.name not in allowed
             for number, line in enumerate(path.read_text().splitlines(), 1)
             if re.search(r"""\.cuda\(|['"]cuda""", line)]
    assert not wrong, '\n'.join(wrong)


def opens_text_by_locale(node: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of the machine."""
    if any(keyword.arg == 'encoding' for keyword in node.keywords):
        return False
    if isinstance(node.func, ast.Attribute):
        return len(node.args) < {'read_text': 1, 'write_text': 2}.get(node.func.attr, 0)
    if not (isinstance(node.func, ast.Name) and node.func.id == 'open'):
        return False
    modes = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == 'mode')]
    return not modes or 'b' not in ast.unparse(modes[0])


def test_text_files_have_the_same_encoding_everywhere():
    wrong = [f'{relative(path)}:{node.lineno}' for path in [*SOURCES, *TOOLS]
             for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
             if opens_text_by_locale(node)]
    assert not wrong, f'add encoding="utf-8": {wrong}'


def test_files_stay_readable_in_length():
    wrong = []
    for path in [*SOURCES, *TOOLS, *sorted((ROOT / 'tests').rglob('*.py'))]:
        limit = next(limit for prefix, limit in MAX_LINES if relative(path).startswith(prefix))
        lines = len(path.read_text().splitlines())
        if lines > limit:
            wrong.append(f'{relative(path)}: {lines} lines, at most {limit}')
    assert not wrong, '\n'.join(wrong)


def test_functions_stay_readable_in_length():
    wrong = []
    for path in [*SOURCES, *TOOLS]:
        if path.name == 'triton_impl.py':
            continue
        for node in functions(path):
            docstring = ast.get_docstring(node, clean=False) or ''
            lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            if node.name != '__init__' and lines > 60:
                wrong.append(f'{relative(path)}:{node.lineno} {node.name}: {lines} lines without its docstring')
    assert not wrong, '\n'.join(wrong)


def test_no_function_is_a_near_copy_of_another():
    bodies = [(f'{relative(path)}:{node.lineno} {node.name}', normalised_body(node))
              for path in SOURCES for node in functions(path)]
    long = [(where, body) for where, body in bodies if len(body) >= 25]
    copies = []
    for (first, a), (second, b) in itertools.combinations(long, 2):
        matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
        if matcher.real_quick_ratio() >= 0.8 and matcher.quick_ratio() >= 0.8 and matcher.ratio() >= 0.8:
            copies.append(f'{first} ~ {second}: {matcher.ratio():.2f}')
    assert not copies, '\n'.join(copies)


def test_every_function_of_the_packages_is_annotated_and_every_module_described():
    wrong = [relative(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not wrong, f'no module docstring: {wrong}'


def test_kernels_folder_is_no_package():
    assert not (ROOT / 'kernels' / '__init__.py').exists()
    assert not (ROOT / 'configs' / '__init__.py').exists()


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_their_data(tmp_path: Path):
    # a copy, because building leaves files beside the sources; a wheel is built where nothing compiles too, and sooner
    source = tmp_path / 'source'
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns('.*', 'build', 'work_dirs', '*.egg-info', '*.so'))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir',
                    str(tmp_path), str(source)], check=True, cwd=tmp_path, env={**os.environ, 'CC': 'false'})
    names = zipfile.ZipFile(next(tmp_path.glob('visionssm-*.whl'))).namelist()
    for needed in ('visionssm_launcher.py', 'visionssm/models/vim.py', 'visionssm/segmentation/mhs_unet.py',
                   'visionssm/analysis/flops.py',
                   'visionssm_kernels/selective_scan/op.py', 'visionssm_kernels/wavefront_scan_2d/op.py',
                   'visionssm/data/fashion_mnist_7k.npz', 'visionssm/configs/_base_/default_runtime.py',
                   'visionssm/configs/classification/vim-pico_fashion-mnist.py'):
        assert needed in names, f'{needed} is missing from the wheel'
    assert 'visionssm_kernels/libvisionssm_native.so' not in names
    assert not any(name.startswith(('tests/', 'tools/', 'kernels/')) for name in names)
