"""Data of diffusion models: the centre crop that ADM, DiT and DiS train with, and cached latents."""
import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch.utils.data import Dataset

from ...registry import DATASETS, TRANSFORMS
from ..data import SampleKey, sample_rng
from ..transforms import to_tensor

__all__ = ['ADMCenterCrop', 'LatentDataset']


@TRANSFORMS.register_module()
class ADMCenterCrop:
    """Halve by boxes while the picture is twice too large, shrink bicubically, cut the middle, and mirror.

    Args:
        size: Side of the result.
        flip: Probability of a left-right mirror.
    """

    def __init__(self, size: int, flip: float = 0.0) -> None:
        if size < 1:
            raise ValueError(f'size is {size}; it must be at least 1')
        self.size, self.flip = size, flip

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return (C, size, size) in uint8."""
        while min(image.size) >= 2 * self.size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = self.size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        picture = to_tensor(image.crop((left, top, left + self.size, top + self.size)))
        return picture.flip(-1) if random.random() < self.flip else picture


@DATASETS.register_module()
class LatentDataset(Dataset):
    """Latents that `tools/cache_latents.py` wrote: means and deviations of each image, mirrored or not.

    Args:
        root: Folder with `latents.json` and the files that it names.
        flip: Probability of the mirrored latents, where they were stored.
        seed: Seed of the choice.
    """

    def __init__(self, root: str, flip: float = 0.5, seed: int = 0) -> None:
        index = Path(root, 'latents.json')
        if not index.is_file():
            raise FileNotFoundError(f'{index} does not exist; write the latents with python tools/cache_latents.py '
                                    f'IMAGES --vae NAME --out {root}, to the end')
        self.root, self.flip, self.seed = Path(root), flip, seed
        facts = json.loads(index.read_text(encoding='utf-8'))
        self.shards: list[dict[str, Any]] = facts['shards']
        missing = [shard['file'] for shard in self.shards if not Path(root, shard['file']).is_file()]
        if missing:
            raise FileNotFoundError(f'{index} names {", ".join(missing[:5])}, which is not there ({len(missing)} of '
                                    f'{len(self.shards)} files); copy the whole folder, or run the same '
                                    'tools/cache_latents.py again')
        self.metainfo = {'classes': tuple(facts['classes'])}
        self.places = [(number, row) for number, shard in enumerate(self.shards) for row in range(shard['images'])]
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.places)

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        key = key if isinstance(key, SampleKey) else SampleKey(int(key))
        number, row = self.places[key.index]
        if number not in self._open:
            self._open[number] = safe_open(self.root / self.shards[number]['file'], 'pt')
        moments = self._open[number].get_slice('moments')[row:row + 1][0]
        with sample_rng(self.seed, key):
            mirrored = len(moments) > 1 and random.random() < self.flip
        label = int(self._open[number].get_slice('labels')[row:row + 1][0])
        return {'inputs': moments[int(mirrored)].float(), 'label': label, 'index': key.index,
                'path': f'{self.shards[number]["file"]}[{row}]'}
