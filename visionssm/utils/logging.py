"""The one logger of the package."""

import logging

__all__ = ['get_logger']


def get_logger() -> logging.Logger:
    """Return the package's logger, `visionssm`; it has no handler of its own, as a library should."""
    return logging.getLogger('visionssm')
