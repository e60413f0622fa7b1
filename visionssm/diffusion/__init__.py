"""Models that draw images: diffusion with a state-space backbone."""

from typing import Any

from .dis import DiS
from .process import GaussianDiffusion

# these need the package diffusers (extra "diffusion"), so they are imported when somebody asks
_LAZY = ('DiSModel', 'DiSPipeline', 'image_generators', 'make_scheduler')
__all__ = ['DiS', 'DiSModel', 'DiSPipeline', 'GaussianDiffusion', 'image_generators', 'make_scheduler']


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from . import _diffusers
    return getattr(_diffusers, name)
