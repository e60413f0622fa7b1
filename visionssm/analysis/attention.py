"""The implicit attention of a selective scan: how much of every pixel a scan carries to a chosen one.

With its steps and matrices fixed, a scan is linear in its input: y_q = sum_p a[q, p] u_p + D u_q, with
a[q, p] = C_q (prod_{p < k <= q} exp(delta_k A)) delta_p B_p along a route (Ali, Zimerman and Wolf, `The Hidden
Attention of Mamba Models`, arXiv 2403.01590). Channels do not mix in it, so one backward pass of the operator gives the
row of a query for all channels and routes at once, exactly and for every operator, with the memory of one training step
of that scan.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from visionssm_kernels import compat  # noqa: F401  (registers the operators of torch.ops.visionssm)

from .routes import call_routes
from .scans import OPS, ScanBlock, ScanCall, record_scans

__all__ = ['ScanAttention', 'attention_row', 'block_attention', 'find_block', 'scan_attention']

Signals = tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]


class ScanAttention(NamedTuple):
    """What a query pixel reads of all pixels in one block."""
    block: str
    """Path of the block in the model."""
    query: tuple[int, int]
    """Row and column of the query on the map."""
    labels: tuple[str, ...]
    """Names of the routes."""
    routes: torch.Tensor
    """Mean over channels of |a| for every route, float32, (K, H, W)."""
    merged: torch.Tensor
    """The same where the routes of a scan are first added up with their signs, float32, (H, W)."""


def scan_attention(
        model: nn.Module,
        image: torch.Tensor,
        block: int | str = 0,
        query: tuple[int, int] | None = None,
) -> ScanAttention:
    """Compute the implicit attention of one pixel in one block.

    The skip D and gates behind the scan are left out. Where the two directions of a block have separate scans (Vim),
    and where it scans rows and then columns, `merged` is the sum of both.

    Args:
        model: A model of the package, of any task.
        image: One image as the model takes it, normalised, (C, H, W).
        block: Number of the block among those that scan, from the end if negative; or its path.
        query: Row and column of the pixel on the image; its middle when None.

    Returns:
        The attention on the block's map.

    Raises:
        ValueError: There is no such block or pixel, or the block mixes no pixels.
    """
    size = tuple(image.shape[-2:])
    # a run on shapes finds the block, and the other one keeps no more than its inputs
    chosen = find_block(record_scans(model, size=size), block)
    return block_attention(record_scans(model, image, only=chosen.name)[0], size, query)


def find_block(blocks: Sequence[ScanBlock], block: int | str) -> ScanBlock:
    """Return a block by its number or path.

    Raises:
        ValueError: There is no such block, or it mixes no pixels.
    """
    if not blocks:
        raise ValueError('The model has no scans: none of its modules calls a scan operator of visionssm_kernels')
    names = [scan.name for scan in blocks]
    known = f'There are {len(names)}: ' + ', '.join(f'{i} {name}' for i, name in enumerate(names))
    if isinstance(block, str):
        if block not in names:
            raise ValueError(f'There is no block {block!r} that scans. {known}')
        block = names.index(block)
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f'There is no block {block} that scans. {known}')
    found = blocks[block]
    if not found.spatial:
        raise ValueError(f'Block {found.name} scans the channels of every pixel: no pixel reads another. {known}')
    return found


def block_attention(
        block: ScanBlock,
        image_size: tuple[int, int],
        query: tuple[int, int] | None = None,
) -> ScanAttention:
    """Compute the implicit attention of one pixel in a block that `record_scans` has seen.

    Args:
        block: A block of a run with an image.
        image_size: Height and width of that image.
        query: Row and column of the pixel on the image; its middle when None.

    Returns:
        As `scan_attention`.
    """
    height, width = image_size
    row, column = (height // 2, width // 2) if query is None else query
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f'query is ({row}, {column}); the image has {height} rows and {width} columns, from 0')
    # a map that is larger than the image was padded behind it
    at = row * min(block.size[0], height) // height, column * min(block.size[1], width) // width
    labels: list[str] = []
    routes: list[torch.Tensor] = []
    merged = torch.zeros(block.size)
    for call in block.calls:
        rows = _to_map(call, attention_row(call, at[0] * block.size[1] + at[1]))  # (K, C, H, W)
        labels += [route.label for route in call_routes(call)]
        routes.append(rows.abs().mean(1))
        merged += rows.sum(0).abs().mean(0)
    return ScanAttention(block.name, at, tuple(labels), torch.cat(routes), merged)


def _to_map(call: ScanCall, rows: torch.Tensor) -> torch.Tensor:
    """Put (K, C, L) on the map, float32 on the CPU; tokens that are no pixels are left out."""
    assert call.pixels is not None
    is_pixel = call.pixels >= 0
    on_map = torch.zeros(*rows.shape[:2], call.size[0] * call.size[1])
    on_map[..., call.pixels[is_pixel]] = rows.float().cpu()[..., is_pixel]
    return on_map.unflatten(-1, call.size)


def attention_row(call: ScanCall, pixel: int) -> torch.Tensor:
    """Return a[q, p] of one query q, with signs.

    Args:
        call: A call that `record_scans` has seen in a run with an image.
        pixel: Number i * W + j of the query pixel.

    Returns:
        (K, C, L) in the precision of the scan: route, channel, position in memory order (see `ScanCall.pixels`).
    """
    if call.pixels is None:
        raise ValueError(f'{call.path} was recorded without an image')
    position = int((call.pixels == pixel).nonzero())
    with torch.inference_mode(False), torch.enable_grad():
        signals, run = scan_signals(call)
        signals.requires_grad_()
        return torch.autograd.grad(run(signals)[..., position].sum(), signals)[0]


def scan_signals(call: ScanCall) -> Signals:
    """Return the input of a scan, and the scan without its skip, as a function of it, route by route.

    Args:
        call: The call.

    Returns:
        Input (K, C, L), and a function from such a tensor to what each route puts at every position, (K, C, L).
    """
    args = {name: _plain(value) for name, value in call.args.items()}
    for skipped in ('D', 'z', 'initial_states'):
        if skipped in args:
            args[skipped] = None
    op = getattr(torch.ops.visionssm, call.op)
    signals, run = _ADAPTERS[call.op](op, args)
    fuse = call.fuse
    if fuse is None:
        return signals, run
    return signals, lambda x: fuse(run(x).unflatten(-1, call.size)).flatten(-2)


def _plain(value: Any) -> Any:
    """Return a tensor that autograd may save, in at least float32."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return value.clone()


def _on_sequence(op: Callable, args: Mapping[str, Any]) -> Signals:
    """`selective_scan`: (1, D, L)."""
    return args['u'], lambda x: op(**{**args, 'u': x})


def _on_heads(op: Callable, args: Mapping[str, Any]) -> Signals:
    """`ssd` and `nc_ssd`: (1, L, M, P)."""
    heads = args['x'].shape[2:]

    def run(x: torch.Tensor) -> torch.Tensor:
        return op(**{**args, 'x': x.transpose(1, 2).unflatten(2, heads)}).flatten(2).transpose(1, 2)

    return args['x'].flatten(2).transpose(1, 2).contiguous(), run


def _on_wavefront(op: Callable, args: Mapping[str, Any]) -> Signals:
    """`wavefront_scan_2d`: (1, D, H, W)."""
    size = args['u'].shape[2:]
    return args['u'].flatten(2), lambda x: op(**{**args, 'u': x.unflatten(2, size)}).flatten(2)


def _on_routes(op: Callable, args: Mapping[str, Any]) -> Signals:
    """`selective_scan_2d` and `ssd_2d`: (M, [K,] D or heads, H, W), with M lines that are scanned by themselves."""
    name = 'u' if 'u' in args else 'x'
    x, routes = args[name], args['delta' if 'delta' in args else 'dt'].shape[1]
    inner = x.ndim - 3 if name == 'u' else x.ndim - 4
    if inner == 1:
        x = x[:, None].expand(-1, routes, *x.shape[1:])
    lines, channels, size = len(x), x.shape[2:-2], x.shape[-2:]
    place_by_step = args['merge'] == 'step'
    apart = {**args, 'merge': 'none'}

    def run(signals: torch.Tensor) -> torch.Tensor:
        by_line = signals.unflatten(2, (lines, -1)).permute(2, 0, 1, 3)  # (M, K, C, H * W)
        y = op(**{**apart, name: by_line.unflatten(3, size).unflatten(2, channels)})
        y = y.flatten(2, -3)
        # where steps are added up and not pixels, what a route computes at its step l stands at place l
        y = torch.ops.visionssm.cross_scan(y, args['routes'], args['table']) if place_by_step else y.flatten(-2)
        return y.permute(1, 2, 0, 3).flatten(2)

    return x.flatten(2, -3).flatten(-2).permute(1, 2, 0, 3).flatten(2), run


_ADAPTERS: Mapping[str, Callable[[Callable, Mapping[str, Any]], Signals]] = {
    'selective_scan': _on_sequence, 'selective_scan_2d': _on_routes, 'ssd': _on_heads, 'ssd_2d': _on_routes,
    'nc_ssd': _on_heads, 'wavefront_scan_2d': _on_wavefront}
assert _ADAPTERS.keys() == OPS.keys()
