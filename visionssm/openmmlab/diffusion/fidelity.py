"""FID, sFID, IS, precision and recall of drawn pictures: sets of pictures, statistics in files, and `tools/fid.py`.

Numbers carry the name of the network that looks at the pictures, `FID[vim_pico]`; without one they are those of the
Inception network of 2015, with its published weights, which papers report.
"""
import argparse
import io
import json
import logging
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import DefaultScope
from PIL import Image
from tqdm import tqdm

from ...diffusion.fidelity import Moments, frechet_distance, inception_score, moments, precision_recall
from ...registry import DATASETS
from ...utils.command import Command
from ...utils.files import atomic_write
from ...utils.reporting import Report
from ..check import ConfigError
from ..cli import USER_ERRORS, _OptionsAction, load_config
from ..data import batches
from ..image_io import open_image
from ..predict import find_images
from ..visuals import to_picture, write_json
from .extractors import INCEPTION, Extractor, build_extractor

__all__ = ['PictureSet', 'compare', 'measure', 'measure_dataset', 'measure_files', 'read_statistics',
           'run_fid', 'save_statistics', 'to_image']

logger = logging.getLogger('visionssm')

# as tools/sample.py calls the pictures of a class
DRAWN_NAME = re.compile(r'(\d{4,})_\d{5,}')


@dataclass
class PictureSet:
    """What is known about a set of pictures."""
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    """What an extractor returned, a row a picture; nothing for statistics of a file."""
    moments: dict[str, Moments] = field(default_factory=dict)
    """Statistics of `features` and `spatial` from a file, which count more than those of the rows."""
    labels: torch.Tensor | None = None
    """Classes that were asked for."""

    @property
    def count(self) -> int | None:
        """Number of pictures behind the statistics; None where the file does not say it."""
        if 'features' in self.moments:
            return self.moments['features'].pictures
        return len(self.rows['features'])

    def moments_of(self, part: str) -> Moments | None:
        """Statistics of a part, None where there are none.

        Args:
            part: 'features' or 'spatial'.

        Returns:
            The statistics.
        """
        if part not in self.moments and part in self.rows:
            self.moments[part] = moments(self.rows[part])
        return self.moments.get(part)


def compare(
        drawn: PictureSet,
        real: PictureSet,
        extractor: Extractor,
        k: int = 3,
        splits: int = 10,
) -> dict[str, float]:
    """Compare two sets.

    Args:
        drawn: The drawn pictures.
        real: The real ones.
        extractor: What looked at both.
        k: Neighbour of precision and recall.
        splits: Parts of the inception score.

    Returns:
        `FID` and, where rows and statistics allow, `sFID`, `IS`, `IS_std`, `precision`, `recall` and `recognised`, the
        share of drawn pictures in per cent in which the classifier sees the class that was asked for; each with the
        name of the extractor behind it unless that is Inception.
    """
    found: dict[str, float] = {}
    for name, part in (('FID', 'features'), ('sFID', 'spatial')):
        pair = drawn.moments_of(part), real.moments_of(part)
        if pair[0] is not None and pair[1] is not None:
            found[name] = frechet_distance(*pair)
    if drawn.rows:
        found['IS'], found['IS_std'] = inception_score(drawn.rows['logits'], splits)
    if drawn.rows and real.rows:
        device = extractor.device
        found['precision'], found['recall'] = precision_recall(
            real.rows['features'].to(device), drawn.rows['features'].to(device), k)
    if drawn.rows and drawn.labels is not None and extractor.num_classes is not None:
        if int(drawn.labels.max()) < extractor.num_classes:
            hits = drawn.rows['logits'].argmax(1) == drawn.labels
            found['recognised'] = 100 * float(hits.double().mean())
        else:
            logger.warning('%s tells %d classes apart and class %d was drawn, so how many pictures it recognises is '
                           'not said', extractor.name, extractor.num_classes, int(drawn.labels.max()))
    return {f'{name}{extractor.suffix}': value for name, value in found.items()}


def to_image(picture: torch.Tensor) -> Image.Image:
    """Turn a sample of a data set into a picture.

    Args:
        picture: (C, H, W) with one or three channels, uint8, or float from 0 to 1.

    Returns:
        The picture.
    """
    if picture.ndim != 3 or picture.shape[0] not in (1, 3) or (
            picture.is_floating_point() and not 0 <= float(picture.min()) <= float(picture.max()) <= 1):
        raise ValueError(f'the data hold {picture.dtype} of shape {tuple(picture.shape)}, which is no picture; for a '
                         'model of latents name the real pictures, or their statistics, by reference=FOLDER_OR_NPZ')
    return Image.fromarray(to_picture(picture))


def measure(
        pictures: Iterable[Image.Image],
        total: int,
        extractor: Extractor,
        batch_size: int = 64,
        title: str = '',
) -> PictureSet:
    """Look at pictures, with a bar that shows the time left.

    Args:
        pictures: The pictures.
        total: How many.
        extractor: What looks at them.
        batch_size: Pictures at a time.
        title: Heads the bar.

    Returns:
        What it saw.
    """
    found: dict[str, list[torch.Tensor]] = {}
    with tqdm(total=total, desc=title, unit='picture', disable=not sys.stderr.isatty()) as bar:
        for batch in batches(pictures, batch_size):
            for key, rows in extractor(batch).items():
                found.setdefault(key, []).append(rows)
            bar.update(len(batch))
    if not found:
        raise ValueError('there are no pictures to look at')
    return PictureSet({key: torch.cat(rows) for key, rows in found.items()})


def _open_all(paths: Sequence[Path]) -> Iterator[Image.Image]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # a few hundred pictures ahead, not all of them
        for start in range(0, len(paths), 256):
            yield from pool.map(lambda path: open_image(str(path)), paths[start:start + 256])


def measure_files(source: str | Path, extractor: Extractor, batch_size: int = 64, title: str = '') -> PictureSet:
    """Look at the pictures of a folder, or read what an `.npz` says about some.

    Args:
        source: A folder, with its sub-folders, or a file as `read_statistics` takes it.
        extractor: What looks at the pictures.
        batch_size: Pictures at a time.
        title: Heads the bar.

    Returns:
        What is known; for a folder of `tools/sample.py` also the classes that were asked for.
    """
    source = Path(source)
    if source.suffix == '.npz':
        return read_statistics(source, extractor, batch_size, title)
    if not source.is_dir():
        raise FileNotFoundError(f'{source} is neither a folder of pictures nor an .npz file of statistics')
    paths = find_images([source])
    found = measure(_open_all(paths), len(paths), extractor, batch_size, title)
    names = [DRAWN_NAME.fullmatch(path.stem) for path in paths]
    if (source / 'settings.json').is_file() and all(names):
        found.labels = torch.tensor([int(name[1]) for name in names if name])
    return found


def read_statistics(path: str | Path, extractor: Extractor, batch_size: int = 64, title: str = '') -> PictureSet:
    """Read statistics of pictures, or the pictures themselves, as ADM, TTUR and `save_statistics` write them.

    Args:
        path: An `.npz` with `mu` and `sigma`, for sFID also `mu_s` and `sigma_s`; and pictures (N, H, W, 3) in uint8
            in `arr_0`, from which come the numbers that statistics do not give. Statistics that do not name their
            extractor are Inception's.
        extractor: What looks at the pictures, and must have looked at those of the statistics.
        batch_size: Pictures at a time.
        title: Heads the bar.

    Returns:
        What is known.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {key: file[key] for key in ('mu', 'sigma', 'mu_s', 'sigma_s', 'extractor', 'weights', 'count',
                                                  'arr_0') if key in file}
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no file {path}') from None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} cannot be read as an .npz of plain arrays: {error}') from error
    found = PictureSet()
    if 'arr_0' in content:
        array = content['arr_0']
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ValueError(f'{path}: arr_0 is {array.dtype} of shape {array.shape}; pictures are uint8 of shape '
                             '(N, H, W, 3)')
        found = measure(map(Image.fromarray, array), len(array), extractor, batch_size, title)
    elif not {'mu', 'sigma'} <= content.keys():
        raise ValueError(f"{path} has neither 'mu' and 'sigma' nor pictures in 'arr_0'")
    count = int(content['count']) if 'count' in content else None
    for part, tail in (('features', ''), ('spatial', '_s')):
        if {f'mu{tail}', f'sigma{tail}'} <= content.keys():
            _check_origin(content, extractor, path)
            found.moments[part] = _moments(content[f'mu{tail}'], content[f'sigma{tail}'], count, path)
    return found


def _moments(mean: np.ndarray, covariance: np.ndarray, count: int | None, path: str | Path) -> Moments:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or mean.dtype.kind != 'f':
        raise ValueError(f'{path}: mean of shape {mean.shape} ({mean.dtype}) and covariance of shape '
                         f'{covariance.shape}; give (D,) and (D, D) in floating point')
    return Moments(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), count)


def _check_origin(content: dict[str, np.ndarray], extractor: Extractor, path: str | Path) -> None:
    """Refuse statistics of another network."""
    name = str(content['extractor']) if 'extractor' in content else INCEPTION
    if name != extractor.name:
        raise ValueError(f'{path} holds statistics of the features of {name!r}, and the extractor is '
                         f'{extractor.name!r}; make them anew from the pictures')
    if 'weights' in content and str(content['weights']) != extractor.fingerprint:
        raise ValueError(f'{path} holds statistics of other weights of {name!r}; make them anew from the pictures')


def save_statistics(found: PictureSet, extractor: Extractor, path: str | Path) -> None:
    """Write statistics that `read_statistics`, and other programs, read.

    Args:
        found: What is known about the pictures.
        extractor: What looked at them.
        path: The `.npz` file.
    """
    content: dict[str, Any] = {'extractor': extractor.name, 'weights': extractor.fingerprint}
    if found.count is not None:
        content['count'] = found.count
    for part, tail in (('features', ''), ('spatial', '_s')):
        item = found.moments_of(part)
        if item is not None:
            content |= {f'mu{tail}': item.mean.numpy(), f'sigma{tail}': item.covariance.numpy()}
    with io.BytesIO() as buffer:
        np.savez(buffer, **content)
        atomic_write(buffer.getvalue(), path)


def measure_dataset(config: str, options: dict[str, Any], extractor: Extractor, batch_size: int = 64) -> PictureSet:
    """Look at the pictures of a config's test data set; one that cannot be read is an error.

    Args:
        config: The config.
        options: Keys of it to override.
        extractor: What looks at the pictures.
        batch_size: Pictures at a time.

    Returns:
        What it saw.
    """
    cfg = load_config(argparse.Namespace(config=config, cfg_options=options, launcher='none', local_rank=0,
                                         work_dir=None))
    if not (cfg.get('test_dataloader') or {}).get('dataset'):
        raise ConfigError(f'{config} lacks test_dataloader.dataset, from which --real-config takes the real pictures')
    with DefaultScope.overwrite_default_scope('visionssm'):
        dataset = DATASETS.build(cfg.test_dataloader.dataset)

    def pictures() -> Iterator[Image.Image]:
        for index in range(len(dataset)):
            sample = dataset[index]
            # the data set puts the next picture in the place of one that cannot be read
            if sample['index'] != index:
                raise ValueError(f'{dataset.path(index)} cannot be decoded as an image; repair the file, or take it '
                                 'out of the data set')
            yield to_image(sample['inputs'])

    return measure(pictures(), len(dataset), extractor, batch_size, 'real')


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('drawn', help='folder of the drawn pictures, as tools/sample.py writes it, or an .npz with '
                                      'their statistics (mu, sigma) or pictures (arr_0)')
    parser.add_argument('real', nargs='?', help='the same of the real pictures')
    parser.add_argument('--real-config', metavar='CONFIG', help='take the real pictures of the test data of a config')
    parser.add_argument('--cfg-options', nargs='+', action=_OptionsAction, default={}, metavar='KEY=VALUE')
    parser.add_argument('--extractor', default=INCEPTION, help="what looks at the pictures: 'inception' (default), or "
                                                               'the name of a classifier')
    parser.add_argument('--checkpoint', help='weights of the classifier (default: its published ones)')
    parser.add_argument('--weights', help="file of Inception's weights (default: the one torch-fidelity downloads)")
    parser.add_argument('--k', type=int, default=3, help='neighbour of precision and recall')
    parser.add_argument('--splits', type=int, default=10, help='parts of the inception score')
    parser.add_argument('--save-stats', metavar='FILE.npz', help='write the statistics of the real pictures; of the '
                                                                 'only ones, where nothing is to be compared')
    parser.add_argument('--out', default='fidelity.json', help='JSON file for the results')
    parser.add_argument('--batch-size', type=int, default=64, help='pictures at a time; changes no number')
    parser.add_argument('--json', action='store_true', help='write the results as JSON, and nothing else, to the '
                                                            'standard output')
    parser.add_argument('--device', help='where to compute (default: an accelerator where there is one)')


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.real and args.real_config:
        parser.error(f'both {args.real} and --real-config {args.real_config} say where the real pictures are; give one')
    if not (args.real or args.real_config or args.save_stats):
        parser.error('give the real pictures: a folder, an .npz, or --real-config CONFIG')
    if args.save_stats and not args.save_stats.endswith('.npz'):
        parser.error(f'--save-stats {args.save_stats} must end in .npz')
    for name in ('k', 'splits', 'batch_size'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} is {getattr(args, name)}; it must be at least 1')


def _compare_files(args: argparse.Namespace, report: Report) -> int:
    logging.basicConfig(level=logging.INFO, format='%(levelname)s: %(message)s')
    for source in (args.drawn, args.real):
        if source is not None and not Path(source).exists():
            raise FileNotFoundError(f'{source} does not exist: give a folder of pictures or an .npz of statistics')
    extractor = build_extractor(args.extractor, args.checkpoint, args.weights, args.device)
    drawn = measure_files(args.drawn, extractor, args.batch_size, 'drawn')
    real = None
    if args.real_config:
        real = measure_dataset(args.real_config, args.cfg_options, extractor, args.batch_size)
    elif args.real:
        real = measure_files(args.real, extractor, args.batch_size, 'real')
    if args.save_stats:
        save_statistics(real or drawn, extractor, args.save_stats)
        report.say({'statistics': args.save_stats}, f'statistics: {args.save_stats}')
    if real is None:
        return 0
    values = compare(drawn, real, extractor, args.k, args.splits)
    settings = Path(args.drawn, 'settings.json')
    results = {
        'drawn': args.drawn, 'real': args.real or args.real_config, 'extractor': extractor.name,
        'weights_sha256': extractor.fingerprint, 'k': args.k, 'splits': args.splits,
        'pictures': {'drawn': drawn.count, 'real': real.count},
        'sampling': json.loads(settings.read_text(encoding='utf-8')) if settings.is_file() else None, 'metrics': values}
    write_json(results, args.out)
    lines = [f'results: {args.out}', *(f'{name}: {value:.4f}' for name, value in values.items())]
    report.say(results, '\n'.join(lines))
    return 0


def _fid(args: argparse.Namespace) -> int:
    with Report(args.json) as report:
        return _compare_files(args, report)


run_fid = Command('Compare drawn pictures with real ones: FID, sFID, IS, precision, recall.', _add_options,
                  _fid, _check_options, (*USER_ERRORS, ImportError))
