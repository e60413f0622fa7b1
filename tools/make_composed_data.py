"""Makes small data sets in the layouts of COCO and ADE20K: garments of Fashion-MNIST on photographs.

    python tools/make_composed_data.py                          # data/composed-coco and data/composed-ade
    python tools/make_composed_data.py --backgrounds PHOTOS     # with your own photographs

Without --backgrounds the photographs are those inside scikit-image, which the extra [det] brings.
"""
import argparse
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

try:
    from visionssm_launcher import importing

    with importing():
        from visionssm.data.composed import FORMATS, ComposeOptions, Photographs, draw_sheet, make_composed_data
        from visionssm.data.photos import SKIMAGE
except ImportError as error:
    sys.exit(f'{error}\nInstall the checkout first: pip install -e .[det,seg]')


def skimage_photographs() -> dict[str, Photographs]:
    """Returns the photographs inside scikit-image, without importing it."""
    spec = importlib.util.find_spec('skimage')
    way_out = 'give --backgrounds FOLDER with your own photographs, or install the extra: pip install "visionssm[det]"'
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f'scikit-image, whose photographs are the backgrounds, is not installed: {way_out}')
    folder = Path(spec.submodule_search_locations[0]) / 'data'
    missing = [name for names in SKIMAGE.values() for name in names if not (folder / name).is_file()]
    if missing:
        sys.exit(f'{folder} lacks {", ".join(missing)}: {way_out}')
    return {split: Photographs([folder / name for name in names],
                               [f'scikit-image, {name}: {credit}' for name, credit in names.items()])
            for split, names in SKIMAGE.items()}


def bar(numbers: Iterable[int]) -> Iterable[int]:
    """Wraps a loop in a progress bar, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return numbers
    return tqdm(numbers, unit='image', dynamic_ncols=True)


def main(arguments: list[str] | None = None) -> int:
    """Makes the data sets and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', default='data', help='folder to write composed-coco and composed-ade into')
    parser.add_argument('--formats', nargs='+', choices=FORMATS, default=FORMATS, help='layouts to write')
    parser.add_argument('--train', type=int, default=1200, help='images for training (default: 1200)')
    parser.add_argument('--val', type=int, default=200, help='images for validation (default: 200)')
    parser.add_argument('--size', type=int, default=160, help='side of the images (default: 160)')
    parser.add_argument('--garments', type=int, default=6, help='most garments in an image (default: 6)')
    parser.add_argument('--scale', nargs=2, type=float, default=(0.9, 2.8), metavar=('MIN', 'MAX'),
                        help='range of factors that garments of 28 x 28 pixels are enlarged by (default: 0.9 2.8)')
    parser.add_argument('--seed', type=int, default=0, help='same seed, same files (default: 0)')
    parser.add_argument('--backgrounds', help='folder of photographs; every fifth serves validation')
    parser.add_argument('--sheet', help='PNG to draw the first images of the COCO layout into, with their annotations')
    parser.add_argument('--force', action='store_true', help='replace data sets that this tool made before')
    args = parser.parse_args(arguments)
    if args.sheet and 'coco' not in args.formats:
        parser.error('--sheet draws the COCO layout: add coco to --formats')
    try:
        photographs = Photographs.split_folder(args.backgrounds) if args.backgrounds else skimage_photographs()
        options = ComposeOptions(size=args.size, max_garments=args.garments, min_scale=args.scale[0],
                                 max_scale=args.scale[1], seed=args.seed)
        folders = make_composed_data(args.output, photographs, {'train': args.train, 'val': args.val}, options,
                                     args.formats, args.force, bar)
        if args.sheet:
            draw_sheet(folders['coco']).save(args.sheet)
    except (OSError, ValueError) as error:
        sys.exit(f'{error}')
    for folder in folders.values():
        print(f'wrote {folder}: {args.train} images for training, {args.val} for validation')
    return 0


if __name__ == '__main__':
    sys.exit(main())
