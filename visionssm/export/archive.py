"""Writing a model as ONNX, as an archive of torch.export, or as plain weights."""
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionssm_kernels import export_decompositions

from .._version import __version__
from ..checkpoints import save_safetensors
from .inputs import Inputs
from .loops import loop_decompositions

__all__ = ['export_archive', 'export_onnx', 'export_weights', 'need']

# a protobuf holds 2 GiB; above that ONNX keeps weights in a second file
LARGE = 1_800_000_000


def need(package: str) -> None:
    """Raise ImportError, with what to install, where a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f'this export needs {package}: pip install "visionssm[export]" brings it')


def _texts(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """Metadata as the formats hold them, with the program that wrote them."""
    notes = {'producer': f'visionssm {__version__}', **(metadata or {})}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in notes.items()}


@contextmanager
def _place(path: Path) -> Iterator[Path]:
    """Give a name to write to; what is there at the end, with files beside it, replaces the old in one step each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder:
        target = Path(folder, path.name)
        yield target
        # the file that names the others comes last
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == target):
            os.replace(file, path.parent / file.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on its own doings from the user; its errors are exceptions."""
    names = ('torch.onnx', 'onnxscript', 'onnx_ir', 'torch.fx', 'torch.export')
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _trace(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> torch.export.ExportedProgram:
    if model.training:
        raise ValueError('the model is in training mode; call model.eval() before the export')
    tensors = inputs.tensors
    if dynamic_batch:
        # one example alone would be taken for a constant
        tensors = tuple(torch.cat([tensor[:1]] * 2) for tensor in tensors)
    dims = tuple({0: torch.export.Dim('batch')} for _ in tensors) if dynamic_batch else None
    with torch.no_grad():
        return torch.export.export(model, tensors, dynamic_shapes=dims, strict=False)


@contextmanager
def _known_to_the_exporter(decompositions: Mapping[torch._ops.OpOverload, Callable]) -> Iterator[None]:
    """Lend PyTorch's table ours: the exporter takes no other, and a pass in front of its own doubles the time."""
    table = torch._decomp.decomposition_table
    before = {op: table[op] for op in decompositions if op in table}
    table.update(decompositions)
    try:
        yield
    finally:
        for op in decompositions:
            table.pop(op)
        table.update(before)


def export_onnx(
        model: nn.Module,
        path: str | os.PathLike,
        inputs: Inputs,
        dynamic_batch: bool = False,
        metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model in standard ONNX operators; scans become loops (`Scan`), so that no custom operator is needed.

    Args:
        model: In evaluation mode, on the CPU, in float32.
        path: The file; weights above 1.8 GB go into `FILE.data` beside it.
        inputs: Names and examples, see `example_inputs`. Height and width of the graph are theirs.
        dynamic_batch: Let the graph take any number of pictures.
        metadata: Kept in the file as text.

    Returns:
        The path.

    Raises:
        ImportError: The extra is not installed.
        ValueError: The model is in training mode.
    """
    for package in ('onnx', 'onnxscript'):
        need(package)
    from onnxscript import optimizer

    from .onnx_ops import TRANSLATIONS

    with _quiet():
        program = _trace(model, inputs, dynamic_batch)
        with _known_to_the_exporter(loop_decompositions()):
            onnx_program = torch.onnx.export(
                program, dynamo=True, verbose=False, optimize=False, input_names=list(inputs.names),
                custom_translation_table=TRANSLATIONS)
        # the exporter's own clean-up takes minutes on thousands of nodes and wins nothing: runtimes fuse anyway
        for clean in (optimizer.inline, optimizer.fold_constants, optimizer.remove_unused_nodes):
            clean(onnx_program.model)
    onnx_program.model.metadata_props.update(_texts(metadata))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with _place(Path(path)) as target:
        onnx_program.save(target, external_data=weights > LARGE)
    return Path(path)


def export_archive(
        model: nn.Module,
        path: str | os.PathLike,
        inputs: Inputs,
        dynamic_batch: bool = False,
        keep_ops: bool = False,
        metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as an archive that `torch.export.load` reads, and AOTInductor compiles.

    Args:
        model: In evaluation mode.
        path: The file, ending in .pt2.
        inputs: Names and examples. Height and width of the graph are theirs.
        dynamic_batch: Let the graph take any number of pictures.
        keep_ops: Keep this package's ops, which are fast, and need `import visionssm_kernels` before the file is
            loaded. Else the graph consists of PyTorch's own operations and loads anywhere.
        metadata: Kept in the file as text.

    Returns:
        The path.
    """
    if Path(path).suffix != '.pt2':
        raise ValueError(f'{path}: the name of an archive of torch.export ends in .pt2')
    with _quiet():
        program = _trace(model, inputs, dynamic_batch)
        if not keep_ops:
            program = program.run_decompositions(export_decompositions())
        with _place(Path(path)) as target:
            torch.export.save(program, target, extra_files={'visionssm.json': json.dumps(_texts(metadata))})
    return Path(path)


def export_weights(model: nn.Module, path: str | os.PathLike, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a model's weights as safetensors, which every loader of the package reads.

    Args:
        model: Any model.
        path: The file, ending in .safetensors.
        metadata: Kept in the file's header as text.

    Returns:
        The path.
    """
    if Path(path).suffix != '.safetensors':
        raise ValueError(f'{path}: the name of a file of weights ends in .safetensors')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(save_safetensors(model.state_dict(), path, _texts(metadata)))
