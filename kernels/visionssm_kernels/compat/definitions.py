"""The functions that `mamba_ssm` and `causal_conv1d` call references: the drop-in names on the reference backend."""
import functools
from collections.abc import Callable
from typing import Any

from .._dispatch import use_backend
from ..drop_in import causal_conv1d_fn, mamba_inner_fn, selective_scan_fn

__all__ = ['causal_conv1d_ref', 'mamba_inner_ref', 'selective_scan_ref']


def _on_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with use_backend('reference'):
            return function(*args, **kwargs)
    return wrapper


causal_conv1d_ref = _on_reference(causal_conv1d_fn)
mamba_inner_ref = _on_reference(mamba_inner_fn)
selective_scan_ref = _on_reference(selective_scan_fn)
