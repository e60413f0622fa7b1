"""`visionssm convert`: weight files from the layout of the models' authors to ours, and back."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..conversion import Conversion, Source, convert_back, read_source
from ..conversion import convert as convert_weights
from ..utils.command import Command, check_folder

__all__ = ['convert']

_SHOWN = 10


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', metavar='FILE', help='weights of the authors, a checkpoint of a training, or a name of '
                                                     'the catalogue, as in vmamba_tiny, which is fetched')
    parser.add_argument('-o', '--out', required=True, metavar='OUT', help='the new file: .safetensors, with '
                                                                          '--to-official also .pth')
    parser.add_argument('--family', metavar='F', help='family of the model (default: what the keys tell)')
    parser.add_argument('--config', metavar='JSON', help='arguments of the official constructor, a file or the text '
                                                         'itself (default: what keys and shapes tell)')
    parser.add_argument('--name', metavar='NAME', help='registered name of the model (default: that of these '
                                                       'shapes)')
    parser.add_argument('--backbone', action='store_true', help='take the backbone of a detector or segmenter')
    parser.add_argument('--to-official', action='store_true', help="from our layout back to the authors'")
    parser.add_argument('--ema', action=argparse.BooleanOptionalAction, help='of a file with two sets of weights take '
                                                                             'the averaged ones (default: as its name '
                                                                             'says)')
    parser.add_argument('--force', action='store_true', help='replace OUT if it is there')
    parser.add_argument('--verbose', action='store_true', help='list all keys that are left out or do not fit')
    parser.add_argument('--json', action='store_true', help='write the report as JSON')


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    allowed = ('.safetensors', '.pth', '.pt') if args.to_official else ('.safetensors',)
    if Path(args.out).suffix not in allowed:
        parser.error(f'--out {args.out}: the name must end in {" or ".join(allowed)}')
    given = [option for option in ('family', 'config', 'backbone') if getattr(args, option)]
    if args.to_official and given:
        parser.error(f'--{given[0]} is for the way from the official layout; --to-official takes --name')


def _convert(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.is_dir():
        raise IsADirectoryError(f'--out {out} is a folder; give a file')
    if out.exists() and not args.force:
        raise FileExistsError(f'--out {out} is there already; --force replaces it')
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f'--out {out}: there is no folder {out.parent}; make it first')
    check_folder(out.parent, f'--out {out}')
    config = None if args.config is None else _read_config(args.config)
    source = read_source(args.file, args.ema)
    if args.to_official:
        result = convert_back(source, args.name)
    else:
        result = convert_weights(source, args.family, config, args.name, args.backbone)
    if not result.gaps:
        result.save(out)
    if args.json:
        sys.stdout.write(json.dumps(_facts(source, result, out), indent=1) + '\n')
    else:
        sys.stdout.write('\n'.join(_lines(source, result, out, args.verbose)) + '\n')
    if result.gaps:
        sys.stderr.write(f'error: {source.path} does not fit, so nothing was written\n')
    return 1 if result.gaps else 0


def _read_config(text: str) -> Mapping[str, Any]:
    """Read --config: JSON, or a file of it."""
    literal = text.lstrip().startswith('{')
    try:
        content = json.loads(text if literal else Path(text).read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'--config {text}: this is no JSON ({error})') from error
    if not isinstance(content, dict):
        raise ValueError(f'--config {text}: this is a {type(content).__name__}; give the keyword arguments of the '
                         'official constructor as an object')
    return content


def _facts(source: Source, result: Conversion, out: Path) -> dict[str, Any]:
    return {'file': str(source.path), 'sha256': source.sha256, 'family': result.family,
            'official_class': result.official_class, 'model': result.name or None,
            'arguments': dict(result.arguments), 'alike': list(result.alike), 'backbone': result.dense,
            'fitting': result.fitting, 'converted': len(result.state_dict), 'dropped': dict(result.dropped),
            'missing': result.gaps.get('missing', []), 'unexpected': result.gaps.get('unexpected', []),
            'mis-shaped': result.gaps.get('mis-shaped', []), 'out': None if result.gaps else str(out)}


def _lines(source: Source, result: Conversion, out: Path, verbose: bool) -> list[str]:
    rows = [('file', f'{source.path}  sha256 {source.sha256}'),
            ('family', f'{result.family} ({result.official_class}), {result.fitting} keys fit')]
    if result.name:
        arguments = ', '.join(f'{key}={value!r}' for key, value in result.arguments.items())
        rows.append(('model', f'{result.name}({arguments})' if arguments else result.name))
    if result.alike:
        rows.append(('', f'the same network as {", ".join(result.alike)}: --name chooses'))
    if result.dense:
        rows.append(('', "a backbone without classifier: init_cfg=dict(type='Pretrained', checkpoint=...) of a config "
                         'takes it'))
    reasons: dict[str, list[str]] = {}
    for key, reason in result.dropped.items():
        reasons.setdefault(reason, []).append(key)
    rows += [('left out', f'{len(keys)} ({reason}): {_some(keys, verbose)}') for reason, keys in reasons.items()]
    rows += [(label, f'{len(keys)}: {_some(keys, verbose)}') for label, keys in result.gaps.items()]
    if not result.gaps:
        rows.append(('written', f'{out}, {len(result.state_dict)} keys'))
    return [f'{label:<10}  {text}'.rstrip() for label, text in rows]


def _some(keys: list[str], verbose: bool) -> str:
    if verbose or len(keys) <= _SHOWN:
        return ', '.join(keys)
    return f'{", ".join(keys[:_SHOWN])} and {len(keys) - _SHOWN} more (--verbose lists them)'


convert = Command('Bring weights from the layout of their authors into ours, or back; what does not fit is listed, and '
                  'then nothing is written.', _add_options, _convert, _check_options)
