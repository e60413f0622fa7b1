"""`visionssm push` and `visionssm pull`: models in the layout of the hub, in a folder or on the hub itself."""

import argparse
import re
import sys
from pathlib import Path

from ..checkpoints import save_safetensors
from ..conversion import read_source
from ..hub import HUB, pack
from ..hub import pull as read_shared
from ..hub import push as upload
from ..utils.command import Command, check_folder

__all__ = ['pull', 'push']

_PLACE = f'a folder, or {HUB}OWNER/NAME'


def _add_push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='weights in our layout: best/model.safetensors of a '
                                                                 'training, or a file of visionssm convert')
    parser.add_argument('place', metavar='PLACE', help=f'{_PLACE} on the hub, with the login of `hf auth login`')
    parser.add_argument('--name', metavar='NAME', help='registered name of the model (default: what the file says)')
    parser.add_argument('--licence', '--license', dest='licence', metavar='ID', help='of the weights, as in apache-2.0 '
                                                                                     '(default: what the file says)')
    parser.add_argument('--private', action='store_true', help='make the repository private, if it is made')
    parser.add_argument('--force', action='store_true', help='replace a model that is in the folder already')


def _check_push(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.private and not args.place.startswith(HUB):
        parser.error(f'--private is for the hub: {HUB}OWNER/NAME')
    if args.place.startswith(HUB) and not re.fullmatch(r'[\w.-]+/[\w.-]+', args.place.removeprefix(HUB)):
        parser.error(f'{args.place}: give the repository as {HUB}OWNER/NAME')


def _push(args: argparse.Namespace) -> int:
    folder = None if args.place.startswith(HUB) else Path(args.place)
    if folder is not None:
        check_folder(folder, 'PLACE')
        there = [name for name in ('config.json', 'model.safetensors') if (folder / name).exists()]
        if there and not args.force:
            raise FileExistsError(f'{folder} has {" and ".join(there)} already; --force replaces the model')
    package = pack(read_source(args.checkpoint), args.name)
    if not (args.licence or package.licence()):
        sys.stderr.write('warning: the file states no licence, and the card says so: --licence ID names one\n')
    if folder is None:
        place = upload(package, args.place.removeprefix(HUB), args.licence, args.private)
    else:
        package.write(folder, folder.resolve().name, args.licence)
        place = str(folder)
    sys.stdout.write(f"{package.config['architecture']}  {place}\n")
    return 0


def _add_pull_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('place', metavar='PLACE', help=f'{_PLACE}[@REVISION]')
    parser.add_argument('-o', '--out', metavar='FILE', help='the file (default: MODEL.safetensors)')
    parser.add_argument('--force', action='store_true', help='replace FILE if it is there')


def _check_pull(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.out is not None and Path(args.out).suffix != '.safetensors':
        parser.error(f'--out {args.out}: the name must end in .safetensors')


def _pull(args: argparse.Namespace) -> int:
    package = read_shared(args.place)
    out = Path(args.out or f"{package.config['architecture']}.safetensors")
    if out.exists() and not args.force:
        raise FileExistsError(f'{out} is there already; --force replaces it, --out names another file')
    check_folder(out.parent, f'--out {out}')
    save_safetensors(package.state_dict, out, package.metadata)
    sys.stdout.write(f"{package.config['architecture']}  {out}\n")
    return 0


push = Command('Share a model: write config.json, model.safetensors and a card, README.md, as timm reads them, into a '
               'folder or to the hub of Hugging Face.', _add_push_options, _push, _check_push)
pull = Command('Bring a shared model into one file that says what it holds.', _add_pull_options, _pull, _check_pull)
