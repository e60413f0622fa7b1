"""The models that the page offers: files, weights of the catalogue, and architectures without weights."""
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .._factory import list_models
from ..checkpoints import CheckpointError, Entry, entries
from ..checkpoints.download import look_up
from ..openmmlab.facts import (
    DenseFacts,
    RestorerFacts,
    count_parameters,
    describe_checkpoint,
    describe_dense,
    describe_restorer,
)
from ..utils.paths import PACKAGE

__all__ = ['TASKS', 'Choice', 'all_choices', 'catalogue_choices', 'file_choice', 'folder_choices', 'random_choices']

logger = logging.getLogger('visionssm')

TASKS = ('classification', 'detection', 'segmentation', 'restoration')
TASK_OF_SCOPE = {'mmdet': 'detection', 'mmseg': 'segmentation'}
SUFFIXES = ('.safetensors', '.pth', '.pt')


@dataclass(frozen=True)
class Choice:
    """A model that can be chosen.

    Attributes:
        key: What tells it from all others: a file, a name of the catalogue, or `random:NAME`.
        task: One of `TASKS`.
        name: Registered name, or name of the config of a detector or segmentor; may have a tag.
        source: 'file'; 'catalogue'; 'random' for an architecture with random weights, which predicts nothing.
        entry: Entry of the catalogue.
        dense: What a file says about its detector or segmentor.
        arguments: What the constructor needs beside the name, as pairs.
    """

    key: str
    task: str
    name: str
    source: Literal['file', 'catalogue', 'random']
    entry: Entry | None = None
    dense: DenseFacts | None = None
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def is_here(self) -> bool:
        """Whether its weights need no download."""
        return self.entry is None or look_up(self.entry) is not None

    @property
    def title(self) -> str:
        """Its name; for a file, that of the file, or of the training that exported it."""
        if self.source != 'file':
            return self.name
        path = Path(self.key).absolute()
        return path.parent.parent.name if path.parts[-2:] == ('best', 'model.safetensors') else path.stem

    @property
    def analysable(self) -> bool:
        """Whether the model can be built by its name alone."""
        return self.dense is None and not (self.entry and self.entry.config)

    @property
    def label(self) -> str:
        """What stands in the list."""
        if self.source == 'file':
            return f'{self.title} ({self.name})' if self.name else self.title
        if self.source == 'random':
            return f'{self.name} (random weights)'
        if self.is_here:
            return self.name
        return f'{self.name} ({", ".join(["to download", *self._size()])})'

    def card(self) -> str:
        """Return what is known about it in a line of Markdown."""
        facts = [f'**{self.name or self.title}**', *self._parameters()]
        if self.source == 'random':
            return ' · '.join([*facts, 'random weights: nothing is learnt, only the architecture shows'])
        if self.entry is None:
            return ' · '.join([*facts, _megabytes(os.path.getsize(self.key)), f'file {Path(self.key).name}'])
        facts += [*self._size(), f'licence: {self.entry.licence}', f'trained on {self.entry.trained_on}']
        facts += [f'{name} {value:g} (stated)' for name, value in list(self.entry.metric.items())[:2]]
        facts.append(self.entry.paper)
        return ' · '.join(facts if self.is_here else [*facts, 'its weights are downloaded on first use'])

    def _size(self) -> list[str]:
        """The size of the file to fetch, or nothing where it is not known."""
        assert self.entry is not None
        size = _megabytes(self.entry.size) if self.entry.size else self.entry.about
        return [size] if size else []

    def _parameters(self) -> list[str]:
        if not self.analysable:
            return [f'backbone {self.entry.model}'] if self.entry else []
        count = _parameters(self.name.partition('.')[0], self.arguments)
        return [f'{count / 1e6:.3g} M parameters' if count >= 1e6 else f'{count / 1e3:.3g} k parameters']


@functools.lru_cache(maxsize=256)
def _parameters(name: str, arguments: tuple[tuple[str, Any], ...]) -> int:
    return count_parameters(name, **dict(arguments))


def _megabytes(size: int) -> str:
    return f'{size / 1e6:.3g} MB'


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _pairs(arguments: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((key, _hashable(value)) for key, value in arguments.items() if not isinstance(value, dict))


def file_choice(path: str | os.PathLike) -> Choice:
    """Find out what a weight file holds.

    Args:
        path: An export or a training checkpoint, of any task but diffusion, or weights of a restoration model.

    Returns:
        The choice.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It cannot be read, or holds what the page cannot show.
    """
    file = os.fspath(path)
    restorer: RestorerFacts | None = describe_restorer(file)
    if restorer is not None:
        return Choice(file, 'restoration', restorer.name, 'file', arguments=_pairs(restorer.arguments))
    dense = describe_dense(file)
    if dense.cfg is not None:
        return Choice(file, TASK_OF_SCOPE[dense.cfg.default_scope], '', 'file', dense=dense)
    facts = describe_checkpoint(file)
    if facts.name is None:
        raise CheckpointError(f'{file} does not say which model it holds: give an export of a training here '
                              '(best/model.safetensors), or put published weights in place by `visionssm download '
                              'NAME --from-file FILE`')
    return Choice(file, 'classification', facts.name, 'file', arguments=_pairs(facts.arguments))


def folder_choices(folder: Path | None = None) -> list[Choice]:
    """Return what the weight files of a folder hold; files that the page cannot show are left out.

    Args:
        folder: The folder; `checkpoints` of the checkout when None.
    """
    folder = PACKAGE.parent / 'checkpoints' if folder is None else folder
    found = []
    for path in sorted(path for path in folder.glob('*') if path.suffix in SUFFIXES):
        try:
            found.append(file_choice(path))
        except (CheckpointError, OSError) as error:
            logger.info('not offered: %s', error)
    return found


def catalogue_choices() -> list[Choice]:
    """Return the published weights that are here or can be fetched, those that are here first."""
    # a model of segmentation without a config lacks its preprocessing and the names of its classes
    known = [entry for entry in entries() if entry.task in TASKS
             and (entry.config or entry.task in ('classification', 'restoration'))]
    found = [Choice(entry.name, entry.task, entry.name, 'catalogue', entry) for entry in known
             if entry.sources or look_up(entry)]
    return sorted(found, key=lambda choice: not choice.is_here)


def random_choices() -> list[Choice]:
    """Return all architectures that take pictures, with random weights: for looking at them alone."""
    return [Choice(f'random:{name}', task, name, 'random') for task in TASKS for name in list_models(task)]


def all_choices(files: Sequence[str | os.PathLike] = ()) -> list[Choice]:
    """Return all choices, each once: given files, those of the checkout, the catalogue's, and random weights.

    Args:
        files: Weight files; one that cannot be shown is an error.
    """
    given = [file_choice(file) for file in files]
    found = {choice.key: choice for choice in [*given, *folder_choices(), *catalogue_choices(), *random_choices()]}
    return list(found.values())
