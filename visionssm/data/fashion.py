"""The 7,000 pictures of Fashion-MNIST that ship with the package; README.txt beside this file says which."""
from typing import Literal

import numpy as np

from ..utils.paths import data_file

__all__ = ['FASHION_CLASSES', 'embedded_fashion_mnist']

FASHION_CLASSES = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
                   'Ankle boot')


def embedded_fashion_mnist(split: Literal['train', 'test']) -> tuple[np.ndarray, np.ndarray]:
    """Loads one split of the pictures inside the package.

    Args:
        split: 'train' (6,000 pictures) or 'test' (1,000).

    Returns:
        Images (N, 28, 28) uint8 and labels (N,) uint8.
    """
    with np.load(data_file('fashion_mnist_7k.npz')) as arrays:
        return arrays[f'{split}_images'], arrays[f'{split}_labels']
