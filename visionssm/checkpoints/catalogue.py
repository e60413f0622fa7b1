"""The catalogue of released weights: what exists, where it lies, what it belongs to and under which licence.

The facts are data, one YAML file a family in `visionssm/checkpoints/data`: inside the package, so that an installed one
has them too. What holds for a whole file stands at its top and counts for every entry that says nothing else.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from visionssm.utils.suggest import did_you_mean

from .load import CheckpointError

__all__ = ['Entry', 'entries', 'families', 'find_entry', 'list_weights', 'without_weights']

FOLDER = Path(__file__).resolve().parent / 'data'
_HUB = re.compile(r'hf://(?P<repo>[^/]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)')
_SHARED = ('repository', 'commit', 'paper', 'licence', 'licence_note', 'task', 'trained_on', 'preprocessing',
           'published', 'ema', 'reader')


@dataclass(frozen=True)
class Entry:
    """One released file of weights.

    Attributes:
        name: `MODEL.TAG`, or the name of the config of a detector or segmenter, with a tag where there are several.
        family: Name of the family as `visionssm.from_official` takes it.
        model: Registered name of the model; of the backbone for a detector or segmenter.
        config: Config of a detector or segmenter below `configs/`; empty for a model.
        task: 'classification', 'detection', ...
        file: Name of the file where it is published; empty where that is not known.
        sources: Addresses to try in this order: `https://...`, or `hf://OWNER/REPOSITORY[@REVISION]/FILE` on the hub.
        page: Page from which a browser gets the file; empty where there is none.
        published: Whether the authors gave the file to the public.
        size: Size in bytes; None where it is not known.
        about: Size as a page states it, rounded; empty where none does.
        sha256: Hash of the file; None where it is not known. Then that of the first download counts from then on.
        licence: Licence as far as one is stated.
        licence_note: What is to be known about it.
        trained_on: Training data.
        preprocessing: What the weights expect of images.
        metric: What the authors state, name to value (`top1`, `box_ap`, `miou`, ...; per cent, dB or as the name says).
        keys: Name of the list of official keys and shapes that the entry was checked against, below the folder `keys`.
        ema: Whether the averaged weights are meant where the file holds both.
        reader: 'state_dict', or 'ultralytics' for whole pickled models.
        repository: Official repository.
        commit: Its commit from which the facts are.
        paper: Its paper.
        note: What else is to be known.
    """

    name: str
    family: str
    model: str
    task: str
    repository: str
    commit: str
    paper: str
    licence: str
    trained_on: str
    keys: str
    config: str = ''
    file: str = ''
    sources: tuple[str, ...] = ()
    page: str = ''
    published: bool = True
    size: int | None = None
    about: str = ''
    sha256: str | None = None
    licence_note: str = ''
    preprocessing: Mapping[str, Any] = field(default_factory=dict, hash=False)
    metric: Mapping[str, float] = field(default_factory=dict, hash=False)
    ema: bool = False
    reader: str = 'state_dict'
    note: str = ''

    @property
    def tag(self) -> str:
        """The tag of the weights; empty for a name without one."""
        return self.name.partition('.')[2]

    @property
    def stored_name(self) -> str:
        """Name of the file in the cache: the published one where it is known."""
        return self.file or f'{self.name}.pth'

    def by_hand(self) -> str:
        """Return how to get the file where no address of it can be fetched; empty where one can."""
        if self.sources:
            return ''
        where = f'they are at {self.page}' if self.page else f'the authors published none, see {self.repository}'
        text = (f'No weights of {self.name} can be fetched automatically ({where}). Put a file that you have in place '
                f'with `python -m visionssm download {self.name} --from-file FILE`')
        return f'{text}.' if self.config else \
            f'{text}, or use it as it is: visionssm.create_model({self.model!r}, checkpoint_path=FILE).'


def split_hub(source: str) -> tuple[str, str, str | None] | None:
    """Return (repository, file, revision) of an address on the hub, None for another address."""
    match = _HUB.fullmatch(source)
    return (match['repo'], match['file'], match['revision']) if match else None


def entries(family: str | None = None) -> list[Entry]:
    """Return the entries of all families, or of one.

    Args:
        family: Name of the family, for example 'vmamba'.

    Returns:
        Entries, in the order of their files.

    Raises:
        ValueError: There is no such family.
    """
    names = families()
    if family is not None and family not in names:
        raise ValueError(f'Unknown family {family!r}. {did_you_mean(family, names)}')
    return [entry for name in names if family in (None, name) for entry in _read(FOLDER / f'{name}.yaml')[0]]


def without_weights(family: str | None = None) -> dict[str, str]:
    """Return the models, of all families or of one, that have no entry as there are no weights: name to reason."""
    return {name: reason for one in families() if family in (None, one)
            for name, reason in _read(FOLDER / f'{one}.yaml')[1].items()}


def list_weights(task: str | None = None) -> list[str]:
    """Return the names of all entries, or of those of a task, in the order of the catalogue."""
    return [entry.name for entry in entries() if task in (None, entry.task)]


def find_entry(name: str) -> Entry:
    """Find an entry by its name; for the name of a model or config without a tag, its first one.

    Args:
        name: For example 'vmamba_tiny', 'vssd_tiny.mesa_in1k', 'mask-rcnn_vmamba-tiny_fpn_1x_coco'.

    Returns:
        The entry.

    Raises:
        ValueError: There is no such entry; the error names the nearest ones.
        CheckpointError: The model exists, but no weights of it do; the error says why.
    """
    backwards = entries()[::-1]
    known = {entry.name.partition('.')[0]: entry for entry in backwards} | {entry.name: entry for entry in backwards}
    if name in known:
        return known[name]
    reasons = without_weights()
    if name in reasons:
        raise CheckpointError(f'There are no weights of {name}: {reasons[name]}')
    raise ValueError(f'Unknown weights {name!r}. {did_you_mean(name, known)} `visionssm download --list` shows all.')


def parse(content: Mapping[str, Any], family: str) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """Turn the content of one file into entries and the models without weights.

    Args:
        content: What YAML gives.
        family: Name of the file without its suffix.

    Raises:
        ValueError: A field is unknown, missing or of a wrong kind.
    """
    shared = {key: value for key, value in content.items() if key not in ('weights', 'without_weights')}
    _refuse(set(shared) - set(_SHARED), family, 'at its top')
    allowed = {f.name for f in fields(Entry)}
    found = []
    for row in content.get('weights') or ():
        where = f'entry {row.get("name")!r}'
        _refuse(set(row) - allowed | {'family'} & set(row), family, where)
        row = {'model': str(row.get('name', '')).partition('.')[0], **shared, **row, 'family': family}
        row['sources'] = tuple(row.get('sources') or ())
        try:
            found.append(Entry(**row))
        except TypeError as error:
            raise ValueError(f'{family}.yaml, {where}: {error}') from error
    return tuple(found), dict(content.get('without_weights') or {})


def _refuse(names: Iterable[str], family: str, where: str) -> None:
    names = sorted(names)
    if names:
        raise ValueError(f'{family}.yaml has unknown fields {where}: {", ".join(names)}.')


def families() -> list[str]:
    """Return the names of the families."""
    return sorted(path.stem for path in FOLDER.glob('*.yaml'))


@cache
def _read(path: Path) -> tuple[tuple[Entry, ...], dict[str, str]]:
    loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    return parse(yaml.load(path.read_text(encoding='utf-8'), loader), path.stem)  # noqa: S506
