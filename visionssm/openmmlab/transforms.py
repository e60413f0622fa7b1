"""From a PIL image to a (C, H, W) tensor, not normalised: timm's pipelines, albumentations, and a light one.

Randomness comes from the global generators of Python, NumPy and PyTorch, which the dataset seeds for every sample.
"""
import inspect
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing

from ..registry import TRANSFORMS
from ..utils.suggest import did_you_mean

__all__ = ['Albumentations', 'PixelErasing', 'ShiftFlip', 'TimmTransform', 'to_tensor']


def to_tensor(image: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """Turns an image of 8-bit values into a tensor.

    Args:
        image: A PIL image, an array (H, W) or (H, W, C), or a tensor, which is returned as it is.

    Returns:
        Tensor (C, H, W) with the values of the image.
    """
    if isinstance(image, torch.Tensor):
        return image
    array = np.asarray(image)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.array(array, order='C'))


def _check_arguments(name: str, given: Iterable[str], build: Callable) -> None:
    known = [key for key, parameter in inspect.signature(build).parameters.items()
             if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
    for key in given:
        if key not in known:
            raise ValueError(f'the transform {name} has no argument {key!r}. {did_you_mean(key, known)} '
                             f'It takes {", ".join(known)}.')


class PixelErasing:
    """timm's random erasing for uint8 images that are not normalised yet; the result is float32, mostly in 0..1.

    Args:
        probability: Share of images with an erased rectangle.
        mode: 'pixel' (normal noise per pixel), 'rand' (one normal colour) or 'const' (the mean colour).
        count: Most rectangles in an image.
        mean: Mean that the model subtracts later, in units of 0..1.
        std: Standard deviation that the model divides by later, in units of 0..1.
    """

    def __init__(
            self,
            probability: float,
            mode: str = 'pixel',
            count: int = 1,
            mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
            std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self.erase = RandomErasing(probability, mode=mode, max_count=count, device='cpu')
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        # the noise is standard normal in normalised units, so it leaves the range of uint8 and the result is float
        return self.erase((image.float() / 255 - self.mean) / self.std) * self.std + self.mean


@TRANSFORMS.register_module()
class TimmTransform:
    """The pipeline that `timm.data.create_transform` makes: crop, flip, RandAugment, colour, random erasing.

    Args:
        input_size: (C, H, W) or (H, W) or the side of a square.
        is_training: The augmenting pipeline instead of resize and centre crop.
        re_prob: Probability of random erasing; see `PixelErasing`.
        re_mode: Its mode.
        re_count: Its most rectangles.
        mean: Mean that the model subtracts later, also the fill colour of geometric augmentations.
        std: Standard deviation that the model divides by later.
        **kwargs: Further arguments of `create_transform`, for example `auto_augment`, `interpolation`, `crop_pct`.
    """

    def __init__(
            self,
            input_size: int | tuple[int, ...] = 224,
            is_training: bool = False,
            re_prob: float = 0.0,
            re_mode: str = 'pixel',
            re_count: int = 1,
            mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
            std: Sequence[float] = IMAGENET_DEFAULT_STD,
            **kwargs: Any,
    ) -> None:
        _check_arguments('TimmTransform', kwargs, create_transform)
        size = input_size if isinstance(input_size, int) else tuple(input_size)
        self.steps = create_transform(size, is_training=is_training, mean=tuple(mean), std=tuple(std),
                                      normalize=False, use_prefetcher=True, **kwargs)
        self.erase = PixelErasing(re_prob, re_mode, re_count, mean, std) if is_training and re_prob else None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        tensor = to_tensor(self.steps(image))
        return self.erase(tensor) if self.erase else tensor

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.steps})'


@TRANSFORMS.register_module()
class Albumentations:
    """A pipeline of albumentations, written as configs: `[dict(type='HorizontalFlip', p=0.5), ...]`.

    Args:
        transforms: One config a step: `type` is the class name in albumentations, the rest its arguments. `OneOf`,
            `SomeOf` and `Sequential` take their steps the same way under `transforms`.
    """

    def __init__(self, transforms: Sequence[dict]) -> None:
        import albumentations

        self._library = albumentations
        self.steps = albumentations.Compose([self._step(config) for config in transforms])

    def _step(self, config: dict) -> Any:
        arguments = dict(config)
        name = arguments.pop('type', None)
        step = getattr(self._library, name, None) if isinstance(name, str) else None
        if step is None:
            raise ValueError(f'albumentations has no transform {name!r} (in {config}): '
                             "give the class name as type, for example type='RandomResizedCrop'")
        if 'transforms' in arguments:
            arguments['transforms'] = [self._step(inner) for inner in arguments['transforms']]
        # the library itself warns about unknown arguments and goes on without them
        _check_arguments(name, arguments, step)
        return step(**arguments)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        # albumentations keeps its own generators: tie them to the seeded one of this sample
        self.steps.set_random_seed(random.getrandbits(32))
        array = np.asarray(image)
        return to_tensor(self.steps(image=array[..., None] if array.ndim == 2 else array)['image'])


@TRANSFORMS.register_module()
class ShiftFlip:
    """Light augmentation for small pictures: a random shift with black borders and a mirror.

    Args:
        shift: Largest shift in pixels along each axis.
        flip: Probability of a left-right mirror.
        size: Side of the result; the picture is padded with black or cropped around its centre. None keeps its size.
    """

    def __init__(self, shift: int = 0, flip: float = 0.0, size: int | None = None) -> None:
        self.shift = shift
        self.flip = flip
        self.size = size

    def __call__(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        picture = to_tensor(image)
        channels, h, w = picture.shape
        down, right = random.randint(-self.shift, self.shift), random.randint(-self.shift, self.shift)
        out_h, out_w = (h, w) if self.size is None else (self.size, self.size)
        # output row y shows input row y - top
        top, left = (out_h - h) // 2 + down, (out_w - w) // 2 + right
        result = picture.new_zeros(channels, out_h, out_w)
        y0, y1, x0, x1 = max(top, 0), min(top + h, out_h), max(left, 0), min(left + w, out_w)
        result[:, y0:y1, x0:x1] = picture[:, y0 - top:y1 - top, x0 - left:x1 - left]
        return result.flip(-1) if random.random() < self.flip else result
