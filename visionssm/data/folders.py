"""Folders of data that are written as a whole or not at all."""
import os
import shutil
from pathlib import Path

__all__ = ['make_room', 'replace_folder']


def make_room(target: Path, force: bool) -> None:
    """Refuses to write where something is that must stay.

    Args:
        target: The folder that will be written.
        force: Whether a folder that a tool of this package made, with a README.txt, may be replaced.
    """
    if target.exists() and not force:
        raise FileExistsError(f'{target} exists: remove it, name another folder, or give --force to replace it')
    if target.exists() and not (target / 'README.txt').is_file():
        # a mistyped folder must not cost anyone their data
        raise FileExistsError(f'{target} was not made by this tool (it has no README.txt): remove it by hand')


def replace_folder(source: Path, target: Path) -> None:
    """Gives a finished folder its name; what was there goes only after the new one is complete.

    Args:
        source: The finished folder, on the same disk.
        target: Its new name.
    """
    old = target.with_name(f'.{target.name}.{os.getpid()}.old')
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)
