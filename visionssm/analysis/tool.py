"""The command line of the pictures for understanding."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

from .._factory import create_model
from ..checkpoints import CheckpointError
from ..checkpoints.load import read_metadata
from ..data.photos import read_photograph
from ..export.inputs import example_inputs
from ..utils.command import Command, check_folder
from .attention import scan_attention
from .pictures import draw_attention, draw_receptive_field, draw_routes, save_picture
from .receptive_field import effective_receptive_field
from .routes import BlockRoutes, scan_routes
from .scans import record_scans

__all__ = ['Subject', 'legible_size', 'visualize']

KINDS = ('erf', 'routes', 'attention')
LEGIBLE = 8


class Subject(NamedTuple):
    """A model, and how it takes pictures."""
    model: nn.Module
    name: str
    weights: str
    mean: Sequence[float]
    std: Sequence[float]

    def size(self) -> tuple[int, int]:
        """Height and width that the model is made for."""
        shape = example_inputs(self.model).tensors[0].shape
        return int(shape[2]), int(shape[3])

    def load(self, path: str, size: tuple[int, int]) -> tuple[Image.Image, torch.Tensor]:
        """Read a picture, fit it to a size, and return it with the normalised image, (1, C, H, W)."""
        return self.fit(read_photograph(path), size)

    def fit(self, picture: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, torch.Tensor]:
        """Resize an RGB picture and cut its middle out, and return it with the normalised image, (1, C, H, W)."""
        channels = example_inputs(self.model).tensors[0].shape[1]
        if channels not in (1, 3):
            raise ValueError(f'{self.name} takes {channels} channels: latents, and no pictures')
        picture = ImageOps.fit(picture, size[::-1], Image.Resampling.BICUBIC)
        if channels == 1:
            picture = picture.convert('L')
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*size, channels)
        mean, std = (torch.tensor(values)[:channels, None, None] for values in (self.mean, self.std))
        return picture, ((pixels.permute(2, 0, 1) / 255 - mean) / std)[None]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('name', help='name of the model, as in vmamba_tiny; for erf any model of timm too')
    parser.add_argument('kind', choices=KINDS, help='erf: effective receptive field; routes: scan routes; attention: '
                                                    'what a pixel reads of all others in a scan')
    parser.add_argument('images', nargs='*', metavar='IMAGE', help='picture files, resized and cropped to the size')
    parser.add_argument('-o', '--out', metavar='FILE.png', help='the picture (default: NAME_KIND.png)')
    parser.add_argument('--checkpoint', metavar='FILE', help='weights in a file of any kind that the package reads')
    parser.add_argument('--pretrained', action='store_true', help='the published weights of the name')
    parser.add_argument('--size', type=int, nargs='+', metavar='PIXELS',
                        help="height and width of the image, or one number for both (default: the model's; for routes "
                             f'what makes a map of about {LEGIBLE} x {LEGIBLE})')
    parser.add_argument('--block', metavar='B', help='routes, attention: number of a block among those that scan, or '
                                                     'its path (default: all different ones; the first one)')
    parser.add_argument('--query', type=int, nargs=2, metavar=('Y', 'X'), help='attention: pixel of the image at '
                                                                               '--size (default: its middle)')
    parser.add_argument('--stage', type=int, default=-1, metavar='I', help='erf: number of the feature map (default: '
                                                                           'the last one)')
    parser.add_argument('--noise', type=int, default=8, metavar='N', help='erf without IMAGE: images of noise '
                                                                          '(default: 8)')
    parser.add_argument('--side', type=int, metavar='PIXELS', help='longer side of a panel of the picture, about')
    parser.add_argument('--seed', type=int, default=0, help='of random weights (default: 0)')
    parser.add_argument('--device', default='cpu', help='where to compute (default: cpu)')
    parser.add_argument('--json', action='store_true', help='print the result as JSON')


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.pretrained and args.checkpoint:
        parser.error('--pretrained and --checkpoint exclude each other')
    if args.size is not None:
        if len(args.size) > 2 or min(args.size) < 1:
            parser.error(f'--size {" ".join(map(str, args.size))}: give one or two numbers above 0')
        args.size = (args.size[0], args.size[-1])
    if args.kind == 'attention' and len(args.images) != 1:
        parser.error(f'attention needs exactly one IMAGE, got {len(args.images)}')
    if args.kind == 'routes' and len(args.images) > 1:
        parser.error(f'routes take at most one IMAGE, got {len(args.images)}')
    for option, kinds in (('query', ('attention',)), ('block', ('routes', 'attention'))):
        if getattr(args, option) is not None and args.kind not in kinds:
            parser.error(f'--{option} goes with {" and ".join(kinds)}, not with {args.kind}')
    if args.noise < 1:
        parser.error(f'--noise is {args.noise}; at least 1 is needed')
    if args.side is not None and args.side < 64:
        parser.error(f'--side is {args.side}; at least 64 is needed')
    args.drawing = {} if args.side is None else {'side': args.side}
    args.out = Path(args.out or f'{args.name}_{args.kind}.png')
    if args.out.suffix.lower() != '.png':
        parser.error(f'--out {args.out}: the file must end in .png')
    if args.block is not None and args.block.removeprefix('-').isdigit():
        args.block = int(args.block)


def _config(path: str) -> Mapping[str, Any]:
    """Return what an export of ours says about its model; nothing for other files."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'the checkpoint {path} does not exist')
    try:
        return json.loads(read_metadata(path).get('config', '{}'))
    except json.JSONDecodeError as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from error


def _build(args: argparse.Namespace) -> Subject:
    config = _config(args.checkpoint) if args.checkpoint else {}
    made_for = config.get('architecture')
    if made_for and made_for.partition('.')[0] != args.name.partition('.')[0]:
        raise ValueError(f'{args.checkpoint} holds weights of {made_for}, not of {args.name}')
    options = dict(config.get('model_args') or {})
    if config.get('num_classes') is not None:
        options['num_classes'] = config['num_classes']
    torch.manual_seed(args.seed)
    model = create_model(args.name, pretrained=args.pretrained, checkpoint_path=args.checkpoint, **options)
    cfg = {**(getattr(model, 'pretrained_cfg', None) or {}), **(config.get('pretrained_cfg') or {})}
    weights = 'published weights' if args.pretrained else (
        f'weights {Path(args.checkpoint).name}' if args.checkpoint else 'random weights')
    return Subject(model.to(args.device), args.name, weights, cfg.get('mean', (0.5,) * 3), cfg.get('std', (0.5,) * 3))


def _receptive_field(args: argparse.Namespace, subject: Subject) -> tuple[Image.Image, dict[str, Any]]:
    size = args.size or subject.size()
    loaded = [subject.load(path, size) for path in args.images]
    images = torch.cat([image for _, image in loaded]) if loaded else example_inputs(
        subject.model, size, args.noise).tensors[0]
    field = effective_receptive_field(
        subject.model, images, args.stage,
        progress=lambda steps: tqdm(steps, 'images', disable=None if len(images) > 1 else True))
    kind = '' if loaded else ', noise'
    picture = draw_receptive_field(field, f'Effective receptive field of {subject.name}, {subject.weights}{kind}',
                                   loaded[0][0] if len(loaded) == 1 else None, **args.drawing)
    return picture, {'size': list(size), 'feature_size': list(field.feature_size), 'images': field.images,
                     'centre': list(field.centre),
                     'sides': {f'{share:g}': side for share, side in field.sides().items()}}


def _routes(args: argparse.Namespace, subject: Subject) -> tuple[Image.Image, dict[str, Any]]:
    size = args.size or legible_size(subject)
    picture, image = None, None
    if args.images:
        photograph = read_photograph(args.images[0])
        image = subject.fit(photograph, size)[1]
        # a map of few pixels is drawn large
        picture = ImageOps.fit(photograph, (8 * size[1], 8 * size[0]), Image.Resampling.BICUBIC)
    found = scan_routes(subject.model, size, image)
    if args.block is None:
        different: dict[Any, BlockRoutes] = {}
        for routes in found:
            different.setdefault((routes.op, tuple(route.label for route in routes.routes)), routes)
        shown = list(different.values())
    else:
        shown = [_choose(found, args.block)]
    blocks = [{'block': routes.block, 'op': routes.op, 'map': list(routes.size), 'note': routes.note,
               'routes': [{'label': route.label, 'kind': route.kind} for route in routes.routes]} for routes in found]
    drawn = draw_routes(shown, f'Scan routes of {subject.name}', picture, **args.drawing)
    return drawn, {'size': list(size), 'blocks': blocks}


def legible_size(subject: Subject) -> tuple[int, int]:
    """Return the size of an image whose first map has about 8 x 8 pixels, or the model's own if it takes no other."""
    size = subject.size()
    model = subject.model

    def first_map(size: tuple[int, int]) -> int:
        return max((max(block.size) for block in record_scans(model, size=size)[:1]), default=LEGIBLE)

    side = first_map(size)
    if side <= LEGIBLE * 3 // 2:
        return size
    smaller = max(1, round(size[0] / side)) * LEGIBLE
    try:
        first_map((smaller, smaller))
    except ValueError:
        return size
    return smaller, smaller


def _choose(found: Sequence[BlockRoutes], block: int | str) -> BlockRoutes:
    names = [routes.block for routes in found]
    index = names.index(block) if block in names else block
    if not isinstance(index, int) or not -len(found) <= index < len(found):
        raise ValueError(f'There is no block {block} that scans. There are {len(found)}: '
                         + ', '.join(f'{i} {name}' for i, name in enumerate(names)))
    return found[index]


def _attention(args: argparse.Namespace, subject: Subject) -> tuple[Image.Image, dict[str, Any]]:
    size = args.size or subject.size()
    picture, image = subject.load(args.images[0], size)
    block = 0 if args.block is None else args.block
    attention = scan_attention(subject.model, image, block, None if args.query is None else tuple(args.query))
    drawn = draw_attention(attention, picture, f'Implicit attention of {subject.name}, {subject.weights}',
                           **args.drawing)
    total = attention.routes.flatten(1).sum(1)
    shares = (total / total.sum().clamp(min=torch.finfo(total.dtype).tiny)).tolist()
    return drawn, {'size': list(size), 'block': attention.block, 'map': list(attention.merged.shape),
                   'query': list(attention.query),
                   'routes': [{'label': label, 'share': round(share, 4)}
                              for label, share in zip(attention.labels, shares)]}


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in result.items():
        if key == 'blocks':
            lines += [f'block {i}: {block["block"]}, {block["op"]}, map of {block["map"][0]} x {block["map"][1]}: '
                      + ('; '.join(route['label'] for route in block['routes']) or block['note'])
                      for i, block in enumerate(value)]
        elif key == 'routes':
            lines += [f'{route["label"]}: {route["share"]:.1%} of the weight' for route in value]
        elif key == 'sides':
            lines += [f'{float(share):.0%} of the gradient: within {side} x {side} pixels'
                      for share, side in value.items()]
        else:
            lines.append(f'{key}: ' + (', '.join(map(str, value)) if isinstance(value, list) else str(value)))
    return lines


def _visualize(args: argparse.Namespace) -> int:
    check_folder(args.out.parent, f'--out {args.out}')
    if args.out.is_dir():
        raise IsADirectoryError(f'--out {args.out} is a folder; give a file')
    subject = _build(args)
    draw = {'erf': _receptive_field, 'routes': _routes, 'attention': _attention}[args.kind]
    picture, facts = draw(args, subject)
    save_picture(picture, args.out)
    result = {'model': args.name, 'kind': args.kind, 'weights': subject.weights, 'file': os.fspath(args.out), **facts}
    if args.json:
        sys.stdout.write(json.dumps(result) + '\n')
    else:
        sys.stdout.write('\n'.join(_lines(result)) + '\n')
    return 0


visualize = Command(
    'Draw which pixels a model sees, in which order it reads them, and what its scans carry from pixel to pixel.',
    _add_options, _visualize, _check_options, (OSError, ValueError, ImportError, RuntimeError), intermixed=True)
