"""The functions that `mamba_ssm` and `causal_conv1d` call references: the drop-in names on the reference backend."""
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from .._dispatch import use_backend
from ..drop_in import causal_conv1d_fn, mamba_inner_fn, selective_scan_fn

__all__ = ['causal_conv1d_ref', 'mamba_inner_ref', 'selective_scan_ref']

P, R = ParamSpec('P'), TypeVar('R')


def _on_reference(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with use_backend('reference'):
            return function(*args, **kwargs)
    return wrapper


causal_conv1d_ref = _on_reference(causal_conv1d_fn)
mamba_inner_ref = _on_reference(mamba_inner_fn)
selective_scan_ref = _on_reference(selective_scan_fn)
