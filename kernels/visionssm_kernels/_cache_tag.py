"""Keeps graphs that `torch.compile` cached for another version of this package from being run.

The keys of PyTorch's caches on disk hold the names of our ops, and not what an op is made of nor which strides its
fake kernel promises. So the sources of the package become part of all keys.
"""
import hashlib
from pathlib import Path

from torch.compiler import config


def digest_sources(folder: Path) -> str:
    """Returns a short hash of all Python files of a folder, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob('*.py')):
        digest.update(f'{path.relative_to(folder).as_posix()}\0'.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def tag_compiler_caches() -> None:
    """Adds this version to the tag of PyTorch's caches; what a user has set there stays."""
    tag = f'visionssm_kernels-{digest_sources(Path(__file__).parent)}'
    if hasattr(config, 'cache_key_tag') and tag not in config.cache_key_tag.split():  # younger than PyTorch 2.6
        config.cache_key_tag = f'{config.cache_key_tag} {tag}'.strip()
