"""The error of weight files."""

__all__ = ['CheckpointError']


class CheckpointError(ValueError):
    """A weight file that cannot be read, or that belongs to another model."""
