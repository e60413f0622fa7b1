"""Packs folders of pictures into an LMDB of BasicSR's form, whole or cut into pieces.

    python tools/make_lmdb.py data/DIV2K/DIV2K_train_HR data/Flickr2K/Flickr2K_HR data/DF2K/HR.lmdb \\
        --crop 480 --step 240
    python tools/make_lmdb.py data/DIV2K/DIV2K_train_LR_bicubic/X2 data/Flickr2K/Flickr2K_LR_bicubic/X2 \\
        data/DF2K/X2.lmdb --crop 240 --step 120 --strip x2

Small pictures are cut with the sides of the large ones divided by the scale, and --strip takes the scale off their
names, so that pairs are called the same. A config reads both by gt='DF2K/HR.lmdb' and lq='DF2K/X2.lmdb'.
"""
import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

try:
    from visionssm_launcher import importing

    with importing():
        from visionssm.openmmlab.restoration.storage import make_lmdb
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .[restoration]')


def bar(paths: Sequence[Path]) -> Iterable[Path]:
    """Wraps the files in a progress bar."""
    from tqdm import tqdm
    return tqdm(paths, unit='image', dynamic_ncols=True)


def main(arguments: list[str] | None = None) -> int:
    """Writes the LMDB and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', metavar='FOLDER', help='folders of pictures')
    parser.add_argument('output', metavar='OUT.lmdb', help='what to write; must not exist')
    parser.add_argument('--crop', type=int, help='side of the pieces to cut pictures into (default: whole pictures)')
    parser.add_argument('--step', type=int, help='pixels from one piece to the next (default: --crop)')
    parser.add_argument('--multiple', type=int, default=1, metavar='SCALE',
                        help='cut pictures to a multiple of this many pixels first: the scale, for large pictures '
                             'whose sides it does not divide (default: 1)')
    parser.add_argument('--strip', default='', metavar='END', help="what names lose at their end, such as 'x2'")
    parser.add_argument('--workers', type=int, default=min(8, os.cpu_count() or 1),
                        help='threads that read and encode (default: %(default)s)')
    args = parser.parse_args(arguments)
    if args.step is not None and args.crop is None:
        parser.error('--step goes with --crop')
    try:
        count = make_lmdb(args.folders, args.output, args.crop, args.step, args.multiple, args.strip, args.workers, bar)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f'error: {error}')
    sys.stdout.write(f'wrote {args.output}: {count} pictures\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
