"""Reading of the files that the official Mamba-YOLO code, like other descendants of ultralytics, writes.

Such a file is a whole pickled model. PyTorch's own restricted reader (`weights_only=True`) reads it here, with an empty
shell in the place of every foreign class that such files name: a shell keeps attributes and runs nothing, so neither
foreign code nor the package ultralytics is needed. A file that names anything else is refused before it is read.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from visionssm.utils.suggest import list_names

from .load import CheckpointError, allow_globals, read_checkpoint, unsafe_globals

__all__ = ['read_ultralytics']

_SHELL_PREFIXES = ('ultralytics.', 'torch.nn.modules.', 'timm.', 'numpy.core.multiarray.', 'numpy._core.multiarray.')
_SHELL_NAMES = frozenset((
    '_codecs.encode', 'builtins.getattr', 'functools.partial', 'numpy.dtype', 'pathlib.PosixPath',
    'pathlib.WindowsPath'))


class _Shell:
    """Stands for a foreign object: takes any arguments, keeps its attributes, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignore the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keep attributes, and nothing of another state."""
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_ultralytics(path: str | os.PathLike) -> dict[str, Any]:
    """Read a model that the official training wrote, without running what is in the file.

    Args:
        path: A `.pt` file: a checkpoint of a run (its averaged weights are taken), or a final one.

    Returns:
        'state_dict', name to tensor in the official names, float32 (the files hold float16), for
        `visionssm.from_official('mamba_yolo', state_dict)`; 'names', class number to name; and 'nc', the number of
        classes, None where the file does not say it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, names objects that no such file needs, or holds no model.
    """
    path = Path(path)
    named = unsafe_globals(path) if path.is_file() else []
    foreign = [name for name in named if not name.startswith(_SHELL_PREFIXES) and name not in _SHELL_NAMES]
    if foreign:
        raise CheckpointError(
            f'The checkpoint {str(path)!r} was not read: it names Python objects that no file of ultralytics needs: '
            f'{list_names(sorted(foreign))}. They could run code; do not open it unless you know why they are there.')
    with allow_globals([*((_Shell, name) for name in named), (set, 'builtins.set')]):
        content = read_checkpoint(path)
    models = [content.get(key) for key in ('ema', 'model')]
    model = next((model for model in models if isinstance(model, _Shell)), None)
    if model is None:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} holds no pickled model under 'ema' or 'model'. It holds: "
            f'{list_names(sorted(map(str, content)))}. Read a state dict with visionssm.checkpoints.load_state_dict.')
    try:
        state_dict = dict(_tensors(model, ''))
    except (AttributeError, RecursionError, TypeError) as error:
        raise CheckpointError(f'The model in {str(path)!r} is not built like a torch.nn.Module: {error}.') from error
    names = getattr(model, 'names', None) or {}
    names = dict(names) if isinstance(names, dict) else dict(enumerate(names))
    return {'state_dict': state_dict, 'names': names, 'nc': getattr(model, 'nc', len(names) or None)}


def _tensors(shell: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what `torch.nn.Module.state_dict` would, in its order."""
    for name, value in [*shell._parameters.items(), *shell._buffers.items()]:
        if value is not None and name not in shell._non_persistent_buffers_set:
            if not isinstance(value, torch.Tensor):
                raise TypeError(f'{prefix}{name} is no tensor')
            value = value.detach()
            yield f'{prefix}{name}', value.float() if value.is_floating_point() else value
    for name, child in shell._modules.items():
        if child is not None:
            yield from _tensors(child, f'{prefix}{name}.')
