"""What training checkpoints of OpenMMLab hold beside tensors, read without OpenMMLab and without running anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .load import allow_globals

__all__ = ['mmengine_values']


class _History:
    """Stands in for MMEngine's log buffers, whose state may name functions."""

    def __setstate__(self, state: dict) -> None:
        self.values = state.get('_log_history')


def _no_attribute(*_: Any) -> None:
    """Stands in for the look-up of an attribute, with which a file could reach any code."""


@contextmanager
def mmengine_values() -> Iterator[None]:
    """Let what OpenMMLab's training checkpoints hold beside tensors through a reader that runs no code of the file."""
    core = np._core if hasattr(np, '_core') else np.core
    allowed = [core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype,
               *(type(np.dtype(kind)) for kind in ('f4', 'f8', 'i4', 'i8', 'u4', '?')),
               (_History, 'mmengine.logging.history_buffer.HistoryBuffer'),
               (_no_attribute, 'builtins.getattr'), (_no_attribute, '__builtin__.getattr')]
    with allow_globals(allowed):
        yield
