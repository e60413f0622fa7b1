"""Latents: the autoencoder that makes them, and ``tools/cache_latents.py``, which encodes a data set once."""
import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.device import get_device
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...checkpoints import save_safetensors
from ...utils.command import Command
from ...utils.files import atomic_write
from ..check import ConfigError
from ..data import READ_ERRORS, UnreadableImagesError
from ..datasets import TimmDataset
from .data import ADMCenterCrop

__all__ = ['cache_latents', 'check_settings', 'encode', 'load_autoencoder', 'weights_digest']

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': torch.float32}
SETTINGS = 'settings.json'
MAX_NAMED = 20


def load_autoencoder(name: str, device: torch.device | str = 'cpu') -> Any:
    """Load an autoencoder of diffusers.

    Args:
        name: Folder of `save_pretrained`, or a name on the Hugging Face hub as 'stabilityai/sd-vae-ft-ema'.
        device: Where it computes.

    Returns:
        An `AutoencoderKL` in float32, for inference.
    """
    from ...diffusion._diffusers import AutoencoderKL
    try:
        vae = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f'the autoencoder {name!r} cannot be loaded: it is no folder with config.json and weights, and '
                      f'the hub does not give it ({reason}); where there is no network, copy the folder here and give '
                      'its path') from error
    if vae.config.get('shift_factor'):
        raise ConfigError(f'the autoencoder {name!r} shifts its latents by {vae.config.shift_factor}, which the '
                          'trainings here do not; take one without shift_factor, such as stabilityai/sd-vae-ft-ema')
    return vae.requires_grad_(False).eval().to(device)


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of all weights and their names."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_settings(folder: Path, settings: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder with other settings than those of the files that are there, else record them.

    Args:
        folder: The folder; what decides about its files is kept in its `settings.json`.
        settings: Plain values that decide what the files are.
        notes: Plain values that are recorded beside them and may differ, such as the path of a file.
    """
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if path.is_file():
        before = json.loads(path.read_text(encoding='utf-8'))
        different = [f'{key} is {_short(settings[key])} and was {_short(before.get(key))}' for key in settings
                     if before.get(key) != settings[key]]
        if different:
            raise ConfigError(f'{folder} holds files of another run: {", ".join(different)}. Give another --out, or '
                              'the same settings to go on')
    atomic_write(json.dumps({**notes, **settings}, indent=2).encode(), path)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


@torch.inference_mode()
def encode(vae: Any, pictures: torch.Tensor, mirror: bool = False) -> torch.Tensor:
    """Encode pictures.

    Args:
        vae: An `AutoencoderKL`.
        pictures: (B, C, H, W) in uint8.
        mirror: Encode also their mirror images, whose latents are not the mirrored latents.

    Returns:
        Means and deviations, not scaled, (B, 2 with mirror images and else 1, 2 C', H', W') in float32.
    """
    pixels = pictures.to(vae.device).float() / 127.5 - 1
    views = [vae.encode(view).latent_dist for view in ([pixels, pixels.flip(-1)] if mirror else [pixels])]
    return torch.stack([torch.cat([view.mean, view.std], dim=1) for view in views], dim=1).float()


class Row(NamedTuple):
    """A picture cut to size, or why there is none."""
    place: int
    label: int
    picture: torch.Tensor | None
    problem: str = ''


class _Pictures(Dataset):
    """Pictures cut as in training on pixels; one that cannot be read says so instead of lending its place."""

    def __init__(self, source: TimmDataset, size: int) -> None:
        self.source, self.crop = source, ADMCenterCrop(size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Row:
        try:
            image, label, _ = self.source.read(index)
        except READ_ERRORS as error:
            return Row(index, -1, None, f'{self.source.path(index)} ({type(error).__name__}: {error})')
        return Row(index, label, self.crop(image))


class Shard(NamedTuple):
    """A part of the data set, which one file holds."""
    path: Path
    indices: range

    def stored(self) -> list[int]:
        """Return the pictures whose latents are there; none for a file that is missing or damaged."""
        try:
            with safe_open(self.path, 'pt') as file:
                return file.get_tensor('indices').tolist()
        except (OSError, SafetensorError):
            return []


def _open_pictures(folder: str, class_map: str | None) -> TimmDataset:
    """List the pictures of class folders; refuse a layout in which labels would not be what the user thinks."""
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f'{folder} is no folder; give one of class folders, {folder}/CLASS/PICTURE.jpg')
    source = TimmDataset(folder, split='', class_map=class_map)
    paths = [Path(path) for path, _ in source.reader.samples]
    odd = [path for path in paths if path.parent.parent != root]
    if odd:
        raise ValueError(f'{odd[0]} does not lie in {folder}/CLASS/, as {len(odd)} of {len(paths)} pictures; give the '
                         'folder of one split, whose sub-folders are the classes (one folder for a model without '
                         'classes)')
    full = {path.parent.name for path in paths}
    empty = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name not in full)
    if empty and class_map is None:
        raise ValueError(f'{len(empty)} class folders of {folder} hold no pictures: {", ".join(empty[:MAX_NAMED])}; '
                         'the labels of the classes behind them would shift. Remove them, or give --class-map')
    return source


def _listing_digest(source: TimmDataset, folder: str) -> str:
    names = '\n'.join(f'{Path(path).relative_to(folder)} {label}' for path, label in source.reader.samples)
    return hashlib.sha256(names.encode()).hexdigest()


def _batches(shards: Sequence[Shard], size: int) -> Iterator[list[int]]:
    """Yield batches that begin anew in every file, so that a resumed run has those of an uninterrupted one."""
    for shard in shards:
        yield from ([*shard.indices[start:start + size]] for start in range(0, len(shard.indices), size))


def _moments(vae: Any, source: TimmDataset, rows: Sequence[Row], args: argparse.Namespace) -> torch.Tensor:
    moments = encode(vae, torch.stack([row.picture for row in rows]), args.mirror).to('cpu', DTYPES[args.dtype])
    finite = torch.isfinite(moments).flatten(1).all(1).tolist()
    if not all(finite):
        raise ValueError(f'the latents of {source.path(rows[finite.index(False)].place)} are not finite in '
                         f'{args.dtype}; try --dtype float32')
    return moments


def _encode_shards(args: argparse.Namespace, source: TimmDataset, vae: Any, shards: Sequence[Shard]) -> list[str]:
    """Write the files that are missing, and return what could not be read."""
    todo = []
    for shard in shards:
        stored = shard.stored()
        if not stored or (len(stored) < len(shard.indices) and not args.skip_bad):
            todo.append(shard)
    waiting = sum(len(shard.indices) for shard in todo)
    loader = iter(DataLoader(
        _Pictures(source, args.size), batch_sampler=list(_batches(todo, args.batch_size)), num_workers=args.workers,
        collate_fn=list))
    problems: list[str] = []
    with tqdm(total=len(source), initial=len(source) - waiting, unit='picture', disable=None,
              dynamic_ncols=True) as bar:
        for shard in todo:
            parts: list[torch.Tensor] = []
            rows: list[Row] = []
            for _ in range(0, len(shard.indices), args.batch_size):
                batch = next(loader)
                good = [row for row in batch if row.picture is not None]
                for row in batch:
                    if row.problem:
                        problems.append(row.problem)
                        tqdm.write(f'cannot read {row.problem}', file=sys.stderr)
                if good:
                    parts.append(_moments(vae, source, good, args))
                    rows += [row._replace(picture=None) for row in good]
                bar.update(len(batch))
            if len(rows) == len(shard.indices) or (rows and args.skip_bad):
                save_safetensors({
                    'moments': torch.cat(parts), 'labels': torch.tensor([row.label for row in rows]),
                    'indices': torch.tensor([row.place for row in rows])}, shard.path)
    return problems


def _finish(args: argparse.Namespace, source: TimmDataset, vae: Any, shards: Sequence[Shard]) -> int:
    """Write the index, which says that all is there."""
    rows, skipped = 0, []
    files: list[dict[str, Any]] = []
    for shard in shards:
        stored = shard.stored()
        skipped += [str(Path(source.path(index)).relative_to(args.images))
                    for index in sorted(set(shard.indices) - set(stored))]
        rows += len(stored)
        if stored:
            files.append({'file': shard.path.name, 'images': len(stored)})
    if not rows:
        raise UnreadableImagesError(f'none of the {len(source)} pictures in {args.images} can be read')
    with safe_open(shards[0].path.with_name(files[0]['file']), 'pt') as file:
        shape = file.get_slice('moments').get_shape()[2:]
    facts = {'shards': files, 'classes': list(source.metainfo['classes']), 'shape': shape, 'vae': args.vae,
             'scaling_factor': vae.config.scaling_factor, 'skipped': skipped}
    atomic_write(json.dumps(facts, indent=1).encode(), Path(args.out, 'latents.json'))
    left_out = f', {len(skipped)} unreadable ones left out' if skipped else ''
    sys.stdout.write(f'latents of {rows} pictures of {len(facts["classes"])} classes{left_out}: {args.out}\n'
                     f'mean and deviation {" x ".join(map(str, shape))}, to be scaled by {vae.config.scaling_factor}\n')
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', help='folder of class folders, as ImageNet has them')
    parser.add_argument('--vae', required=True, help='autoencoder of diffusers: a folder, or a name on the hub as '
                                                     'stabilityai/sd-vae-ft-ema')
    parser.add_argument('--out', required=True, help='folder to write into; the same command goes on after a stop')
    parser.add_argument('--size', type=int, default=256, help='side of the pictures in pixels')
    parser.add_argument('--mirror', action='store_true', help='encode the mirror images too')
    parser.add_argument('--class-map', help='order of the classes: imagenet-1k, or a text file with one class a line '
                                            '(default: sorted names of the folders)')
    parser.add_argument('--shard-size', type=int, default=4096, help='pictures in a file')
    parser.add_argument('--batch-size', type=int, default=32, help='pictures at a time')
    parser.add_argument('--dtype', default='float16', choices=list(DTYPES), help='of the stored numbers; the '
                                                                                 'autoencoder computes in float32')
    parser.add_argument('--skip-bad', action='store_true', help='leave out pictures that cannot be read')
    parser.add_argument('--device', help='where to compute (default: an accelerator where there is one)')
    parser.add_argument('--workers', type=int, default=4, help='processes that read pictures')


def _cache(args: argparse.Namespace) -> int:
    for name, least in (('size', 1), ('shard_size', 1), ('batch_size', 1), ('workers', 0)):
        if getattr(args, name) < least:
            raise ValueError(f'--{name.replace("_", "-")} is {getattr(args, name)}; it must be at least {least}')
    source = _open_pictures(args.images, args.class_map)
    vae = load_autoencoder(args.vae, args.device or get_device())
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if args.size % factor:
        raise ValueError(f'--size {args.size}: the autoencoder {args.vae} divides sides by {factor}; give a multiple')
    source.mode = 'RGB' if vae.config.in_channels == 3 else 'L'
    out = Path(args.out)
    check_settings(out, {
        'size': args.size, 'mirror': args.mirror, 'dtype': args.dtype, 'shard_size': args.shard_size,
        'pictures': len(source), 'names': _listing_digest(source, args.images), 'weights': weights_digest(vae),
    }, {'images': args.images, 'vae': args.vae})
    for path in out.glob('.*.tmp'):
        # what a kill left of an unfinished file
        path.unlink()
    shards = [Shard(out / f'{number:05d}.safetensors', range(start, min(start + args.shard_size, len(source))))
              for number, start in enumerate(range(0, len(source), args.shard_size))]
    problems = _encode_shards(args, source, vae, shards)
    if problems and not args.skip_bad:
        more = f'; and {len(problems) - MAX_NAMED} more' if len(problems) > MAX_NAMED else ''
        raise UnreadableImagesError(
            f'{len(problems)} of {len(source)} pictures cannot be read: {"; ".join(problems[:MAX_NAMED])}{more}. '
            'Repair them in their places and run the same command, or leave them out by --skip-bad; what was encoded '
            'is kept')
    return _finish(args, source, vae, shards)


# a device that cannot be used or runs out of memory raises a RuntimeError
cache_latents = Command('Encode pictures by an autoencoder once, for trainings on latents.', _add_options, _cache,
                        errors=(ImportError, OSError, RuntimeError, ValueError),
                        stopped='stopped; the same command goes on')
