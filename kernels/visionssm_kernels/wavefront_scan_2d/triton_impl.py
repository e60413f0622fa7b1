"""The wavefront scan in Triton, forward and backward.

A row is a one-dimensional linear recurrence along its columns whose input holds the states of the row above, so a
program walks the rows and solves each by an associative scan over a (BLOCK_D, BLOCK_N, WIDTH) tile. The states of the
row above stay with it. Wide maps are cut along the states: such programs write partial results. The backward pass takes
a band of rows at a time, recomputes its states from the checkpoint into scratch memory, and walks the rows up. Sums
over programs go through partial buffers that the launcher adds up in a fixed order, so results are the same in every
run. Outputs and gradients lie as their maps do. The meaning of arguments and results stands in `reference`.
"""
# Triton reads annotations as types of kernel arguments: kernels carry only those that it needs
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl

from ..selective_scan.triton_impl import LOG2E, _combine, _softplus, _strides, sum_like
from .reference import ROWS

TILE_BYTES = 4096
"""Bytes of one full tile, 16 a thread: the tiles of the backward pass then stay in registers."""
BYTES_PER_WARP = 512
GROUP = 16
"""Channels that share one partial buffer of the gradients of B and C."""


@triton.jit
def _steps(ptrs, bias_ptr, d, mask, d_mask, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ACC: tl.constexpr):
    # Raw and finished steps of a row, (BLOCK_D, WIDTH); zero outside the map
    raw = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + d, mask=d_mask, other=0.0)[:, None]
    step = raw
    if SOFTPLUS:
        step = _softplus(raw)
    return raw, tl.where(mask, step, 0.0)


@triton.jit
def _next_row(above, u, top, left, rate_top, rate_left, B_top, B_left, from_top_weight, from_left_weight):
    # States of a row, (BLOCK_D, BLOCK_N, WIDTH), from those of the row above it; rates are those of powers of two
    x = tl.exp2(top[:, None, :] * rate_top) * from_top_weight[None, None, :] * above
    x += (from_top_weight[None, :] * top * u)[:, None, :] * B_top[None]
    x += (from_left_weight[None, :] * left * u)[:, None, :] * B_left[None]
    decay = tl.exp2(left[:, None, :] * rate_left) * from_left_weight[None, None, :]
    _, states = tl.associative_scan((decay, x), 2, _combine)
    return states


@triton.jit
def _left_weight(i, w, ACC: tl.constexpr):
    # Weight of the step from the left, (WIDTH,): 1 in row 0, 0 in column 0 of the others, else 1/2
    return tl.where(i == 0, 1.0, tl.where(w == 0, 0.0, 0.5)).to(ACC)


@triton.jit
def _wavefront_forward_kernel(
        u_ptr, delta_top_ptr, delta_left_ptr, A_top_ptr, A_left_ptr, B_top_ptr, B_left_ptr, C_ptr, D_ptr, bias_top_ptr,
        bias_left_ptr, out_ptr, state_ptr,
        blocks, parts, subs, dim, height, width, marks,
        su_b, su_d, su_h: tl.int64, su_w, st_b, st_d, st_h: tl.int64, st_w, sl_b, sl_d, sl_h: tl.int64, sl_w,
        so_p, so_b, so_d, so_h: tl.int64, so_w,
        sBt_b, sBt_n, sBt_h: tl.int64, sBt_w, sBl_b, sBl_n, sBl_h: tl.int64, sBl_w, sC_b, sC_n, sC_h: tl.int64, sC_w,
        N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MARK: tl.constexpr,
        ACC: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS_TOP: tl.constexpr, HAS_BIAS_LEFT: tl.constexpr,
        REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    part = pid % parts
    b = pid // parts // blocks
    d = pid // parts % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    w = tl.arange(0, WIDTH)
    d_mask, n_mask, w_mask = d < dim, n < N, w < width
    mask = d_mask[:, None] & w_mask[None, :]
    matrix_mask = n_mask[:, None] & w_mask[None, :]
    rates_mask = d_mask[:, None, None] & n_mask[None, :, None]
    tile_mask = rates_mask & w_mask[None, None, :]
    rates = d[:, None, None] * N + n[None, :, None]
    rate_top = tl.load(A_top_ptr + rates, mask=rates_mask, other=0.0) * LOG2E
    rate_left = tl.load(A_left_ptr + rates, mask=rates_mask, other=0.0) * LOG2E
    col = w
    if REVERSE:
        col = width - 1 - w
    states = tl.zeros([BLOCK_D, BLOCK_N, WIDTH], dtype=ACC)

    i = 0
    while i < height:
        row = i
        if REVERSE:
            row = height - 1 - i
        mark_ptrs = state_ptr + ((b * marks + i // MARK) * N + n[None, :, None]) * (width * dim)
        mark_ptrs += w[None, None, :] * dim + d[:, None, None]
        tl.store(mark_ptrs, states, mask=tile_mask & (i % MARK == 0))
        u = tl.load(u_ptr + b * su_b + row * su_h + d[:, None] * su_d + col[None, :] * su_w,
                    mask=mask, other=0.0).to(ACC)
        _, top = _steps(
            delta_top_ptr + b * st_b + row * st_h + d[:, None] * st_d + col[None, :] * st_w, bias_top_ptr, d, mask,
            d_mask, HAS_BIAS_TOP, SOFTPLUS, ACC)
        _, left = _steps(
            delta_left_ptr + b * sl_b + row * sl_h + d[:, None] * sl_d + col[None, :] * sl_w, bias_left_ptr, d, mask,
            d_mask, HAS_BIAS_LEFT, SOFTPLUS, ACC)
        B_top = tl.load(B_top_ptr + b * sBt_b + row * sBt_h + n[:, None] * sBt_n + col[None, :] * sBt_w,
                        mask=matrix_mask, other=0.0).to(ACC)
        B_left = tl.load(B_left_ptr + b * sBl_b + row * sBl_h + n[:, None] * sBl_n + col[None, :] * sBl_w,
                         mask=matrix_mask, other=0.0).to(ACC)
        C = tl.load(C_ptr + b * sC_b + row * sC_h + n[:, None] * sC_n + col[None, :] * sC_w,
                    mask=matrix_mask, other=0.0).to(ACC)
        weight = _left_weight(i, w, ACC)
        states = _next_row(states, u, top, left, rate_top, rate_left, B_top, B_left, 1.0 - weight, weight)
        y = tl.sum(states * C[None], 1)
        if HAS_D:
            y += tl.where(part == 0, tl.load(D_ptr + d, mask=d_mask, other=0.0), 0.0)[:, None] * u
        out_ptrs = out_ptr + part * so_p + b * so_b + row * so_h + d[:, None] * so_d + col[None, :] * so_w
        tl.store(out_ptrs, y, mask=mask)
        i += 1


@triton.jit
def _wavefront_backward_kernel(
        u_ptr, delta_top_ptr, delta_left_ptr, A_top_ptr, A_left_ptr, B_top_ptr, B_left_ptr, C_ptr, D_ptr, bias_top_ptr,
        bias_left_ptr, dout_ptr, state_ptr, scratch_ptr, du_ptr, dtop_ptr, dleft_ptr, dA_top_ptr, dA_left_ptr,
        dB_top_ptr, dB_left_ptr, dC_ptr,
        blocks, parts, subs, dim, height, width, marks,
        su_b, su_d, su_h: tl.int64, su_w, st_b, st_d, st_h: tl.int64, st_w, sl_b, sl_d, sl_h: tl.int64, sl_w,
        so_b, so_d, so_h: tl.int64, so_w, sdu_p, sdu_b, sdu_d, sdu_h: tl.int64, sdu_w,
        sdt_p, sdt_b, sdt_d, sdt_h: tl.int64, sdt_w, sdl_p, sdl_b, sdl_d, sdl_h: tl.int64, sdl_w,
        sBt_b, sBt_n, sBt_h: tl.int64, sBt_w, sBl_b, sBl_n, sBl_h: tl.int64, sBl_w, sC_b, sC_n, sC_h: tl.int64, sC_w,
        N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MARK: tl.constexpr,
        ACC: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS_TOP: tl.constexpr, HAS_BIAS_LEFT: tl.constexpr,
        REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    part = pid % parts
    group = pid // parts % blocks
    b = pid // parts // blocks
    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    w = tl.arange(0, WIDTH)
    n_mask, w_mask = n < N, w < width
    matrix_mask = n_mask[:, None] & w_mask[None, :]
    col = w
    next_col = w + 1
    if REVERSE:
        col = width - 1 - w
        next_col = width - 2 - w
    lanes = tl.arange(0, BLOCK_D)[:, None, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    SLOT: tl.constexpr = BLOCK_D * BLOCK_N * WIDTH
    scratch = scratch_ptr + pid * ((MARK + 1) * SLOT) + lanes * WIDTH + w[None, None, :]

    sub = 0
    while sub < subs:
        d = (group * subs + sub) * BLOCK_D + tl.arange(0, BLOCK_D)
        d_mask = d < dim
        map_mask = d_mask[:, None] & w_mask[None, :]
        next_map_mask = d_mask[:, None] & (w + 1 < width)[None, :]
        rates_mask = d_mask[:, None, None] & n_mask[None, :, None]
        tile_mask = rates_mask & w_mask[None, None, :]
        rates = d[:, None, None] * N + n[None, :, None]
        A_top = tl.load(A_top_ptr + rates, mask=rates_mask, other=0.0)
        A_left = tl.load(A_left_ptr + rates, mask=rates_mask, other=0.0)
        rate_top, rate_left = A_top * LOG2E, A_left * LOG2E
        u_rows = u_ptr + b * su_b + d[:, None] * su_d + col[None, :] * su_w
        dout_rows = dout_ptr + b * so_b + d[:, None] * so_d + col[None, :] * so_w
        top_rows = delta_top_ptr + b * st_b + d[:, None] * st_d + col[None, :] * st_w
        left_rows = delta_left_ptr + b * sl_b + d[:, None] * sl_d + col[None, :] * sl_w
        next_left_rows = delta_left_ptr + b * sl_b + d[:, None] * sl_d + next_col[None, :] * sl_w
        du_rows = du_ptr + part * sdu_p + b * sdu_b + d[:, None] * sdu_d + col[None, :] * sdu_w
        dtop_rows = dtop_ptr + part * sdt_p + b * sdt_b + d[:, None] * sdt_d + col[None, :] * sdt_w
        dleft_rows = dleft_ptr + part * sdl_p + b * sdl_b + d[:, None] * sdl_d + col[None, :] * sdl_w
        B_top_rows = B_top_ptr + b * sBt_b + n[:, None] * sBt_n + col[None, :] * sBt_w
        B_left_rows = B_left_ptr + b * sBl_b + n[:, None] * sBl_n + col[None, :] * sBl_w
        C_rows = C_ptr + b * sC_b + n[:, None] * sC_n + col[None, :] * sC_w
        carry = tl.zeros([BLOCK_D, BLOCK_N, WIDTH], dtype=ACC)
        dA_top = tl.zeros([BLOCK_D, BLOCK_N], dtype=ACC)
        dA_left = tl.zeros([BLOCK_D, BLOCK_N], dtype=ACC)

        mark = marks - 1
        while mark >= 0:
            mark_ptrs = state_ptr + ((b * marks + mark) * N + n[None, :, None]) * (width * dim)
            states = tl.load(mark_ptrs + w[None, None, :] * dim + d[:, None, None], mask=tile_mask, other=0.0)
            r = 0
            while r < MARK:
                i = mark * MARK + r
                row = i
                if REVERSE:
                    row = height - 1 - i
                mask = map_mask & (i < height)
                tl.store(scratch + r * SLOT, states)
                u = tl.load(u_rows + row * su_h, mask=mask, other=0.0).to(ACC)
                _, top = _steps(top_rows + row * st_h, bias_top_ptr, d, mask, d_mask, HAS_BIAS_TOP, SOFTPLUS, ACC)
                _, left = _steps(left_rows + row * sl_h, bias_left_ptr, d, mask, d_mask, HAS_BIAS_LEFT, SOFTPLUS, ACC)
                B_mask = matrix_mask & (i < height)
                B_top = tl.load(B_top_rows + row * sBt_h, mask=B_mask, other=0.0).to(ACC)
                B_left = tl.load(B_left_rows + row * sBl_h, mask=B_mask, other=0.0).to(ACC)
                weight = _left_weight(i, w, ACC)
                states = _next_row(states, u, top, left, rate_top, rate_left, B_top, B_left, 1.0 - weight, weight)
                r += 1
            tl.store(scratch + MARK * SLOT, states)
            # Neighbours are read back by other threads than those that wrote them
            tl.debug_barrier()
            r = MARK - 1
            while r >= 0:
                i = mark * MARK + r
                row = i
                if REVERSE:
                    row = height - 1 - i
                inside = i < height
                mask = map_mask & inside
                B_mask = matrix_mask & inside
                u = tl.load(u_rows + row * su_h, mask=mask, other=0.0).to(ACC)
                dy = tl.load(dout_rows + row * so_h, mask=mask, other=0.0).to(ACC)
                raw_top, top = _steps(top_rows + row * st_h, bias_top_ptr, d, mask, d_mask, HAS_BIAS_TOP, SOFTPLUS, ACC)
                raw_left, left = _steps(
                    left_rows + row * sl_h, bias_left_ptr, d, mask, d_mask, HAS_BIAS_LEFT, SOFTPLUS, ACC)
                _, next_left = _steps(
                    next_left_rows + row * sl_h, bias_left_ptr, d, next_map_mask & inside, d_mask, HAS_BIAS_LEFT,
                    SOFTPLUS, ACC)
                B_top = tl.load(B_top_rows + row * sBt_h, mask=B_mask, other=0.0).to(ACC)
                B_left = tl.load(B_left_rows + row * sBl_h, mask=B_mask, other=0.0).to(ACC)
                C = tl.load(C_rows + row * sC_h, mask=B_mask, other=0.0).to(ACC)
                left_weight = _left_weight(i, w, ACC)
                top_weight = 1.0 - left_weight
                # dh_j = C_j dy_j + what comes from the row below and from the pixel to the right
                next_weight = _left_weight(i, w + 1, ACC)
                next_decay = tl.exp2(next_left[:, None, :] * rate_left) * next_weight[None, None, :]
                _, dh = tl.associative_scan((next_decay, dy[:, None, :] * C[None] + carry), 2, _combine, reverse=True)
                states = tl.load(scratch + (r + 1) * SLOT)
                dC = tl.sum(dy[:, None, :] * states, 0)
                before = tl.load(scratch + (r + 1) * SLOT - 1, mask=(w > 0)[None, None, :], other=0.0)
                dlog_left = dh * tl.exp2(left[:, None, :] * rate_left) * left_weight[None, None, :] * before
                carry = dh * tl.exp2(top[:, None, :] * rate_top) * top_weight[None, None, :]
                dlog_top = carry * tl.load(scratch + r * SLOT)
                dA_left += tl.sum(dlog_left * left[:, None, :], 2)
                dA_top += tl.sum(dlog_top * top[:, None, :], 2)
                ddrive_left = tl.sum(dh * B_left[None], 1) * left_weight[None, :]
                ddrive_top = tl.sum(dh * B_top[None], 1) * top_weight[None, :]
                dleft = tl.sum(dlog_left * A_left, 1) + ddrive_left * u
                dtop = tl.sum(dlog_top * A_top, 1) + ddrive_top * u
                du = ddrive_left * left + ddrive_top * top
                if HAS_D:
                    du += tl.where(part == 0, tl.load(D_ptr + d, mask=d_mask, other=0.0), 0.0)[:, None] * dy
                if SOFTPLUS:
                    dleft = tl.where(raw_left > 20.0, dleft, dleft / (1.0 + tl.exp(-raw_left)))
                    dtop = tl.where(raw_top > 20.0, dtop, dtop / (1.0 + tl.exp(-raw_top)))
                tl.store(du_rows + row * sdu_h, du, mask=mask)
                tl.store(dleft_rows + row * sdl_h, dleft, mask=mask)
                tl.store(dtop_rows + row * sdt_h, dtop, mask=mask)
                # Blocks of channels of this program add into one buffer, one after the other
                at = (((b * blocks + group) * N + n[:, None]) * height + row) * width + col[None, :]
                later = B_mask & (sub > 0)
                dB_left = tl.sum(dh * (left * u)[:, None, :], 0) * left_weight[None, :]
                dB_top = tl.sum(dh * (top * u)[:, None, :], 0) * top_weight[None, :]
                tl.store(dB_left_ptr + at, dB_left + tl.load(dB_left_ptr + at, mask=later, other=0.0), mask=B_mask)
                tl.store(dB_top_ptr + at, dB_top + tl.load(dB_top_ptr + at, mask=later, other=0.0), mask=B_mask)
                tl.store(dC_ptr + at, dC + tl.load(dC_ptr + at, mask=later, other=0.0), mask=B_mask)
                r -= 1
            tl.debug_barrier()
            mark -= 1
        at = (b * dim + d[:, None]) * N + n[None, :]
        tl.store(dA_left_ptr + at, dA_left, mask=d_mask[:, None] & n_mask[None, :])
        tl.store(dA_top_ptr + at, dA_top, mask=d_mask[:, None] & n_mask[None, :])
        sub += 1


def _geometry(u: torch.Tensor, A: torch.Tensor, subs: int) -> dict[str, int]:
    """Returns how channels and states are shared out, as kernel arguments.

    Args:
        u: The input (B, D, H, W).
        A: Decay rates (D, N).
        subs: Most channels that one program takes one block after the other; 1 for a single block.
    """
    dim, height, width = u.shape[1:]
    room = TILE_BYTES // A.element_size()
    padded = triton.next_power_of_2(width)
    block_n = min(triton.next_power_of_2(A.shape[1]), max(1, room // padded))
    block_d = min(triton.next_power_of_2(dim), max(1, room // (padded * block_n)))
    subs = max(1, min(subs // block_d, triton.cdiv(dim, block_d)))
    return {
        'blocks': triton.cdiv(dim, block_d * subs), 'parts': triton.cdiv(A.shape[1], block_n), 'subs': subs,
        'dim': dim, 'height': height, 'width': width, 'marks': triton.cdiv(height, ROWS),
        'N': A.shape[1], 'WIDTH': padded, 'BLOCK_D': block_d, 'BLOCK_N': block_n, 'MARK': ROWS}


def _partials(x: torch.Tensor, parts: int, dtype: torch.dtype) -> torch.Tensor:
    """Makes the outputs (parts, B, D, H, W) of the programs that share a pixel, each laid out as the map x."""
    return x.new_empty_strided((parts, *x.shape), (x.numel(), *torch.empty_like(x).stride()), dtype=dtype)


def _total(partials: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sums `_partials`."""
    return partials[0] if partials.shape[0] == 1 else sum_like(partials, 0, x)


def _tile_size(geometry: dict[str, int]) -> int:
    return geometry['BLOCK_D'] * geometry['BLOCK_N'] * geometry['WIDTH']


def _launch(
        kernel: triton.JITFunction,
        pointers: dict[str, Any],
        geometry: dict[str, int],
        delta_softplus: bool,
        reverse: bool,
) -> None:
    """Starts one program for each (batch item, block or group of channels, block of states).

    Args:
        kernel: The forward or the backward kernel.
        pointers: Every tensor argument by its name in the kernel, without `_ptr`; None where absent.
        geometry: Sizes, see `_geometry`.
        delta_softplus: Applies softplus to the steps.
        reverse: Starts at the bottom right corner.
    """
    strides = {}
    for short, axes, name in (
            ('u', 'bdhw', 'u'), ('t', 'bdhw', 'delta_top'), ('l', 'bdhw', 'delta_left'), ('o', 'bdhw', 'dout'),
            ('o', 'pbdhw', 'out'), ('du', 'pbdhw', 'du'), ('dt', 'pbdhw', 'dtop'), ('dl', 'pbdhw', 'dleft'),
            ('Bt', 'bnhw', 'B_top'), ('Bl', 'bnhw', 'B_left'), ('C', 'bnhw', 'C')):
        if name in pointers:
            strides.update(_strides(short, axes, pointers[name]))
    A = pointers['A_top']
    programs = pointers['u'].shape[0] * geometry['blocks'] * geometry['parts']
    warps = min(16, max(1, _tile_size(geometry) * A.element_size() // BYTES_PER_WARP))
    # Triton starts kernels on the current device, whatever the device of their arguments
    with torch.cuda.device_of(A):
        kernel[(programs,)](
            **{f'{name}_ptr': x for name, x in pointers.items()}, **strides, **geometry,
            ACC=tl.float64 if A.dtype == torch.float64 else tl.float32, HAS_D=pointers['D'] is not None,
            HAS_BIAS_TOP=pointers['bias_top'] is not None, HAS_BIAS_LEFT=pointers['bias_left'] is not None,
            REVERSE=reverse, SOFTPLUS=delta_softplus, num_warps=warps, num_stages=1)


def forward(
        u: torch.Tensor,
        delta_top: torch.Tensor,
        delta_left: torch.Tensor,
        A_top: torch.Tensor,
        A_left: torch.Tensor,
        B_top: torch.Tensor,
        B_left: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        bias_top: torch.Tensor | None,
        bias_left: torch.Tensor | None,
        delta_softplus: bool,
        reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the scan; see `reference`."""
    geometry = _geometry(u, A_top, 1)
    batch, dim, height, width = u.shape
    out = _partials(u, geometry['parts'], u.dtype if geometry['parts'] == 1 else A_top.dtype)
    checkpoints = A_top.new_empty(batch, geometry['marks'], A_top.shape[1], width, dim)
    pointers = {'u': u, 'delta_top': delta_top, 'delta_left': delta_left, 'A_top': A_top, 'A_left': A_left,
                'B_top': B_top, 'B_left': B_left, 'C': C, 'D': D, 'bias_top': bias_top, 'bias_left': bias_left,
                'out': out, 'state': checkpoints}
    _launch(_wavefront_forward_kernel, pointers, geometry, delta_softplus, reverse)
    return _total(out, u).to(u.dtype), checkpoints


def backward(
        dout: torch.Tensor,
        u: torch.Tensor,
        delta_top: torch.Tensor,
        delta_left: torch.Tensor,
        A_top: torch.Tensor,
        A_left: torch.Tensor,
        B_top: torch.Tensor,
        B_left: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        bias_top: torch.Tensor | None,
        bias_left: torch.Tensor | None,
        checkpoints: torch.Tensor,
        delta_softplus: bool,
        reverse: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the scan; see `reference`."""
    geometry = _geometry(u, A_top, GROUP)
    batch, dim, height, width = u.shape
    state = A_top.shape[1]
    programs = batch * geometry['blocks'] * geometry['parts']
    pointers = {'u': u, 'delta_top': delta_top, 'delta_left': delta_left, 'A_top': A_top, 'A_left': A_left,
                'B_top': B_top, 'B_left': B_left, 'C': C, 'D': D, 'bias_top': bias_top, 'bias_left': bias_left,
                'dout': dout, 'state': checkpoints,
                'scratch': A_top.new_empty(programs, ROWS + 1, _tile_size(geometry))}
    maps = {'du': u, 'dtop': delta_top, 'dleft': delta_left}
    matrices = {'dB_top': B_top, 'dB_left': B_left, 'dC': C}
    pointers |= {name: _partials(x, geometry['parts'], A_top.dtype) for name, x in maps.items()}
    pointers |= {name: A_top.new_empty(batch, dim, state) for name in ('dA_top', 'dA_left')}
    pointers |= {name: A_top.new_empty(batch, geometry['blocks'], state, height, width) for name in matrices}
    _launch(_wavefront_backward_kernel, pointers, geometry, delta_softplus, reverse)
    du, dtop, dleft = (_total(pointers[name], x) for name, x in maps.items())
    dA_top, dA_left = (pointers[name].sum(0) for name in ('dA_top', 'dA_left'))
    dB_top, dB_left, dC = (sum_like(pointers[name], 1, x) for name, x in matrices.items())
    return (du, dtop, dleft, dA_top, dA_left, dB_top, dB_left, dC,
            None if D is None else (dout.to(A_top.dtype) * u.to(A_top.dtype)).sum((0, 2, 3)),
            None if bias_top is None else dtop.sum((0, 2, 3)), None if bias_left is None else dleft.sum((0, 2, 3)))
