"""The routed selective scan in Triton, forward and backward.

One program serves one (batch item, route, block of channels within a group of B and C) and walks the route chunk by
chunk. Within a chunk the recurrence of one state index at a time is an associative scan over a (BLOCK_D, CHUNK) tile,
so B and C are read once for a whole block of channels and the backward pass needs no stored states but checkpoints.
Pixels are addressed through the route: no map is permuted or copied. Sums over programs (B and C over the blocks of a
group, parameters over chunks and batch, merged routes) go through partial buffers that the launcher adds up in a fixed
order, so results are the same in every run. Outputs and gradients lie as their maps do; a stride of one is a constant
of the kernel, so that neighbouring threads follow that axis. The product of the decays of a chunk must be finite, which
a positive A with large steps can break. The meaning of arguments and results stands in `visionssm_kernels._dispatch`.
"""
# Triton reads annotations as types of kernel arguments: kernels carry only those that it needs
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"
import math
from typing import Any

import torch
import triton
import triton.language as tl

from .._dispatch import CHUNK, empty_map

TILE_BYTES = 4096
"""Bytes of one full (BLOCK_D, CHUNK) tile, 16 a thread: the dozen tiles of the backward pass then stay in registers."""
BYTES_PER_WARP = 512
LOG2E = tl.constexpr(math.log2(math.e))
"""Rates take this factor once: decays are then powers of two, which is what the device computes."""


@triton.jit
def _combine(decay, state, next_decay, next_state):
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def _combine_carried(decay, state, carried, next_decay, next_state, next_carried):
    # `carried` is the state without the input of its own step: the decay's gradient needs exactly this product, and
    # taking the input off the state again would cancel where states decay quickly
    moved = next_decay * state
    return decay * next_decay, moved + next_state, moved + next_carried


@triton.jit
def _softplus(x):
    # log1p(exp(x)); 1 + exp(x) loses the small steps that models start from, so those take the series of 2 artanh(s)
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    s = e / (2.0 + e)
    q = s * s
    tail = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q / 15))
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * tail)))
    return tl.where(x > 20.0, x, tl.where(e < 0.25, 2.0 * s * series, tl.log(1.0 + e)))


@triton.jit
def _pixels(index_ptr, k, t, L, HAS_INDEX: tl.constexpr, REVERSE: tl.constexpr):
    if HAS_INDEX:
        return tl.load(index_ptr + k * L + t, mask=t < L, other=0).to(tl.int64)
    elif REVERSE:
        return (L - 1 - t).to(tl.int64)
    else:
        return t.to(tl.int64)


@triton.jit
def _coefficient(constant_ptrs, map_ptrs, d_mask, t_mask, CONSTANT: tl.constexpr, ACC: tl.constexpr):
    # One state index of B or C: (BLOCK_D, 1) if constant over time, else (1, CHUNK)
    if CONSTANT:
        return tl.load(constant_ptrs, mask=d_mask, other=0.0).to(ACC)[:, None]
    else:
        return tl.load(map_ptrs, mask=t_mask, other=0.0).to(ACC)[None, :]


@triton.jit
def _scan_forward_kernel(
        u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, index_ptr,
        out_ptr, last_ptr, state_ptr,
        K, parts, parts_B, parts_C, blocks, part_dim, L, chunks,
        su_b, su_k, su_d, su_l, sd_b, sd_k, sd_d, sd_l, sz_b, sz_k, sz_d, sz_l, so_b, so_k, so_d, so_l,
        sB_b, sB_k, sB_g, sB_n: tl.int64, sB_l, sC_b, sC_k, sC_g, sC_n: tl.int64, sC_l,
        N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
        CONST_B: tl.constexpr, CONST_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
        HAS_INDEX: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    part = pid // blocks % parts
    k = pid // blocks // parts % K
    b = pid // blocks // parts // K
    offset = pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = offset < part_dim
    d = part * part_dim + offset
    row = k * (parts * part_dim) + d  # in parameters (K, D)
    lane = b * (K * parts * part_dim) + row  # in (B, K, D)
    cols = tl.arange(0, CHUNK)
    first = (cols == 0)[None, :]
    final = (cols == CHUNK - 1)[None, :]

    chunk = 0
    while chunk < chunks:
        # a block, because the interpreter of Triton 3.9 cannot combine a scalar comparison with a mask
        here = offset * 0 + chunk
        t = chunk * CHUNK + cols
        t_mask = t < L
        mask = d_mask[:, None] & t_mask[None, :]
        pixel = _pixels(index_ptr, k, t, L, HAS_INDEX, REVERSE)
        u_ptrs = u_ptr + b * su_b + k * su_k + d[:, None] * su_d + pixel[None, :] * su_l
        delta_ptrs = delta_ptr + b * sd_b + k * sd_k + d[:, None] * sd_d + pixel[None, :] * sd_l
        u = tl.load(u_ptrs, mask=mask, other=0.0).to(ACC)
        step = tl.load(delta_ptrs, mask=mask, other=0.0).to(ACC)
        if HAS_BIAS:
            step += tl.load(bias_ptr + row, mask=d_mask, other=0.0)[:, None]
        if SOFTPLUS:
            step = _softplus(step)
        # Beyond the end the step is 0, hence the decay 1: the last column of a ragged chunk still holds the final state
        step = tl.where(mask, step, 0.0)
        drive = step * u
        y = tl.zeros([BLOCK_D, CHUNK], dtype=ACC)
        if HAS_D:
            y += tl.load(D_ptr + row, mask=d_mask, other=0.0)[:, None] * u
        B_ptrs = B_ptr + b * sB_b + k * sB_k + part // parts_B * sB_g + pixel * sB_l
        C_ptrs = C_ptr + b * sC_b + k * sC_k + part // parts_C * sC_g + pixel * sC_l
        for n in range(N):
            A_n = tl.load(A_ptr + row * N + n, mask=d_mask, other=0.0)[:, None]
            B_n = _coefficient(B_ptr + row * N + n, B_ptrs + n * sB_n, d_mask, t_mask, CONST_B, ACC)
            C_n = _coefficient(C_ptr + row * N + n, C_ptrs + n * sC_n, d_mask, t_mask, CONST_C, ACC)
            state_ptrs = state_ptr + (lane * chunks + chunk) * N + n
            start = tl.load(state_ptrs, mask=d_mask & (here > 0), other=0.0)
            tl.store(state_ptrs, start, mask=d_mask & (here == 0))
            decay = tl.exp2(step * (A_n * LOG2E))
            x = drive * B_n
            _, h = tl.associative_scan((decay, tl.where(first, x + decay * start[:, None], x)), 1, _combine)
            y += h * C_n
            end = tl.sum(tl.where(final, h, 0.0), 1)
            tl.store(state_ptrs + N, end, mask=d_mask & (here + 1 < chunks))
            tl.store(last_ptr + lane * N + n, end, mask=d_mask & (here + 1 == chunks))
        if HAS_Z:
            z_ptrs = z_ptr + b * sz_b + k * sz_k + d[:, None] * sz_d + pixel[None, :] * sz_l
            z = tl.load(z_ptrs, mask=mask, other=0.0).to(ACC)
            y = y * z / (1.0 + tl.exp(-z))
        tl.store(out_ptr + b * so_b + k * so_k + d[:, None] * so_d + pixel[None, :] * so_l, y, mask=mask)
        # States pass from chunk to chunk through memory, perhaps to another thread
        tl.debug_barrier()
        chunk += 1


@triton.jit
def _scan_backward_kernel(
        u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, index_ptr, dout_ptr, state_ptr,
        du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr, dstate_ptr,
        K, parts, parts_B, parts_C, blocks, part_dim, L, chunks,
        su_b, su_k, su_d, su_l, sd_b, sd_k, sd_d, sd_l, sz_b, sz_k, sz_d, sz_l, so_b, so_k, so_d, so_l,
        sdu_b, sdu_k, sdu_d, sdu_l, sdd_b, sdd_k, sdd_d, sdd_l, sdz_b, sdz_k, sdz_d, sdz_l,
        sB_b, sB_k, sB_g, sB_n: tl.int64, sB_l, sC_b, sC_k, sC_g, sC_n: tl.int64, sC_l,
        N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
        CONST_B: tl.constexpr, CONST_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
        HAS_INDEX: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    part = pid // blocks % parts
    k = pid // blocks // parts % K
    b = pid // blocks // parts // K
    offset = pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = offset < part_dim
    d = part * part_dim + offset
    row = k * (parts * part_dim) + d
    lane = b * (K * parts * part_dim) + row
    cols = tl.arange(0, CHUNK)
    first = (cols == 0)[None, :]
    final = (cols == CHUNK - 1)[None, :]
    dD = tl.zeros([BLOCK_D], dtype=ACC)
    dbias = tl.zeros([BLOCK_D], dtype=ACC)

    chunk = chunks - 1
    while chunk >= 0:
        t = chunk * CHUNK + cols
        t_mask = t < L
        mask = d_mask[:, None] & t_mask[None, :]
        next_mask = d_mask[:, None] & (t + 1 < L)[None, :]
        pixel = _pixels(index_ptr, k, t, L, HAS_INDEX, REVERSE)
        next_pixel = _pixels(index_ptr, k, t + 1, L, HAS_INDEX, REVERSE)
        u_ptrs = u_ptr + b * su_b + k * su_k + d[:, None] * su_d + pixel[None, :] * su_l
        dout_ptrs = dout_ptr + b * so_b + k * so_k + d[:, None] * so_d + pixel[None, :] * so_l
        delta_rows = delta_ptr + b * sd_b + k * sd_k + d[:, None] * sd_d
        u = tl.load(u_ptrs, mask=mask, other=0.0).to(ACC)
        dy = tl.load(dout_ptrs, mask=mask, other=0.0).to(ACC)
        raw = tl.load(delta_rows + pixel[None, :] * sd_l, mask=mask, other=0.0).to(ACC)
        next_step = tl.load(delta_rows + next_pixel[None, :] * sd_l, mask=next_mask, other=0.0).to(ACC)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + row, mask=d_mask, other=0.0)[:, None]
            raw += bias
            next_step += bias
        step = raw
        if SOFTPLUS:
            step = _softplus(raw)
            next_step = _softplus(next_step)
        step = tl.where(mask, step, 0.0)
        next_step = tl.where(next_mask, next_step, 0.0)
        drive = step * u
        y = tl.zeros([BLOCK_D, CHUNK], dtype=ACC)
        if HAS_Z:
            z_ptrs = z_ptr + b * sz_b + k * sz_k + d[:, None] * sz_d + pixel[None, :] * sz_l
            z = tl.load(z_ptrs, mask=mask, other=0.0).to(ACC)
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            dgate = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
            dy = dy * z * sigmoid
        ddrive = tl.zeros([BLOCK_D, CHUNK], dtype=ACC)
        dstep = tl.zeros([BLOCK_D, CHUNK], dtype=ACC)
        B_ptrs = B_ptr + b * sB_b + k * sB_k + part // parts_B * sB_g + pixel * sB_l
        C_ptrs = C_ptr + b * sC_b + k * sC_k + part // parts_C * sC_g + pixel * sC_l
        for n in range(N):
            at = (lane * chunks + chunk) * N + n
            A_n = tl.load(A_ptr + row * N + n, mask=d_mask, other=0.0)[:, None]
            B_n = _coefficient(B_ptr + row * N + n, B_ptrs + n * sB_n, d_mask, t_mask, CONST_B, ACC)
            C_n = _coefficient(C_ptr + row * N + n, C_ptrs + n * sC_n, d_mask, t_mask, CONST_C, ACC)
            start = tl.load(state_ptr + at, mask=d_mask, other=0.0)[:, None]
            rate = A_n * LOG2E
            decay = tl.exp2(step * rate)
            x = drive * B_n
            carried = tl.where(first, decay * start, 0.0)
            _, h, carried = tl.associative_scan((decay, x + carried, carried), 1, _combine_carried)
            # dh_t = C_t dy_t + decay_{t+1} dh_{t+1}; what crosses chunks is read from one slot and written to the
            # other, as only the barrier at the end of a chunk orders the threads
            slots = dstate_ptr + lane * (2 * N) + n
            end = tl.load(slots + (chunks - 1 - chunk) % 2 * N, mask=d_mask, other=0.0)[:, None]
            next_decay = tl.exp2(next_step * rate)
            dh = dy * C_n
            _, dh = tl.associative_scan(
                (next_decay, tl.where(final, dh + next_decay * end, dh)), 1, _combine, reverse=True)
            tl.store(slots + (chunks - chunk) % 2 * N, tl.sum(tl.where(first, dh, 0.0), 1), mask=d_mask)
            dlog_decay = dh * carried
            ddrive += dh * B_n
            dstep += dlog_decay * A_n
            tl.store(dA_ptr + at, tl.sum(dlog_decay * step, 1), mask=d_mask)
            if HAS_Z:
                y += h * C_n
            if CONST_B:
                tl.store(dB_ptr + at, tl.sum(dh * drive, 1), mask=d_mask)
            else:
                tl.store(dB_ptr + (pid * N + n) * L + pixel, tl.sum(dh * drive, 0), mask=t_mask)
            if CONST_C:
                tl.store(dC_ptr + at, tl.sum(dy * h, 1), mask=d_mask)
            else:
                tl.store(dC_ptr + (pid * N + n) * L + pixel, tl.sum(dy * h, 0), mask=t_mask)
        du = ddrive * step
        dstep += ddrive * u
        if HAS_D:
            skip = tl.load(D_ptr + row, mask=d_mask, other=0.0)[:, None]
            y += skip * u
            du += skip * dy
            dD += tl.sum(dy * u, 1)
        if HAS_Z:
            dz_ptrs = dz_ptr + b * sdz_b + k * sdz_k + d[:, None] * sdz_d + pixel[None, :] * sdz_l
            tl.store(dz_ptrs, dgate * y, mask=mask)
        if SOFTPLUS:
            dstep = tl.where(raw > 20.0, dstep, dstep / (1.0 + tl.exp(-raw)))
        dbias += tl.sum(tl.where(mask, dstep, 0.0), 1)
        tl.store(du_ptr + b * sdu_b + k * sdu_k + d[:, None] * sdu_d + pixel[None, :] * sdu_l, du, mask=mask)
        tl.store(ddelta_ptr + b * sdd_b + k * sdd_k + d[:, None] * sdd_d + pixel[None, :] * sdd_l, dstep, mask=mask)
        tl.debug_barrier()
        chunk -= 1
    if HAS_D:
        tl.store(dD_ptr + lane, dD, mask=d_mask)
    if HAS_BIAS:
        tl.store(dbias_ptr + lane, dbias, mask=d_mask)


def _geometry(delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> dict[str, int]:
    """Returns how the channels are shared out, as kernel arguments.

    A part is the widest run of channels that lies in one group of B and in one of C; `parts_B` parts are a group of B.
    """
    dim, length = delta.shape[2:]
    groups_b, groups_c = (x.shape[2] if x.ndim == 5 else 1 for x in (B, C))
    parts = math.lcm(groups_b, groups_c)
    block_d = min(triton.next_power_of_2(dim // parts), max(1, TILE_BYTES // (CHUNK * A.element_size())))
    return {
        'K': delta.shape[1], 'parts': parts, 'parts_B': parts // groups_b, 'parts_C': parts // groups_c,
        'blocks': triton.cdiv(dim // parts, block_d), 'part_dim': dim // parts,
        'L': length, 'chunks': triton.cdiv(length, CHUNK),
        'N': A.shape[-1], 'CHUNK': CHUNK, 'BLOCK_D': block_d,
    }


def _strides(name: str, axes: str, x: torch.Tensor | None) -> dict[str, int]:
    """Returns the strides of a map as kernel arguments, for example {'su_b': ...}; 0 along an axis of size one."""
    steps = [0] * len(axes)
    if x is not None:
        steps = [step if size > 1 else 0 for step, size in zip(x.stride(), x.shape, strict=True)]
    return {f's{name}_{axis}': step for axis, step in zip(axes, steps, strict=True)}


def sum_like(partial: torch.Tensor, axis: int, x: torch.Tensor, keepdim: bool = False) -> torch.Tensor:
    """Returns the sum of partial results over one axis, laid out as the map x, in their own dtype."""
    return torch.sum(partial, axis, keepdim=keepdim, out=torch.empty_like(x, dtype=partial.dtype))


def _launch(
        kernel: triton.JITFunction,
        pointers: dict[str, Any],
        geometry: dict[str, int],
        delta_softplus: bool,
        reverse: bool,
) -> None:
    """Starts one program for each (batch item, route, part, block of channels).

    Args:
        kernel: The forward or the backward kernel.
        pointers: Every tensor argument by its name in the kernel, without `_ptr`; None where absent.
        geometry: Sizes, see `_geometry`.
        delta_softplus: Applies softplus to the steps.
        reverse: Walks the natural order backwards.
    """
    strides = {}
    for short, name in (('u', 'u'), ('d', 'delta'), ('z', 'z'), ('o', 'out'), ('o', 'dout'), ('du', 'du'),
                        ('dd', 'ddelta'), ('dz', 'dz')):
        if name in pointers:
            strides.update(_strides(short, 'bkdl', pointers[name]))
    A, B, C, delta = pointers['A'], pointers['B'], pointers['C'], pointers['delta']
    strides.update(_strides('B', 'bkgnl', B if B.ndim == 5 else None))
    strides.update(_strides('C', 'bkgnl', C if C.ndim == 5 else None))
    programs = delta.shape[0] * geometry['K'] * geometry['parts'] * geometry['blocks']
    # Triton starts kernels on the current device, whatever the device of their arguments
    with torch.cuda.device_of(delta):
        kernel[(programs,)](
            **{f'{name}_ptr': x for name, x in pointers.items()}, **strides, **geometry,
            ACC=tl.float64 if A.dtype == torch.float64 else tl.float32,
            CONST_B=B.ndim == 3, CONST_C=C.ndim == 3, HAS_D=pointers['D'] is not None,
            HAS_Z=pointers['z'] is not None, HAS_BIAS=pointers['bias'] is not None,
            HAS_INDEX=pointers['index'] is not None, REVERSE=reverse, SOFTPLUS=delta_softplus,
            num_warps=max(1, geometry['BLOCK_D'] * CHUNK * A.element_size() // BYTES_PER_WARP), num_stages=1)


def forward(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        index: torch.Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        merge: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the scan; see `visionssm_kernels._dispatch`."""
    batch, routes, dim, length = delta.shape
    geometry = _geometry(delta, A, B, C)
    merge = merge and routes > 1
    out = empty_map(u, routes, A.dtype if merge else u.dtype)
    last_state = A.new_empty(batch, routes, dim, A.shape[-1])
    checkpoints = A.new_empty(batch, routes, dim, geometry['chunks'], A.shape[-1])
    B, C = (x.contiguous() if x.ndim == 3 else x for x in (B, C))
    pointers = {'u': u, 'delta': delta, 'A': A, 'B': B, 'C': C, 'D': D, 'z': z, 'bias': delta_bias, 'index': index,
                'out': out, 'last': last_state, 'state': checkpoints}
    _launch(_scan_forward_kernel, pointers, geometry, delta_softplus, reverse)
    if merge:
        out = torch.sum(out, 1, keepdim=True, out=empty_map(u, 1, A.dtype)).to(u.dtype)
    return out, last_state, checkpoints


def backward(
        dout: torch.Tensor,
        dlast_state: torch.Tensor | None,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        index: torch.Tensor | None,
        checkpoints: torch.Tensor,
        delta_softplus: bool,
        reverse: bool,
        merge: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the scan by the adjoint recurrence; see `visionssm_kernels._dispatch`."""
    batch, routes, dim, length = delta.shape
    geometry = _geometry(delta, A, B, C)
    B, C = (x.contiguous() if x.ndim == 3 else x for x in (B, C))
    shared = u.shape[1] < routes
    du = empty_map(u, routes, A.dtype) if shared else torch.empty_like(u)
    ddelta, dz = torch.empty_like(delta), None if z is None else torch.empty_like(z)
    dA = torch.empty_like(checkpoints)
    dB, dC = (torch.empty_like(checkpoints) if x.ndim == 3 else
              A.new_empty(batch, routes, geometry['parts'], geometry['blocks'], A.shape[-1], length) for x in (B, C))
    dD, dbias = (None if x is None else x.new_empty(batch, *x.shape) for x in (D, delta_bias))
    dstate = A.new_empty(batch, routes, dim, 2, A.shape[-1])
    dstate[..., 0, :] = 0 if dlast_state is None else dlast_state
    pointers = {'u': u, 'delta': delta, 'A': A, 'B': B, 'C': C, 'D': D, 'z': z, 'bias': delta_bias, 'index': index,
                'dout': dout, 'state': checkpoints, 'du': du, 'ddelta': ddelta, 'dA': dA, 'dB': dB, 'dC': dC, 'dD': dD,
                'dz': dz, 'dbias': dbias, 'dstate': dstate}
    _launch(_scan_backward_kernel, pointers, geometry, delta_softplus, reverse)
    dB, dC = (partial.sum((0, 3)) if x.ndim == 3 else sum_like(partial.view(*x.shape[:3], -1, *x.shape[3:]), 3, x)
              for partial, x in ((dB, B), (dC, C)))
    dD, dbias = (None if partial is None else partial.sum(0) for partial in (dD, dbias))
    return sum_like(du, 1, u, keepdim=True) if shared else du, ddelta, dA.sum((0, 3)), dB, dC, dD, dz, dbias
