"""Pairs of a good and a bad picture: from two folders or LMDBs, or from one with faults made on the fly."""
import logging
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ...registry import DATASETS, FUNCTIONS, TRANSFORMS
from ...utils.suggest import check_choice
from .storage import StoredPicture, open_store, read_pixels, resolve_folder

__all__ = ['PairedImages', 'TestSets', 'collate_pairs', 'read_pixels']

logger = logging.getLogger('visionssm')


class _Pair(NamedTuple):
    target: StoredPicture
    source: StoredPicture | None


@DATASETS.register_module()
class PairedImages(Dataset):
    """Good pictures (`gt`) with bad ones (`lq`) from another place, or with faults made on the fly.

    A sample is `dict(inputs=Tensor (C, h, w), targets=Tensor (C, scale h, scale w), path, index, name)`, float32 in
    [0, 1] (noise goes beyond). Random numbers come from Python's and PyTorch's global generators, which the loop seeds
    for each sample, so that a resumed run sees what the uninterrupted one would have seen.

    Args:
        gt: Folder of the good pictures, or an LMDB of them, a picture, or several of these; see `storage.open_store`.
        lq: The bad ones, as many as `gt`; None makes them by `degrade`. `{scale}` and the keys of
            `variables` are filled in.
        data_root: Stands before both; `package:NAME/FOLDER` is a folder inside an installed Python package.
        scale: Size of a good picture over that of its bad one.
        lq_name: Name of a bad picture, without suffix, by that of the good one: '{}x{scale}' or '{}_LRBI_x{scale}'.
            Of several templates the first counts that a place has a picture for.
        degrade: Config of a fault: `BicubicFault`, `NoiseFault`, `JpegFault` or `SecondOrderFault`.
        patch: Side of the good patch that a training sample is; None gives whole pictures.
        augment: Mirror and transpose patches, each with probability 1/2.
        pad: Mirror pictures smaller than the patch at their right and lower border; otherwise they are refused.
        mode: 'RGB' or 'L' for gray.
        variables: More values for the templates.
        cache: Keep decoded pictures in memory, in each worker process.
        repeat: How often the pictures count in an epoch.
        name: Name of the data set in tables; by default the first folder of `gt`.
    """

    def __init__(
            self,
            gt: str | Sequence[str],
            lq: str | Sequence[str] | None = None,
            data_root: str = '',
            scale: int = 1,
            lq_name: str | Sequence[str] = '{}',
            degrade: dict[str, Any] | None = None,
            patch: int | None = None,
            augment: bool = False,
            pad: bool = False,
            mode: str = 'RGB',
            variables: Mapping[str, Any] | None = None,
            cache: bool = False,
            repeat: int = 1,
            name: str | None = None,
    ) -> None:
        check_choice('mode', mode, ('RGB', 'L'))
        if (lq is None) == (degrade is None):
            raise ValueError(f'lq is {lq!r} and degrade is {degrade!r}; give one of them: a folder of bad pictures, or '
                             "what makes them, as in degrade=dict(type='BicubicFault', scale=2)")
        if patch is not None and (patch < 1 or patch % scale):
            raise ValueError(f'patch is {patch}; it must be a multiple of the scale {scale} above 0')
        self.degrade = None if degrade is None else TRANSFORMS.build(degrade)
        if self.degrade is not None and self.degrade.scale != scale:
            raise ValueError(f'scale is {scale} and that of degrade {self.degrade.scale}; they must be the same')
        self.scale, self.patch, self.augment, self.pad, self.mode = scale, patch, augment, pad, mode
        self.cache: dict[StoredPicture, torch.Tensor] | None = {} if cache else None
        self.repeat = repeat
        fields = {**(variables or {}), 'scale': scale}
        good, bad = ([text.format(**fields) for text in ([part] if isinstance(part, str) else part or [])]
                     for part in (gt, lq))
        self.name = name or (Path(good[0]).parts or ('.',))[0]
        root = resolve_folder(data_root)
        self.pairs: list[_Pair] = []
        if bad and len(bad) != len(good):
            raise ValueError(f'gt has {len(good)} entries and lq {len(bad)}; each needs its partner')
        for i, place in enumerate(good):
            store = open_store(root / place)
            targets = [StoredPicture(store, number) for number in range(len(store))]
            sources = self._partners(targets, root / bad[i], lq_name, fields) if bad else [None] * len(targets)
            self.pairs += map(_Pair, targets, sources)
        self.metainfo = {'data_set': self.name}

    @staticmethod
    def _partners(
            targets: Sequence[StoredPicture],
            place: Path,
            templates: str | Sequence[str],
            fields: dict[str, Any],
    ) -> list[StoredPicture]:
        """The bad picture of each good one, by its name."""
        store = open_store(place)
        found = {name: StoredPicture(store, number) for number, name in enumerate(store.names)}
        if place.is_file() and len(found) == len(targets) == 1:
            return list(found.values())
        templates = [templates] if isinstance(templates, str) else templates
        partners = []
        for target in targets:
            wanted = [template.format(target.name, **fields) for template in templates]
            name = next((name for name in wanted if name in found), None)
            if name is None:
                near = ', '.join(sorted(found)[:3])
                raise ValueError(f'{target.label} has no partner {" or ".join(wanted)} in {place}, which has {near} '
                                 "... Set lq_name to the template of the names, as '{}x{scale}'")
            partners.append(found[name])
        return partners

    def __len__(self) -> int:
        return len(self.pairs) * self.repeat

    def _read(self, picture: StoredPicture) -> torch.Tensor:
        if self.cache is None:
            return picture.pixels(self.mode)
        if picture not in self.cache:
            self.cache[picture] = picture.pixels(self.mode)
        return self.cache[picture]

    def _load(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The two pictures, uint8, (C, scale h, scale w) and (C, h, w)."""
        pair, scale = self.pairs[index], self.scale
        target = self._read(pair.target)
        if pair.source is None:
            height, width = (side // scale * scale for side in target.shape[-2:])
            if not height or not width:
                raise ValueError(f'{pair.target.label} has {target.shape[-1]} x {target.shape[-2]} pixels, too few '
                                 f'to be shrunk {scale} times; take it out of the data set')
            return target[:, :height, :width], None
        source = self._read(pair.source)
        size = [scale * side for side in source.shape[-2:]]
        rest = [have - want for have, want in zip(target.shape[-2:], size)]
        # the benchmarks' good pictures are up to scale - 1 pixels larger
        if not all(0 <= side < scale for side in rest):
            raise ValueError(f'{pair.target.label} has {target.shape[-1]} x {target.shape[-2]} pixels and '
                             f'{pair.source.label} {source.shape[-1]} x {source.shape[-2]}, which times the scale '
                             f'{scale} are {size[1]} x {size[0]}: the two do not belong together, or scale is wrong')
        return target[:, :size[0], :size[1]], source

    def _grow(self, picture: torch.Tensor, side: int, path: str) -> torch.Tensor:
        """Refuse or pad what is smaller than the patch."""
        height, width = picture.shape[-2:]
        if min(height, width) >= side:
            return picture
        if not self.pad:
            raise ValueError(f'{path} has {width} x {height} pixels, fewer than the patch of {side} x {side}; take it '
                             'out of the data set, or set patch to less, or pad=True')
        amount = ((0, 0), (0, max(0, side - height)), (0, max(0, side - width)))
        return torch.from_numpy(np.pad(picture.numpy(), amount, mode='reflect'))

    def _cut(self, target: torch.Tensor, source: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A random patch of both, as floats; where there is no source it is made of the patch and what surrounds it."""
        scale, side = self.scale, int(self.patch or 0)
        small = side // scale
        top = random.randint(0, target.shape[-2] // scale - small)
        left = random.randint(0, target.shape[-1] // scale - small)
        rows, columns = slice(top * scale, top * scale + side), slice(left * scale, left * scale + side)
        patch = _to_float(target[:, rows, columns])
        if source is not None:
            return patch, _to_float(source[:, top:top + small, left:left + small])
        margin, align = self.degrade.margin, self.degrade.align
        above, before = (max(0, part.start - margin) // align * align if margin else part.start
                         for part in (rows, columns))
        bottom, right = rows.stop + margin, columns.stop + margin
        spoilt = self.degrade(_to_float(target[:, above:bottom, before:right]))
        y, x = (rows.start - above) // scale, (columns.start - before) // scale
        return patch, spoilt[:, y:y + small, x:x + small]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} outside of a data set of {len(self)} pictures')
        place = index % len(self.pairs)
        path = self.pairs[place].target.label
        target, source = self._load(place)
        if self.patch is None:
            good = _to_float(target)
            bad = self.degrade(good) if source is None else _to_float(source)
        else:
            target = self._grow(target, self.patch, path)
            source = None if source is None else self._grow(source, self.patch // self.scale, path)
            good, bad = self._cut(target, source)
        if self.augment:
            good, bad = _turn(good, bad)
        return {'inputs': bad.contiguous(), 'targets': good.contiguous(), 'path': path, 'index': index,
                'name': self.name}


def _to_float(picture: torch.Tensor) -> torch.Tensor:
    return picture.float() / 255


def _turn(*pictures: torch.Tensor) -> list[torch.Tensor]:
    """Mirror and transpose pictures alike, each with probability 1/2, in the order of the official code."""
    across, down, over = (random.random() < 0.5 for _ in range(3))
    axes = [axis for axis, wanted in ((-1, across), (-2, down)) if wanted]
    turned = [picture.flip(axes) if axes else picture for picture in pictures]
    return [picture.transpose(-1, -2) for picture in turned] if over else turned


@DATASETS.register_module()
class TestSets(Dataset):
    """Several test sets one after the other, with a row of the table for each.

    Args:
        sets: Configs of data sets, `PairedImages` unless they name a `type`.
        common: Arguments that all of them have, unless they say otherwise.
        data_root: Stands before all folders.
        skip_missing: Leave out sets whose folders do not exist, with a warning; all of them missing is an error.
    """

    __test__ = False

    def __init__(
            self,
            sets: Sequence[dict[str, Any]],
            common: dict[str, Any] | None = None,
            data_root: str = '',
            skip_missing: bool = False,
    ) -> None:
        self.parts: list[Dataset] = []
        missing = []
        for options in sets:
            cfg = {'type': 'visionssm.PairedImages', 'data_root': data_root, **(common or {}), **options}
            try:
                self.parts.append(DATASETS.build(cfg))
            except FileNotFoundError as error:
                if not skip_missing:
                    raise
                missing.append(str(error))
                logger.warning('a test set is left out: %s', error)
        if not self.parts:
            raise FileNotFoundError(f'none of the test sets is there: {"; ".join(missing)}. Put them below '
                                    f'{os.path.abspath(data_root)}, or name their place by --data')
        names = [getattr(part, 'name', str(number)) for number, part in enumerate(self.parts)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f'two test sets are called {twice[0]}; give each a name=... of its own')
        self.places = [(part, index) for part in self.parts for index in range(len(part))]
        self.metainfo = {'data_set': names}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, place = self.places[index]
        return {**part[place], 'index': index}


@FUNCTIONS.register_module()
def collate_pairs(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks samples of `PairedImages`; pictures of one batch must have one size."""
    shapes = {tuple(sample['inputs'].shape) for sample in samples}
    if len(shapes) > 1:
        raise ValueError(f'pictures of one batch have different shapes {sorted(shapes)}: whole pictures need '
                         'batch_size=1, and training a patch')
    return {**{key: torch.stack([sample[key] for sample in samples]) for key in ('inputs', 'targets')},
            'paths': [sample['path'] for sample in samples], 'indices': [sample['index'] for sample in samples],
            'names': [sample['name'] for sample in samples]}
