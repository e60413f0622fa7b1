"""Photographs that come with packages, as good pictures for restoration: a split by photograph, with their credits.

Photographs are stored as JPEG, with the noise and the sharpening of a camera. Shrinking them at least twice, with
Lanczos' filter, leaves little of that; what is stored without loss (scikit-image's) keeps its size.
"""
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from .folders import make_room, replace_folder

__all__ = ['PHOTOGRAPHS', 'SKIMAGE', 'SOURCES', 'Photograph', 'find_photographs', 'make_photo_data', 'read_photograph']

# what lies inside scikit-image's wheel, is a photograph, and is in the public domain or CC0 by its own documentation
SKIMAGE = {
    'train': {'astronaut.png': 'Eileen Collins, by NASA, public domain',
              'brick.png': 'brick wall, CC0Textures, CC0',
              'camera.png': 'cameraman, by Lav Varshney, CC0',
              'coffee.png': 'coffee cup, by Rachel Michetti, CC0',
              'grass.png': 'grass, by linolafett on DeviantArt, CC0'},
    'val': {'chelsea.png': 'Chelsea the cat, by Stefan van der Walt, CC0',
            'clock_motion.png': 'clock, by Stefan van der Walt, public domain',
            'gravel.png': 'gravel, CC0Textures, CC0',
            'rocket.jpg': 'launch of DSCOVR, by SpaceX, public domain'},
}

# package -> how to install it, and its folder: inside a Python package, or below the root of a Debian system
SOURCES = {
    'scikit-image': ('pip install scikit-image', 'skimage', 'data'),
    'scikit-learn': ('pip install scikit-learn', 'sklearn', 'datasets/images'),
    'lomiri-wallpapers-16.04': ('apt install lomiri-wallpapers-16.04', '', 'usr/share/backgrounds'),
    'mate-backgrounds': ('apt install mate-backgrounds', '', 'usr/share/backgrounds/mate/nature'),
    'plasma-workspace-wallpapers': ('apt install plasma-workspace-wallpapers', '', 'usr/share/wallpapers'),
}
MAX_PIXELS = 2 ** 19
LOSSY = ('.jpg', '.jpeg')


@dataclass(frozen=True)
class Photograph:
    """A photograph inside a package.

    Args:
        split: 'train' or 'val'.
        source: Name of the package, a key of `SOURCES`.
        path: Below the folder of the package.
        credit: Author and licence, as the package states them.
    """

    split: str
    source: str
    path: str
    credit: str

    @property
    def name(self) -> str:
        """Name of the written picture, without suffix."""
        parts = Path(self.path).with_suffix('').parts
        # Plasma's wallpapers are called by their sizes, in a folder with the name
        return parts[0 if 'contents' in parts else -1].lower()

    def find(self, root: str | Path = '/') -> Path | None:
        """Returns the file, or None where it is not installed.

        Args:
            root: Where Debian's packages are unpacked.
        """
        _, package, folder = SOURCES[self.source]
        base = Path(root)
        if package:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                return None
            base = Path(next(iter(spec.submodule_search_locations)))
        path = base / folder / self.path
        return path if path.is_file() else None


def _rows(source: str, licence: str, split: str, files: dict[str, str], template: str = '{}') -> list[Photograph]:
    return [Photograph(split, source, template.format(name), f'{name}, by {author}, {licence}')
            for name, author in files.items()]


_BY, _SA = 'CC BY 4.0', 'CC BY-SA 4.0'
_KDE = 'LGPL-3 by its metadata, GPL-2+ by the package'
_LOMIRI, _MATE, _PLASMA = 'lomiri-wallpapers-16.04', 'mate-backgrounds', 'plasma-workspace-wallpapers'
_KDE_FILE = '{}/contents/images/2560x1600.jpg'
PHOTOGRAPHS: Sequence[Photograph] = (
    *(Photograph(split, 'scikit-image', name, SKIMAGE[split][name]) for split, name in (
        ('train', 'astronaut.png'), ('train', 'coffee.png'), ('val', 'chelsea.png'))),
    *_rows('scikit-learn', 'CC BY 2.0', 'train', {'flower.jpg': 'vultilion'}),
    *_rows('scikit-learn', 'CC BY 2.0', 'val', {'china.jpg': 'danielbuechele'}),
    *_rows(_LOMIRI, _SA, 'train', {
        'Bridge_by_Sander_Klootwijk.jpg': 'Sander Klootwijk', 'Dragonfly_by_Bolly.jpg': 'Bolly',
        'free_by_Peter_Nerlich.jpg': 'Peter Nerlich', 'greentock_by_Peter_Nerlich.jpg': 'Peter Nerlich'}),
    *_rows(_LOMIRI, 'CC0', 'train', {'seeding_by_Clements_Engelhardt.jpg': 'Clemens Engelhardt'}),
    *_rows(_LOMIRI, _BY, 'train', {
        'Picture_0B_by_freespace.jpg': 'Trevor "Freespace"', 'Wine_by_Jakkub_Mede.jpg': 'Jakub Mede',
        'aitzgorri_by_Aitzol_Berasategi.jpg': 'Aitzol Berasategi',
        'sunset_by_Aitzol_Berasategi.jpg': 'Aitzol Berasategi'}),
    *_rows(_LOMIRI, _BY, 'val', {
        'Picture_1A_by_freespace.jpg': 'Trevor "Freespace"', 'friends_by_Aitzol_Berasategi.jpg': 'Aitzol Berasategi',
        'life_by_Aitzol_Berasategi.jpg': 'Aitzol Berasategi',
        'picosdeeuropa_by_Aitzol_Berasategi.jpg': 'Aitzol Berasategi'}),
    *_rows(_MATE, 'GPL-2+', 'train', {
        'Aqua.jpg': 'Charles Barbin', 'Blinds.jpg': 'Lennart Poettering and Andrea Cimitan',
        'FreshFlower.jpg': 'Jens Ansorg', 'Garden.jpg': 'Charles Barbin',
        'GreenMeadow.jpg': 'Timothy Schellhase and Lapo Calamandrei', 'RainDrops.jpg': 'blackcombwhistler07',
        'Storm.jpg': 'Sergey Nazarov', 'TwoWings.jpg': 'Charles Barbin and Hylke Bons',
        'Wood.jpg': 'Jean-François Fortin Tam', 'YellowFlower.jpg': 'Charles Barbin'}),
    *_rows(_MATE, 'GPL-2+', 'val', {'Dune.jpg': 'Marco Cogoni and Hylke Bons', 'LadyBird.jpg': 'Charles Barbin'}),
    *_rows(_PLASMA, _KDE, 'train', {
        'BytheWater': 'Maciej Wiklo', 'ColdRipple': 'Risto Saukonpää', 'ColorfulCups': 'Dmitri Popov',
        'FallenLeaf': 'Martin Klapetek', 'Kite': 'Risto Saukonpää', 'OneStandsOut': 'Risto Saukonpää',
        'Path': 'Risto Saukonpää'}, _KDE_FILE),
    *_rows(_PLASMA, _KDE, 'val', {'EveningGlow': 'Ian Hex', 'Grey': 'Sigi Sagi'}, _KDE_FILE),
)


def read_photograph(path: str | Path) -> Image.Image:
    """Returns a photograph in RGB, upright as its EXIF data say.

    Args:
        path: The file.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert('RGB')
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as a photograph: {error}') from error


def find_photographs(root: str | Path = '/') -> tuple[dict[Photograph, Path], list[str]]:
    """Returns the photographs that are installed with their files, and the packages of those that are not.

    Args:
        root: Where Debian's packages are unpacked.
    """
    files = {photograph: photograph.find(root) for photograph in PHOTOGRAPHS}
    missing = dict.fromkeys(photograph.source for photograph, path in files.items() if path is None)
    return {photograph: path for photograph, path in files.items() if path is not None}, list(missing)


def _shrink(image: Image.Image, lossy: bool, max_pixels: int) -> Image.Image:
    """Returns the picture without the traces of JPEG, and of at most `max_pixels`."""
    width, height = image.size
    factor = max(2. if lossy else 1., (width * height / max_pixels) ** 0.5)
    if factor == 1:
        return image
    # rounded down, so that the limit holds
    return image.resize((int(width / factor), int(height / factor)), Image.Resampling.LANCZOS)


def make_photo_data(
        output: str | Path,
        photographs: dict[Photograph, Path],
        max_pixels: int = MAX_PIXELS,
        force: bool = False,
        progress: Callable[[Iterable[Photograph]], Iterable[Photograph]] = iter,
) -> dict[str, int]:
    """Writes `train/*.png`, `val/*.png` and `README.txt` with the credits.

    The folder gets its name only when all of it is written.

    Args:
        output: The folder.
        photographs: Photographs with their files, as `find_photographs` returns them.
        max_pixels: Most pixels of a written picture.
        force: Replace a folder that this function made before.
        progress: Wraps the loop over the photographs, for a progress bar.

    Returns:
        The number of pictures of each split.
    """
    target = Path(output)
    counts = {split: sum(photograph.split == split for photograph in photographs) for split in ('train', 'val')}
    if max_pixels < 128 * 128:
        raise ValueError(f'max_pixels={max_pixels}: give at least {128 * 128}, or patches do not fit')
    empty = [split for split, count in counts.items() if not count]
    if empty:
        raise ValueError(f'no photographs for {" and ".join(empty)}')
    make_room(target, force)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    lines = ['Photographs from packages, for image restoration', '',
             f'{counts["train"]} for training, {counts["val"]} held out; no photograph is in both. JPEG files are '
             f'shrunk at least twice,\nall to at most {max_pixels} pixels. Each keeps the licence that its package '
             'states:', '']
    with tempfile.TemporaryDirectory(prefix='.photos-', dir=target.absolute().parent) as temporary:
        folder = Path(temporary) / 'photos'
        for split in counts:
            (folder / split).mkdir(parents=True)
        for photograph in progress(list(photographs)):
            path = photographs[photograph]
            picture = _shrink(read_photograph(path), path.suffix.lower() in LOSSY, max_pixels)
            name = f'{photograph.split}/{photograph.name}.png'
            picture.save(folder / name)
            lines.append(f'{name}: {photograph.source}, {photograph.credit}')
        (folder / 'README.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
        replace_folder(folder, target)
    return counts
