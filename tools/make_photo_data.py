"""Makes a small data set for image restoration of photographs that come with packages: train/*.png and val/*.png.

    python tools/make_photo_data.py                             # data/photos
    python tools/make_photo_data.py data/photos --root UNPACKED # Debian packages unpacked by dpkg -x, without root

It installs nothing and takes what is installed; it names the packages that are missing. The split is fixed and by
photograph: a photograph is in train or in val, wherever the tool runs.
"""
import argparse
import sys
from collections.abc import Iterable

try:
    from visionssm_launcher import importing

    with importing():
        from tqdm import tqdm

        from visionssm.data.photos import MAX_PIXELS, SOURCES, Photograph, find_photographs, make_photo_data
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .[mm]')


def bar(photographs: Iterable[Photograph]) -> Iterable[Photograph]:
    """Wraps a loop in a progress bar."""
    return tqdm(photographs, unit='photograph', dynamic_ncols=True)


def main(arguments: list[str] | None = None) -> int:
    """Makes the data set and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', nargs='?', default='data/photos', help='folder to write (default: data/photos)')
    parser.add_argument('--root', default='/', help="where Debian's packages are unpacked (default: /)")
    parser.add_argument('--max-pixels', type=int, default=MAX_PIXELS,
                        help=f'most pixels of a picture (default: {MAX_PIXELS})')
    parser.add_argument('--force', action='store_true', help='replace a data set that this tool made before')
    args = parser.parse_args(arguments)
    photographs, missing = find_photographs(args.root)
    way_out = ''.join(f'\n    {SOURCES[source][0]}' for source in missing)
    try:
        counts = make_photo_data(args.output, photographs, args.max_pixels, args.force, bar)
    except (OSError, ValueError) as error:
        sys.exit(f'{error}' + (f'. Not installed, or not with all photographs:{way_out}' if missing else ''))
    print(f'wrote {args.output}: {counts["train"]} photographs for training, {counts["val"]} held out')
    if missing:
        print(f'Without the photographs of these, numbers differ from the documented ones:{way_out}', file=sys.stderr)
    return 0


if __name__ == '__main__':
    sys.exit(main())
