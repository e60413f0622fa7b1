"""The scans of a model, recorded while it runs: operator, inputs, and which pixel stands at which position.

Nothing is known about families here: a scan is what calls a scan operator of `visionssm_kernels`, and the map that it
reads follows from what its module and those around it were called with.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from visionssm.layers.pos_embed import insert_class_tokens
from visionssm.layers.routed_ssm import CascadeSSM
from visionssm.models.spatial_mamba import FusedStateSSM
from visionssm.models.vim2 import ChannelSSM
from visionssm.restoration.attentive import AttentiveSSM

from ..export.inputs import example_inputs
from ._passes import evaluation_mode, meta_tensors

__all__ = ['ScanBlock', 'ScanCall', 'record_scans']

OPS = {
    'selective_scan': 'u', 'selective_scan_2d': 'u', 'wavefront_scan_2d': 'u', 'ssd': 'x', 'ssd_2d': 'x', 'nc_ssd': 'x'}
"""Scan operators, and the name of the input that each is linear in."""
MAP_OPS = ('selective_scan_2d', 'ssd_2d', 'wavefront_scan_2d')

Layout = Literal['map', 'sequence', 'content', 'rows', 'columns', 'channels']


@dataclasses.dataclass(frozen=True)
class ScanCall:
    """One call of a scan operator."""
    op: str
    """Name of the operator in `visionssm_kernels`."""
    args: Mapping[str, Any]
    """Its arguments by name, with the defaults filled in."""
    path: str
    """Path of the module that called it."""
    layout: Layout
    """'map'; 'sequence' of pixels row by row; 'content', a sequence in the order of what pixels show; 'rows' or
    'columns', each a sequence by itself; 'channels' of every pixel."""
    size: tuple[int, int]
    """Height and width of the map."""
    pixels: torch.Tensor | None
    """Pixel number of every position in memory order, (L,); -1 for a token that is no pixel. None where the order
    depends on values and there were none."""
    fuse: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Linear map (B, D, H, W) to itself that the states pass before they are read."""


@dataclasses.dataclass(frozen=True)
class ScanBlock:
    """The scans of one block of a model."""
    name: str
    """Path of the block."""
    calls: tuple[ScanCall, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the map."""
        return self.calls[0].size

    @property
    def spatial(self) -> bool:
        """Whether pixels are mixed; else only the channels of each."""
        return self.calls[0].layout != 'channels'


@dataclasses.dataclass
class _Frame:
    """A module that is running."""
    path: str
    module: nn.Module
    shape: tuple[int, ...]
    calls: int = 0
    order: torch.Tensor | None = None


class _Recorder(TorchFunctionMode):
    """Notes scans, and follows which modules are running."""

    def __init__(self, model: nn.Module, image_size: tuple[int, int], only: str | None) -> None:
        super().__init__()
        self.only = only
        self.calls: list[ScanCall] = []
        self.image_size = image_size
        self.stack: list[_Frame] = []
        self.last_map: tuple[int, ...] = ()
        self.handles: list[Any] = []
        for path, module in model.named_modules():
            self.handles.append(module.register_forward_pre_hook(self._enter(path)))
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple) -> None:
            shape = tuple(args[0].shape) if args and isinstance(args[0], torch.Tensor) else ()
            self.stack.append(_Frame(path, module, shape))
        return enter

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.stack.pop()
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            self.last_map = tuple(output.shape)

    def __torch_function__(
            self,
            func: Callable,
            types: Sequence[type],
            args: tuple = (),
            kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        frame = self.stack[-1] if self.stack else None
        if frame is None:
            return out
        if func is torch.Tensor.sort and isinstance(frame.module, AttentiveSSM):
            frame.order = out.indices  # the order in which the pixels are read
        name = getattr(func, '__name__', '').removesuffix('.default')
        wanted = self.only is None or self.only == _block_name(frame.path)
        if wanted and name in OPS and str(func).startswith('visionssm.'):
            self._note(name, args, kwargs or {})
        return out

    def _note(self, op: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        schema = getattr(torch.ops.visionssm, op).default._schema
        given = {arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()}
        given.update({arg.name: value for arg, value in zip(schema.arguments, args)})
        given.update(kwargs)
        given = {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
        fuse = next((frame.module.fusion for frame in self.stack if isinstance(frame.module, FusedStateSSM)), None)
        layout, size, pixels = self._locate(op, given[OPS[op]])
        self.calls.append(ScanCall(op, given, self.stack[-1].path, layout, size, pixels, fuse))

    def _locate(
            self,
            op: str,
            u: torch.Tensor,
    ) -> tuple[Layout, tuple[int, int], torch.Tensor | None]:
        """Return how the positions of a scan lie on a map."""
        inner = self.stack[-1]
        inner.calls += 1
        if isinstance(inner.module, CascadeSSM):
            height, width = inner.shape[2:]
            pixels = torch.arange(height * width)
            if inner.calls == 1:
                return 'rows', (height, width), pixels
            return 'columns', (height, width), pixels.view(height, width).t().flatten()
        if op in MAP_OPS:
            height, width = u.shape[-2:]
            return 'map', (height, width), torch.arange(height * width)
        length = u.shape[1] if op in ('ssd', 'nc_ssd') else u.shape[-1]
        if isinstance(inner.module, ChannelSSM):
            outer = next(frame for frame in reversed(self.stack) if len(frame.shape) == 4)
            return 'channels', (outer.shape[1], outer.shape[2]), None
        for frame in reversed(self.stack):
            if isinstance(frame.module, AttentiveSSM):
                order = None if frame.order is None or frame.order.is_meta else frame.order[0].cpu()
                return 'content', (frame.shape[1], frame.shape[2]), order
            size = self._map_of(frame.shape, length)
            if size is not None:
                return 'sequence', size, torch.arange(length)
        return ('sequence', *self._tokens(length))

    def _map_of(self, shape: tuple[int, ...], length: int) -> tuple[int, int] | None:
        """Return the height and width of a map of `length` pixels, (B, H, W, C) or (B, C, H, W)."""
        sizes = [] if len(shape) != 4 else [
            (shape[i], shape[i + 1]) for i in (1, 2) if shape[i] * shape[i + 1] == length]
        height, width = self.image_size
        # where both fit, the one that has the shape of the image
        return min(sizes, key=lambda size: abs(size[0] * width - size[1] * height), default=None)

    def _tokens(self, length: int) -> tuple[tuple[int, int], torch.Tensor]:
        """Return the map of a sequence of patches, which an earlier module cut, and possibly of other tokens."""
        height, width = self.last_map[2:] or (0, 0)
        pixels = torch.arange(height * width)
        extra = length - len(pixels)
        for frame in reversed(self.stack):
            kind = getattr(frame.module, 'class_token', None)
            if extra and isinstance(kind, str):
                token = torch.full((1, 1, 1), -1)
                pixels = insert_class_tokens(pixels.view(1, -1, 1), kind, token, token).flatten()
            elif extra and getattr(frame.module, 'num_extra', 0) == extra:
                pixels = torch.cat([torch.full((extra,), -1), pixels])
        if len(pixels) != length or not height * width:
            raise ValueError(f'{self.stack[-1].path} scans a sequence of {length} positions, of which no module tells '
                             f'how they lie on the image')
        return (height, width), pixels


def record_scans(
        model: nn.Module,
        image: torch.Tensor | None = None,
        size: int | Sequence[int] | None = None,
        only: str | None = None,
) -> list[ScanBlock]:
    """Run a model once and return its scans block by block, in the order of the run.

    Args:
        model: A model of the package, of any task; it is left as it was. Diffusion models get a time step and a class
            that are drawn once.
        image: One image as the model takes it, normalised, (C, H, W) or (1, C, H, W); None runs on shapes alone,
            without memory and time, and the arguments of the calls are then on the meta device.
        size: Height and width, or one number for both, where there is no image; the model's own when None.
        only: Path of the one block to record; all when None, which keeps the inputs of all their scans.

    Returns:
        The blocks. There are none in a model without scans.

    Raises:
        ValueError: The image is not one image, or the model does not take one of this size.
    """
    if image is not None:
        image = image[None] if image.ndim == 3 else image
        if image.ndim != 4 or len(image) != 1:
            raise ValueError(f'image is {tuple(image.shape)}; needed is one image, (C, H, W) or (1, C, H, W)')
        size = tuple(image.shape[2:])
    inputs = list(example_inputs(model, size).tensors)
    weights = next(model.parameters(), inputs[0])
    if image is not None:
        inputs[0] = image.to(weights.device, weights.dtype)
    else:
        inputs[0] = inputs[0].to(weights.dtype)
    inputs[1:] = [tensor.to(weights.device) for tensor in inputs[1:]]
    recorder = _Recorder(model, tuple(inputs[0].shape[2:]), only)
    try:
        with evaluation_mode(model), torch.no_grad(), recorder:
            if image is None:
                inputs = [tensor.to('meta') for tensor in inputs]
                torch.func.functional_call(model, meta_tensors(model), tuple(inputs))
            else:
                model(*inputs)
    finally:
        recorder.close()
    blocks: dict[str, list[ScanCall]] = {}
    for call in recorder.calls:
        blocks.setdefault(_block_name(call.path), []).append(call)
    return [ScanBlock(name, tuple(calls)) for name, calls in blocks.items()]


def _block_name(path: str) -> str:
    """Return the part of a module's path that names the block: up to its last number."""
    numbered = re.match(r'(.*\.)?\d+(?=\.|$)', path)
    return numbered.group() if numbered else path.partition('.')[0]
