"""The precision that the operators compute in."""
import torch
from torch import Tensor

__all__ = ['widened']

NARROW = (torch.float16, torch.bfloat16)


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half-precision tensors as float32; the others as they are.

    Torchvision's CPU operators know no half precision, and sums and coordinates need more digits than it has.
    """
    return tuple(tensor.float() if tensor.dtype in NARROW else tensor for tensor in tensors)
