"""The classification datasets: whatever timm reads, and Fashion-MNIST with a subset that ships with the package."""
import gzip
import logging
import os
import socket
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mmengine.dist import barrier, is_main_process
from PIL import Image
from timm.data import ImageNetInfo, create_dataset
from timm.data.readers.class_map import load_class_map

from ..data.fashion import FASHION_CLASSES, embedded_fashion_mnist
from ..registry import DATASETS
from .data import ImageDataset, SampleKey, convert_mode, sample_rng

__all__ = ['FASHION_CLASSES', 'FashionMNIST', 'TimmDataset', 'TimmStream', 'class_names', 'load_fashion_mnist']

logger = logging.getLogger('visionssm')

DEBIAN_FOLDER = Path('/usr/share/datasets/fashion-mnist')
IDX_FILES = {'train': ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'),
             'test': ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')}
Source = Literal['auto', 'root', 'debian', 'download', 'embedded']
STREAMS = ('wds', 'hfids', 'tfds')


def class_names(class_map: str | dict[str, int] | Sequence[str], root: str = '') -> dict[str, int]:
    """Reads a class order in any of its forms.

    Args:
        class_map: `'imagenet-1k'` (or another subset that `timm.data.ImageNetInfo` knows) for the official synset
            order, a text file with one class a line, a list of names, or the mapping itself.
        root: Folder in which a text file is also looked for.

    Returns:
        Class name -> label.
    """
    if isinstance(class_map, dict):
        return dict(class_map)
    if not isinstance(class_map, str):
        return {name: label for label, name in enumerate(class_map)}
    if not Path(class_map).suffix:
        return {name: label for label, name in enumerate(ImageNetInfo(class_map).label_names())}
    if not any(path.is_file() for path in (Path(class_map), Path(root, class_map))):
        raise FileNotFoundError(f'class map {class_map!r} does not exist, neither as given nor in {root!r}; '
                                "give a text file with one class a line, a list of names, or 'imagenet-1k'")
    return load_class_map(class_map, root)


def _check_class_folders(root: str, class_to_idx: dict[str, int]) -> None:
    """Refuses folders that are no class of the class map: timm would drop their images without a word."""
    folders = [entry.name for entry in os.scandir(root) if entry.is_dir()] if os.path.isdir(root) else []
    unknown = sorted(set(folders) - set(class_to_idx))
    if unknown:
        raise ValueError(f'{root} has {len(unknown)} folders that are no class of the class map: '
                         f'{", ".join(unknown[:5])}{" ..." if len(unknown) > 5 else ""}; its classes are called '
                         f'{", ".join(list(class_to_idx)[:3])} ... Rename the folders or give another class_map')


@DATASETS.register_module()
class TimmDataset(ImageDataset):
    """Any dataset with random access that `timm.data.create_dataset` reads.

    Args:
        root: Folder of class folders, folder of splits, a `.tar` or a folder of them; cache folder for `hfds/` and
            `torch/`.
        name: timm's name: `''` for folders and tar files, `'hfds/<name>'` for Hugging Face datasets,
            `'torch/<name>'` for torchvision's.
        split: Split, looked for as a sub-folder where there is one.
        class_map: Order of the classes, see `class_names`; sorted folder names when None, which for ImageNet's
            synsets is the official order (as long as all 1000 folders are there).
        mode: PIL mode of the images.
        dataset_args: Further arguments of `create_dataset`.
        transform: See `ImageDataset`, as are the remaining arguments.
        seed: Seed of the random transforms.
        max_unreadable: Tolerated share of unreadable images.
    """

    def __init__(
            self,
            root: str | None = None,
            name: str = '',
            split: str = 'train',
            class_map: str | dict[str, int] | Sequence[str] | None = None,
            mode: str = 'RGB',
            dataset_args: dict[str, Any] | None = None,
            transform: dict | Sequence[dict] | Callable | None = None,
            seed: int = 0,
            max_unreadable: float = 0.01,
    ) -> None:
        prefix = name.partition('/')[0].lower() if '/' in name else ''
        if prefix in STREAMS:
            raise ValueError(f"TimmDataset needs random access and {name!r} is a stream: use type='TimmStream'")
        class_to_idx = None if class_map is None else class_names(class_map, root or '')
        layout = f'{root}/{split}/<class>/<image>.jpg or {root}/<class>/<image>.jpg, or a .tar of such a tree'
        if not prefix and (root is None or not os.path.exists(root)):
            raise FileNotFoundError(f'the data folder {root!r} does not exist; expected {layout}. Name it in '
                                    'the config; those for ImageNet take it from the variable IMAGENET_ROOT')
        try:
            self.source = create_dataset(name, root, split=split, class_map=class_to_idx or '', input_img_mode=mode,
                                         **(dataset_args or {}))
        except RuntimeError as error:
            if prefix == 'torch' and 'not found' in str(error):
                raise FileNotFoundError(
                    f'the folder {root!r} does not hold the data set {name!r}, or not all of it: put the files that '
                    'torchvision reads there, or let it fetch them once, by --cfg-options '
                    'train_dataloader.dataset.dataset_args.download=True (likewise val_dataloader and '
                    f'test_dataloader). torchvision says: {error}') from error
            if 'Found 0 images' not in str(error):
                raise
            of_map = f' (classes {", ".join(list(class_to_idx)[:3])} ...)' if class_to_idx else ''
            raise ValueError(f'no images in the data folder {root!r}: expected {layout}{of_map}. {error}') from error
        self.reader = getattr(self.source, 'reader', None)
        self.mode = mode
        if class_to_idx is not None and not prefix:
            _check_class_folders(self.reader.root, class_to_idx)
        names = class_to_idx or getattr(self.reader, 'class_to_idx', None) or getattr(
            self.reader, 'class_name_to_idx', None) or getattr(self.source, 'class_to_idx', {})
        super().__init__(transform, sorted(names, key=names.__getitem__), seed, max_unreadable)
        if isinstance(class_map, str) and not Path(class_map).suffix:
            info = ImageNetInfo(class_map)
            self.metainfo['descriptions'] = tuple(info.label_descriptions())

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def read(self, index: int) -> tuple[Image.Image, int, str]:
        """See `ImageDataset.read`."""
        if self.reader is None:
            image, label = self.source[index]
            return convert_mode(image, self.mode), int(label), self.path(index)
        file, label = self.reader[index][:2]
        # the reader's own retry (timm's ImageDataset) would hide which image was replaced
        with file, Image.open(file) as image:
            return convert_mode(image, self.mode), int(label), self.path(index)

    def path(self, index: int) -> str:
        """See `ImageDataset.path`."""
        if self.reader is None:
            return super().path(index)
        return str(self.reader.filename(index, absolute=True))


@DATASETS.register_module()
class TimmStream(ImageDataset):
    """Datasets that timm reads as a stream (`wds/`, `hfids/`, `tfds/`) behind the interface of the others.

    Every loader worker reads its own shards; the sampler's keys only say which epoch it is and seed the transforms.
    So the order is the stream's, a resumed run starts the epoch's stream anew, and evaluation counts each image once
    with `num_workers` 0 or 1 in one process; images that cannot be decoded are skipped and logged by the reader.

    Args:
        root: Folder of the shards, or address.
        name: timm's name with its prefix, for example `'wds/imagenet'`.
        split: Split; for `wds/` also a pattern of shards such as `'train-{0000..0099}.tar'`.
        num_samples: Length of an epoch, where the dataset does not say it.
        is_training: Shuffle the stream.
        class_map: As in `TimmDataset`.
        mode: PIL mode of the images.
        dataset_args: Further arguments of `create_dataset`.
        transform: See `ImageDataset`.
        seed: Seed of the stream's shuffling and of the random transforms.
    """

    def __init__(
            self,
            root: str,
            name: str,
            split: str = 'train',
            num_samples: int | None = None,
            is_training: bool = False,
            class_map: str | dict[str, int] | Sequence[str] | None = None,
            mode: str = 'RGB',
            dataset_args: dict[str, Any] | None = None,
            transform: dict | Sequence[dict] | Callable | None = None,
            seed: int = 0,
    ) -> None:
        if name.partition('/')[0].lower() not in STREAMS:
            raise ValueError(f"name={name!r} is no stream: it starts with one of {', '.join(STREAMS)}, as in "
                             "'wds/imagenet'; use type='TimmDataset' for the others")
        class_to_idx = None if class_map is None else class_names(class_map, root)
        self.source = create_dataset(name, root, split=split, is_training=is_training, num_samples=num_samples,
                                     class_map=class_to_idx or '', input_img_mode=mode, seed=seed,
                                     **(dataset_args or {}))
        self.name = name
        self.num_samples = num_samples or getattr(self.source.reader, 'num_samples', 0) or len(self.source)
        if not self.num_samples:
            raise ValueError(f'{name!r} does not say how many images the split {split!r} has: give num_samples')
        names = class_to_idx or getattr(self.source.reader, 'class_to_idx', {})
        super().__init__(transform, sorted(names, key=names.__getitem__), seed)
        self._epoch = -1
        self._stream: Any = None

    def __len__(self) -> int:
        """Images of an epoch, over all processes."""
        return self.num_samples

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        key = key if isinstance(key, SampleKey) else SampleKey(int(key))
        if self._stream is None or key.epoch != self._epoch:
            self._epoch = key.epoch
            self.source.set_epoch(key.epoch)
            self._stream = iter(self.source)
        try:
            image, label = next(self._stream)
        except StopIteration:
            # shards are uneven: a worker whose share is used up starts it again until the epoch is over
            self._stream = iter(self.source)
            # a StopIteration that left here would end the epoch without a word
            found = next(self._stream, None)
            if found is None:
                raise ValueError(f'the stream {self.name!r} gives this worker no images: take fewer workers '
                                 '(num_workers) or processes than it has shards, or name another split') from None
            image, label = found
        with sample_rng(self.seed, key):
            inputs = self.transform(image)
        return {'inputs': inputs, 'label': int(label), 'path': self.path(key.index), 'index': key.index}


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """Reads one file of the MNIST format, plain or gzipped: magic number, sizes, bytes."""
    opener = gzip.open if path.suffix == '.gz' else open
    dimensions = magic & 0xFF
    try:
        with opener(path, 'rb') as file:
            content = file.read()
        header = struct.unpack(f'>{1 + dimensions}I', content[:4 * (1 + dimensions)])
    except (EOFError, struct.error, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    data = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions))
    if header[0] != magic or data.size != np.prod(header[1:]):
        raise ValueError(f'{path} is damaged: header {header} with {data.size} bytes of data')
    return data.reshape(header[1:])


def _find_idx(root: Path, split: str) -> list[Path] | None:
    """The image and the label file of a split below a root, in any of the usual places."""
    for folder in (root, root / 'raw', root / 'FashionMNIST' / 'raw'):
        found = [next((path for path in (folder / name, folder / f'{name}.gz') if path.is_file()), None)
                 for name in IDX_FILES[split]]
        if all(found):
            return [path for path in found if path is not None]
    return None


def _download_folder() -> Path:
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return Path(cache) / 'visionssm'


def _download(folder: Path) -> bool:
    """Lets torchvision download the four files on the main process; tells whether they are there afterwards."""
    if is_main_process() and not all(_find_idx(folder, split) for split in IDX_FILES):
        from torchvision.datasets import FashionMNIST as Torchvision

        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(10)
        try:
            Torchvision(str(folder), download=True)
        except (OSError, RuntimeError) as error:
            logger.info('Fashion-MNIST could not be downloaded (%s)', error)
        finally:
            socket.setdefaulttimeout(timeout)
    barrier()
    return all(_find_idx(folder, split) for split in IDX_FILES)


def load_fashion_mnist(
        split: Literal['train', 'test'],
        source: Source = 'auto',
        root: str | None = None,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Loads one split of Fashion-MNIST.

    Args:
        split: 'train' or 'test'.
        source: 'root' (the files in `root`), 'debian' (the files of its package dataset-fashion-mnist), 'download'
            (by torchvision, into the user's cache), 'embedded' (6,000 + 1,000 pictures that ship with the package),
            or 'auto': the first of these, in this order, that is there.
        root: Folder with the four files, plain or gzipped; only this folder is used when it is given with 'auto'.

    Returns:
        Images (N, 28, 28) uint8, labels (N,) uint8 and a sentence that names the source.
    """
    if split not in IDX_FILES:
        raise ValueError(f"split={split!r}: Fashion-MNIST has the splits 'train' and 'test'")
    if source not in ('auto', 'root', 'debian', 'download', 'embedded'):
        raise ValueError(f"source={source!r}: give 'auto', 'root', 'debian', 'download' or 'embedded'")
    if source == 'root' and root is None:
        raise ValueError("source='root' needs root, the folder with the four files")
    if source == 'root' or source == 'auto' and root is not None:
        places = [('given folder', Path(str(root)))]
    else:
        places = [('Debian package', DEBIAN_FOLDER)] if source in ('auto', 'debian') else []
    for title, folder in places:
        if files := _find_idx(folder, split):
            return _read_idx(files[0], 0x803), _read_idx(files[1], 0x801), f'{title} {folder}'
    if places and (source != 'auto' or root is not None):
        raise FileNotFoundError(f'no Fashion-MNIST in {places[0][1]}: expected {" and ".join(IDX_FILES[split])}, plain '
                                "or with .gz. Use source='download', or source='embedded' for the subset that "
                                'ships with the package')
    if source in ('auto', 'download'):
        folder = _download_folder()
        files = _find_idx(folder, split) if _download(folder) else None
        if files:
            return _read_idx(files[0], 0x803), _read_idx(files[1], 0x801), f'download in {folder}'
        if source == 'download':
            raise FileNotFoundError(f"Fashion-MNIST could not be downloaded to {folder}; source='embedded' needs no "
                                    'network')
    return *embedded_fashion_mnist(split), 'subset of 7,000 that ships with the package'


@DATASETS.register_module()
class FashionMNIST(ImageDataset):
    """Fashion-MNIST in memory: 28 x 28 grey pictures of ten kinds of clothes.

    Args:
        split: 'train' or 'test'.
        source: Where the pictures come from, see `load_fashion_mnist`; the log names the choice.
        root: Folder with the original files.
        mode: PIL mode of the images: 'L' for one channel, 'RGB' for three equal ones.
        transform: See `ImageDataset`.
        seed: Seed of the random transforms.
    """

    METAINFO = {'classes': tuple(FASHION_CLASSES)}

    def __init__(
            self,
            split: Literal['train', 'test'] = 'train',
            source: Source = 'auto',
            root: str | None = None,
            mode: Literal['L', 'RGB'] = 'L',
            transform: dict | Sequence[dict] | Callable | None = None,
            seed: int = 0,
    ) -> None:
        self.images, self.labels, self.source = load_fashion_mnist(split, source, root)
        self.mode = mode
        self.split = split
        logger.info('Fashion-MNIST %s: %d pictures from the %s', split, len(self.images), self.source)
        super().__init__(transform, FASHION_CLASSES, seed)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, int, str]:
        """See `ImageDataset.read`."""
        image = Image.fromarray(self.images[index])
        return image.convert(self.mode), int(self.labels[index]), self.path(index)

    def path(self, index: int) -> str:
        """See `ImageDataset.path`."""
        return f'fashion-mnist/{self.split}/{index:05d}'
