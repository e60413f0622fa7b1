"""visionssm: the model zoo of visual state-space models."""

from . import models
from ._factory import create_model, list_models
from ._version import __version__
from .models._official import from_official, to_official

__all__ = ['__version__', 'create_model', 'from_official', 'list_models', 'models', 'to_official']
