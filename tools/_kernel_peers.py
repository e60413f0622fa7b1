"""What `benchmark_kernels.py` times beside the kernels of this package: definitions, other algorithms, other packages.

The plain definitions are what most packages fall back to on a CPU: exp(delta A) and delta B u as whole tensors with all
states, a Python loop over positions (over anti-diagonals of a map), and the backward pass of autograd.
"""
import dataclasses
import importlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from visionssm_kernels import cross_merge, cross_scan, selective_scan
from visionssm_kernels.nc_ssd.chunked import by_group

Tensors = dict[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]
Function = Callable[..., torch.Tensor | Outputs]
ROUTES = 4


def _as_they_are(inputs: Tensors, dout: torch.Tensor) -> tuple[Tensors, Outputs]:
    return inputs, (dout,)


def _one_output(outputs: Outputs, gradients: Tensors) -> tuple[torch.Tensor, Tensors]:
    return outputs[0], gradients


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What is timed.

    Attributes:
        function: Takes tensors by name, and returns its output or several.
        arrange: Inputs of the op and the gradient of its output to those of the function, in the layout that this has
            where it is used; outside of the time.
        restore: Outputs and gradients of the function to the output and the gradients of the op, to compare them.
        compared: It computes the same as the op.
        backend: Of this package's ops.
        compiles: Its first run may take long.
    """
    function: Function
    arrange: Callable[[Tensors, torch.Tensor], tuple[Tensors, Outputs]] = _as_they_are
    restore: Callable[[Outputs, Tensors], tuple[torch.Tensor, Tensors]] = _one_output
    compared: bool = True
    backend: str = 'auto'
    compiles: bool = False


def plain_scan(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        delta_bias: torch.Tensor,
) -> torch.Tensor:
    """The selective scan with whole (B, D, L, N) tensors and a loop over L, as in the reference of mamba_ssm."""
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum('bdl,dn->bdln', delta, A))
    drive = torch.einsum('bdl,bnl,bdl->bdln', delta, B, u)
    state = A.new_zeros(u.shape[0], *A.shape)
    ys = []
    for l in range(u.shape[-1]):
        state = decay[:, :, l] * state + drive[:, :, l]
        ys.append(torch.einsum('bdn,bn->bd', state, C[:, :, l]))
    return torch.stack(ys, dim=2) + u * D[:, None]


def plain_wavefront(
        u: torch.Tensor,
        delta_top: torch.Tensor,
        delta_left: torch.Tensor,
        A_top: torch.Tensor,
        A_left: torch.Tensor,
        B_top: torch.Tensor,
        B_left: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        delta_bias_top: torch.Tensor,
        delta_bias_left: torch.Tensor,
) -> torch.Tensor:
    """The two-axis scan with whole (B, D, N, H, W) tensors and a loop over anti-diagonals."""
    height, width = u.shape[2:]
    weight = torch.full((height, width), 0.5).to(u)
    weight[:, 0] = 0
    weight[0] = 1
    decays, drive = [], torch.zeros_like(u[:, :, None])
    for delta, bias, A, B, share in ((delta_left, delta_bias_left, A_left, B_left, weight),
                                     (delta_top, delta_bias_top, A_top, B_top, 1 - weight)):
        delta = F.softplus(delta + bias[:, None, None])[:, :, None]
        decays.append(share * torch.exp(delta * A[:, :, None, None]))
        drive = drive + share * delta * B[:, None] * u[:, :, None]
    state = u.new_zeros(*drive.shape[:3], height)
    ys, order = [], []
    for k in range(height + width - 1):
        i = torch.arange(max(0, k - width + 1), min(k, height - 1) + 1, device=u.device)
        at = (..., i, k - i)
        above = F.pad(state, (1, 0))[..., i]
        new = decays[0][at] * state[..., i] + decays[1][at] * above + drive[at]
        state = state.index_copy(-1, i, new)
        ys.append((new * C[:, None][at]).sum(2))
        order.append(i * width + k - i)
    y = torch.cat(ys, -1)[..., torch.cat(order).argsort()]
    return y.unflatten(-1, (height, width)) + u * D[:, None, None]


def plain_nc_ssd(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
) -> torch.Tensor:
    """The non-causal SSD by einsum, with B and C repeated for every head."""
    B, C = (matrix.repeat(1, 1, x.shape[2] // matrix.shape[2], 1) for matrix in (B, C))
    total = torch.einsum('blm,blmn,blmp->bmnp', -dt * A, B, x)
    return torch.einsum('blmn,bmnp->blmp', C, total) + D[:, None] * x


def plain_ssd(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        dt_bias: torch.Tensor,
        initial_states: torch.Tensor,
) -> torch.Tensor:
    """The scan of Mamba-2, one position after the other, with B and C repeated for every head."""
    B, C = (matrix.repeat_interleave(x.shape[2] // matrix.shape[2], 2) for matrix in (B, C))
    dt = F.softplus(dt + dt_bias)
    state, ys = initial_states, []
    for decay, drive, B_l, C_l in zip(*(t.unbind(1) for t in (torch.exp(dt * A), dt[..., None] * x, B, C))):
        state = decay[..., None, None] * state + drive[..., None] * B_l[:, :, None]
        ys.append((state @ C_l[..., None])[..., 0])
    return torch.stack(ys, 1) + D * x


def _linear_recurrence(decay: torch.Tensor, drive: torch.Tensor) -> torch.Tensor:
    """All states of s_l = decay_l s_(l-1) + drive_l over dimension 1, of which halves are solved first."""
    if drive.shape[1] == 1:
        return drive
    whole = drive.shape[1] // 2 * 2
    first, second = slice(0, whole, 2), slice(1, whole, 2)
    at_second = _linear_recurrence(decay[:, first] * decay[:, second],
                                   torch.addcmul(drive[:, second], decay[:, second], drive[:, first]))
    states = torch.empty_like(drive)
    states[:, 0] = drive[:, 0]
    states[:, second] = at_second
    later = states[:, 2::2]
    later.copy_(torch.addcmul(drive[:, 2::2], decay[:, 2::2], at_second[:, :later.shape[1]]))
    return states


class _ParallelScan(torch.autograd.Function):
    """The linear recurrence in 2 log L steps, work linear in L; its gradient is the same backwards."""

    @staticmethod
    def forward(ctx: Any, decay: torch.Tensor, drive: torch.Tensor) -> torch.Tensor:
        states = _linear_recurrence(decay, drive)
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decay, states = ctx.saved_tensors
        following = F.pad(decay[:, 1:], (0, 0, 0, 0, 0, 1))
        adjoint = _linear_recurrence(following.flip(1), gradient.flip(1)).flip(1)
        return F.pad(adjoint[:, 1:] * states[:, :-1], (0, 0, 0, 0, 1, 0)), adjoint


def parallel_scan(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        delta_bias: torch.Tensor,
) -> torch.Tensor:
    """The selective scan with whole (B, L, D, N) tensors and a parallel scan, as ports of Mamba to PyTorch have it."""
    delta = F.softplus(delta + delta_bias[:, None]).mT
    decay = torch.exp(delta[..., None] * A)
    drive = (delta * u.mT)[..., None] * B.mT[:, :, None]
    y = (_ParallelScan.apply(decay, drive) @ C.mT[..., None])[..., 0]
    return y.mT + u * D[:, None]


def in_float32(function: Function) -> Function:
    """Returns a function that widens what is shorter than float32, and rounds its output at the end."""
    def wide(**inputs: torch.Tensor) -> torch.Tensor:
        short = (torch.bfloat16, torch.float16)
        out = function(**{name: x.float() if x.dtype in short else x for name, x in inputs.items()})
        return out.to(next(iter(inputs.values())).dtype)

    return wide


def compiled(function: Function) -> Contestant:
    """Returns what `torch.compile` makes of a function."""
    torch._dynamo.reset()
    # else the backward pass is compiled where no time limit reaches it
    torch._functorch.config.force_non_lazy_backward_lowering = True
    return Contestant(torch.compile(in_float32(function), dynamic=False), compiles=True)


class _OutOfTime(BaseException):
    """Not an Exception: compilers catch those and go on."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Ends what runs in the main thread of a system with alarms by a TimeoutError."""
    if not hasattr(signal, 'setitimer') or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except _OutOfTime:
        raise TimeoutError(f'{what} took more than {seconds:g} s') from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _borrowed(module: str, name: str) -> Function:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(f'mamba_ssm is not installed, or does not load: {error}') from error


def mamba_scan(shape: tuple[int, ...]) -> Contestant:
    """The CUDA kernel of mamba_ssm."""
    scan = _borrowed('mamba_ssm.ops.selective_scan_interface', 'selective_scan_fn')
    return Contestant(lambda **inputs: scan(**inputs, delta_softplus=True))


def mamba_ssd(shape: tuple[int, ...]) -> Contestant:
    """The Triton kernels of mamba_ssm, in chunks of the length that its layer has."""
    scan = _borrowed('mamba_ssm.ops.triton.ssd_combined', 'mamba_chunk_scan_combined')
    return Contestant(lambda **inputs: scan(**inputs, chunk_size=256, dt_softplus=True))


def _scan_grouped(**inputs: torch.Tensor) -> torch.Tensor:
    return selective_scan(**inputs, delta_softplus=True)


class _ReadCross(torch.autograd.Function):
    """(B, D, H, W) -> (B, 4 D, L): rows, columns, and both backwards, one copy each."""

    @staticmethod
    def forward(ctx: Any, maps: torch.Tensor) -> torch.Tensor:
        ctx.size = maps.shape[2:]
        xs = maps.new_empty(maps.shape[0], ROUTES, maps.shape[1], maps[0, 0].numel())
        xs[:, 0] = maps.flatten(2)
        xs[:, 1] = maps.mT.flatten(2)
        xs[:, 2:] = xs[:, :2].flip(-1)
        return xs.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _MergeCross.apply(gradient, *ctx.size)


class _MergeCross(torch.autograd.Function):
    """(B, 4 D, L) -> (B, D, H, W): the transpose, which sums on every pixel."""

    @staticmethod
    def forward(ctx: Any, ys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        ys = ys.unflatten(1, (ROUTES, -1))
        rows, columns = (ys[:, :2] + ys[:, 2:].flip(-1)).unbind(1)
        return rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).mT

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _ReadCross.apply(gradient), None, None


def cross_pipeline(shape: tuple[int, ...], scan: Function = _scan_grouped) -> Contestant:
    """Copies of the map in route order, one scan with a group of B and C for each route, and the merge.

    Steps, B and C are made from these copies where the pipeline is used, so they have route order from the start.
    """
    size = shape[2:4]

    def run(u: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return _MergeCross.apply(scan(u=_ReadCross.apply(u), **inputs), *size)

    def arrange(inputs: Tensors, dout: torch.Tensor) -> tuple[Tensors, Outputs]:
        ordered = {name: cross_scan(inputs[name]) for name in ('delta', 'B', 'C')}
        return {**inputs, **ordered, 'delta': ordered['delta'].flatten(1, 2)}, (dout,)

    def restore(outputs: Outputs, gradients: Tensors) -> tuple[torch.Tensor, Tensors]:
        ordered = {name: gradients[name] for name in ('delta', 'B', 'C') if name in gradients}
        if ordered:
            ordered['delta'] = ordered['delta'].unflatten(1, (ROUTES, -1))
        return outputs[0], gradients | {name: cross_merge(x, merge='none', size=size) for name, x in ordered.items()}

    return Contestant(run, arrange, restore)


def mamba_pipeline(shape: tuple[int, ...]) -> Contestant:
    """The same with the CUDA kernel of mamba_ssm."""
    return cross_pipeline(shape, mamba_scan(shape).function)


def four_scans(shape: tuple[int, ...]) -> Contestant:
    """Four scans over inputs that have route order already, and no merge: what four routes cost at least.

    Their channels are innermost where those of the map are.
    """
    names = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
    maps = ('u', 'delta', 'B', 'C')

    def run(**inputs: torch.Tensor) -> Outputs:
        return tuple(_scan_grouped(**{name: inputs[f'{name}{k}'] for name in names}) for k in range(ROUTES))

    def arrange(inputs: Tensors, dout: torch.Tensor) -> tuple[Tensors, Outputs]:
        channels_last = inputs['u'].stride(-3) < inputs['u'].stride(-1)

        def lay_out(part: torch.Tensor) -> torch.Tensor:
            return part.mT.contiguous().mT if channels_last and part.ndim == 3 else part.contiguous()

        parts = {name: cross_scan(x).unbind(1) if name in maps else x.chunk(ROUTES) for name, x in inputs.items()}
        return ({f'{name}{k}': lay_out(part) for name, routes in parts.items() for k, part in enumerate(routes)},
                tuple(map(lay_out, cross_scan(dout).unbind(1))))

    def restore(outputs: Outputs, gradients: Tensors) -> tuple[torch.Tensor, Tensors]:
        found = {}
        for name in names if gradients else ():
            parts = [gradients[f'{name}{k}'] for k in range(ROUTES)]
            found[name] = (cross_merge(torch.stack(parts, 1), merge='sum' if name == 'u' else 'none', size=shape[2:4])
                           if name in maps else torch.cat(parts))
        return cross_merge(torch.stack(outputs, 1), size=shape[2:4]), found

    return Contestant(run, arrange, restore)


def matmuls(shape: tuple[int, ...]) -> Contestant:
    """The two matrix products of a non-causal SSD alone (six with the backward pass), on inputs laid out for them."""
    def run(x: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        return torch.bmm(C, torch.bmm(B.mT, x))  # (B * G, L, M / G * P); `matmul` would look for these shapes first

    def arrange(inputs: Tensors, dout: torch.Tensor) -> tuple[Tensors, Outputs]:
        groups = inputs['B'].shape[2]
        weighted = (-inputs['dt'] * inputs['A'])[..., None] * inputs['x']
        maps = {'x': weighted.to(dout.dtype), 'B': inputs['B'], 'C': inputs['C']}
        return ({name: by_group(x, groups).contiguous() for name, x in maps.items()},
                (by_group(dout, groups).contiguous(),))

    return Contestant(run, arrange, compared=False)


def attention(batch: int, heads: int, length: int, width: int, causal: bool) -> Contestant:
    """PyTorch's fused attention (FlashAttention on GPUs that have it) over as many positions and channels."""
    def arrange(inputs: Tensors, dout: torch.Tensor) -> tuple[Tensors, Outputs]:
        q, k, v, gradient = (dout.new_empty(batch, heads, length, width).normal_() for _ in range(4))
        return {'query': q, 'key': k, 'value': v}, (gradient,)

    def run(**inputs: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(**inputs, is_causal=causal)

    return Contestant(run, arrange, compared=False)


def attention_over_channels(shape: tuple[int, ...]) -> Contestant:
    """Attention for (B, D, L, N) and (B, D, H, W, N), D channels in heads of at most 64."""
    width = math.gcd(shape[1], 64)
    return attention(shape[0], shape[1] // width, math.prod(shape[2:-1]), width, True)
