"""visionssm: the model zoo of visual state-space models."""
from ._version import __version__

__all__ = ["__version__"]
