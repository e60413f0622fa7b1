"""The scan of Mamba-2 in Triton, forward and backward.

As in `chunked.py` all chunks work at once, in matrix products: one kernel for what each chunk adds to the state, one
that passes the states on, and one for the outputs; backwards the first two again for the gradients of the states, and
one for all others. Sequences are read where they lie, from either end. Steps are made beforehand: they are few. So is
the gradient before the gate, where there is one. Gradients of B and C go through one partial buffer a head, so results
are the same in every run. Half-precision inputs are multiplied in TF32, float32 in three products of it, which is as
good as float32. What arguments and results mean stands in `reference.py`.
"""
# Triton reads annotations as types of kernel arguments: kernels carry only those that it needs
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .reference import chunk_length, steps

MAX_BLOCK, MAX_GRADIENT_BLOCK = 64, 32
"""Widest tiles along P and N, so that they stay in registers; a chunk is one tile along the sequence."""
PASS_BLOCK = 256


@triton.jit
def _dot(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(ACC), b.to(ACC), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _tile(ptr, rows, s_row, row_mask, cols, s_col, width, ACC: tl.constexpr):
    mask = row_mask[:, None] & (cols < width)[None, :]
    return tl.load(ptr + rows[:, None] * s_row + cols[None, :] * s_col, mask=mask, other=0.0).to(ACC)


@triton.jit
def _segment_decays(log, BLOCK_Q: tl.constexpr):
    # Masked before the sum and after it: see `segment_decays` in chunked.py
    i = tl.arange(0, BLOCK_Q)[:, None]
    j = tl.arange(0, BLOCK_Q)[None, :]
    sums = tl.cumsum(tl.where(i > j, log[:, None], 0.0), 0)
    return tl.where(i >= j, tl.exp(tl.where(i >= j, sums, 0.0)), 0.0)


@triton.jit
def _chunk_states_kernel(
        v_ptr, m_ptr, step_ptr, log_ptr, state_ptr,
        M, per_group, L, Q, chunks, blocks_p, blocks_n,
        sv_b, sv_l, sv_m, sv_p, sm_b, sm_l, sm_g, sm_n,
        P: tl.constexpr, N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
        ACC: tl.constexpr, PRECISION: tl.constexpr, ADJOINT: tl.constexpr, REVERSE: tl.constexpr,
):
    # Forward, v = x and m = B: sum of (decay to the end of the chunk) step x (x) B. Adjoint, v = dy and m = C: sum of
    # (decay from its start) dy (x) C
    pid = tl.program_id(0).to(tl.int64)
    n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p = pid // blocks_n % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    lane = pid // blocks_n // blocks_p  # in (B, M, chunks)
    head = lane // chunks
    m = head % M
    b = head // M
    cols = tl.arange(0, BLOCK_Q)
    t = lane % chunks * Q + cols
    t_mask = (cols < Q) & (t < L)
    pixel = (L - 1 - t if REVERSE else t).to(tl.int64)
    v = _tile(v_ptr + b * sv_b + m * sv_m, pixel, sv_l, t_mask, p, sv_p, P, ACC)
    if ADJOINT:
        weight = tl.exp(tl.cumsum(tl.load(log_ptr + head * L + t, mask=t_mask, other=0.0), 0))
    else:
        later = (cols + 1 < Q) & (t + 1 < L)
        log = tl.load(log_ptr + head * L + t + 1, mask=later, other=0.0)
        weight = tl.exp(tl.cumsum(log, 0, reverse=True)) * tl.load(step_ptr + head * L + t, mask=t_mask, other=0.0)
    matrix = _tile(m_ptr + b * sm_b + m // per_group * sm_g, pixel, sm_l, t_mask, n, sm_n, N, ACC)
    state = _dot(tl.trans(v * weight[:, None]), matrix, ACC, PRECISION)
    mask = (p < P)[:, None] & (n < N)[None, :]
    tl.store(state_ptr + lane * (P * N) + p[:, None] * N + n[None, :], state, mask=mask)


@triton.jit
def _pass_states_kernel(
        state_ptr, whole_ptr, first_ptr, last_ptr, chunks, blocks,
        SIZE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, HAS_FIRST: tl.constexpr, BACKWARDS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    head = pid // blocks
    at = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    state = tl.zeros([BLOCK], dtype=ACC)
    if HAS_FIRST:
        state += tl.load(first_ptr + head * SIZE + at, mask=mask, other=0.0)
    done = 0
    while done < chunks:
        lane = head * chunks + done
        if BACKWARDS:
            lane = head * chunks + chunks - 1 - done
        ptrs = state_ptr + lane * SIZE + at
        added = tl.load(ptrs, mask=mask, other=0.0)
        tl.store(ptrs, state, mask=mask)
        state = tl.load(whole_ptr + lane) * state + added
        done += 1
    tl.store(last_ptr + head * SIZE + at, state, mask=mask)


@triton.jit
def _output_kernel(
        x_ptr, B_ptr, C_ptr, D_ptr, z_ptr, step_ptr, log_ptr, state_ptr, out_ptr,
        M, per_group, L, Q, chunks, blocks_p,
        sx_b, sx_l, sx_m, sx_p, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n, sz_b, sz_l, sz_m, sz_p,
        P: tl.constexpr, N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
        ACC: tl.constexpr, PRECISION: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, REVERSE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    p = pid % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    lane = pid // blocks_p
    head = lane // chunks
    m = head % M
    b = head // M
    cols = tl.arange(0, BLOCK_Q)
    t = lane % chunks * Q + cols
    t_mask = (cols < Q) & (t < L)
    pixel = (L - 1 - t if REVERSE else t).to(tl.int64)
    step = tl.load(step_ptr + head * L + t, mask=t_mask, other=0.0)
    log = tl.load(log_ptr + head * L + t, mask=t_mask, other=0.0)
    B_rows = B_ptr + b * sB_b + m // per_group * sB_g
    C_rows = C_ptr + b * sC_b + m // per_group * sC_g
    x = _tile(x_ptr + b * sx_b + m * sx_m, pixel, sx_l, t_mask, p, sx_p, P, ACC)
    scores = tl.zeros([BLOCK_Q, BLOCK_Q], dtype=ACC)
    y = tl.zeros([BLOCK_Q, BLOCK_P], dtype=ACC)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        C = _tile(C_rows, pixel, sC_l, t_mask, n, sC_n, N, ACC)
        B = _tile(B_rows, pixel, sB_l, t_mask, n, sB_n, N, ACC)
        start = _tile(state_ptr + lane * (P * N), p, N, p < P, n, 1, N, ACC)
        scores += _dot(C, tl.trans(B), ACC, PRECISION)
        y += _dot(C, tl.trans(start), ACC, PRECISION)
    y = y * tl.exp(tl.cumsum(log, 0))[:, None]
    y += _dot(scores * _segment_decays(log, BLOCK_Q), x * step[:, None], ACC, PRECISION)
    if HAS_D:
        y += tl.load(D_ptr + m * P + p, mask=p < P, other=0.0)[None, :] * x
    if HAS_Z:
        z = _tile(z_ptr + b * sz_b + m * sz_m, pixel, sz_l, t_mask, p, sz_p, P, ACC)
        y = y * z / (1.0 + tl.exp(-z))
    out_ptrs = out_ptr + ((b * L + pixel) * M + m)[:, None] * P + p[None, :]
    tl.store(out_ptrs, y, mask=t_mask[:, None] & (p < P)[None, :])


@triton.jit
def _gradient_kernel(
        x_ptr, B_ptr, C_ptr, D_ptr, dy_ptr, step_ptr, log_ptr, state_ptr, dstate_ptr,
        y_ptr, dx_ptr, dB_ptr, dC_ptr, dD_ptr, dstep_ptr, dlog_ptr,
        M, per_group, L, Q, chunks,
        sx_b, sx_l, sx_m, sx_p, sB_b, sB_l, sB_g, sB_n, sC_b, sC_l, sC_g, sC_n, sy_b, sy_l, sy_m, sy_p,
        P: tl.constexpr, N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
        ACC: tl.constexpr, PRECISION: tl.constexpr, HAS_D: tl.constexpr, HAS_Y: tl.constexpr, REVERSE: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    head = lane // chunks
    m = head % M
    b = head // M
    cols = tl.arange(0, BLOCK_Q)
    t = lane % chunks * Q + cols
    t_mask = (cols < Q) & (t < L)
    pixel = (L - 1 - t if REVERSE else t).to(tl.int64)
    step = tl.load(step_ptr + head * L + t, mask=t_mask, other=0.0)
    log = tl.load(log_ptr + head * L + t, mask=t_mask, other=0.0)
    x_rows = x_ptr + b * sx_b + m * sx_m
    B_rows = B_ptr + b * sB_b + m // per_group * sB_g
    C_rows = C_ptr + b * sC_b + m // per_group * sC_g
    dy_rows = dy_ptr + b * sy_b + m * sy_m
    out_rows = ((b * L + pixel) * M + m)[:, None]  # in (B, L, M)
    start_rows = state_ptr + lane * (P * N)
    end_rows = dstate_ptr + lane * (P * N)

    scores = tl.zeros([BLOCK_Q, BLOCK_Q], dtype=ACC)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        C = _tile(C_rows, pixel, sC_l, t_mask, n, sC_n, N, ACC)
        B = _tile(B_rows, pixel, sB_l, t_mask, n, sB_n, N, ACC)
        scores += _dot(C, tl.trans(B), ACC, PRECISION)
    dweights = tl.zeros([BLOCK_Q, BLOCK_Q], dtype=ACC)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        x = _tile(x_rows, pixel, sx_l, t_mask, p, sx_p, P, ACC)
        dy = _tile(dy_rows, pixel, sy_l, t_mask, p, sy_p, P, ACC)
        dweights += _dot(dy, tl.trans(x * step[:, None]), ACC, PRECISION)
    decays = _segment_decays(log, BLOCK_Q)
    since_start = tl.exp(tl.cumsum(log, 0))
    to_end = tl.sum(tl.where((cols == BLOCK_Q - 1)[:, None], decays, 0.0), 0)
    dscores = dweights * decays
    weights = scores * decays
    before = cols[:, None] > cols[None, :]
    until = tl.cumsum(dscores * scores, 0, reverse=True)
    dlog = tl.sum(tl.where(before, until, 0.0), 1)

    dsince_start = tl.zeros([BLOCK_Q], dtype=ACC)
    dto_end = tl.zeros([BLOCK_Q], dtype=ACC)
    dstep = tl.zeros([BLOCK_Q], dtype=ACC)
    whole = tl.zeros([BLOCK_P], dtype=ACC)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = t_mask[:, None] & (p < P)[None, :]
        x = _tile(x_rows, pixel, sx_l, t_mask, p, sx_p, P, ACC)
        dy = _tile(dy_rows, pixel, sy_l, t_mask, p, sy_p, P, ACC)
        y = tl.zeros([BLOCK_Q, BLOCK_P], dtype=ACC)
        ddrive = tl.zeros([BLOCK_Q, BLOCK_P], dtype=ACC)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            start = _tile(start_rows, p, N, p < P, n, 1, N, ACC)
            end = _tile(end_rows, p, N, p < P, n, 1, N, ACC)
            y += _dot(_tile(C_rows, pixel, sC_l, t_mask, n, sC_n, N, ACC), tl.trans(start), ACC, PRECISION)
            ddrive += _dot(_tile(B_rows, pixel, sB_l, t_mask, n, sB_n, N, ACC), tl.trans(end), ACC, PRECISION)
            whole += tl.sum(start * end, 1)
        y *= since_start[:, None]
        ddrive *= to_end[:, None]
        dsince_start += tl.sum(y * dy, 1)
        dto_end += tl.sum(ddrive * x, 1) * step
        ddrive += _dot(tl.trans(weights), dy, ACC, PRECISION)
        dstep += tl.sum(ddrive * x, 1)
        dx = ddrive * step[:, None]
        if HAS_D:
            skip = tl.load(D_ptr + m * P + p, mask=p < P, other=0.0)[None, :]
            dx += skip * dy
            tl.store(dD_ptr + lane * P + p, tl.sum(dy * x, 0), mask=p < P)
        if HAS_Y:
            y += _dot(weights, x * step[:, None], ACC, PRECISION)
            if HAS_D:
                y += skip * x
            tl.store(y_ptr + out_rows * P + p[None, :], y, mask=mask)
        tl.store(dx_ptr + out_rows * P + p[None, :], dx, mask=mask)
    # A position has part in every segment that it lies in
    dlog += tl.sum(tl.where(before, dto_end[None, :], 0.0), 1) + tl.cumsum(dsince_start, 0, reverse=True)
    dlog += tl.sum(whole, 0) * tl.exp(tl.sum(log, 0))
    tl.store(dstep_ptr + head * L + t, dstep, mask=t_mask)
    tl.store(dlog_ptr + head * L + t, dlog, mask=t_mask)

    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = t_mask[:, None] & (n < N)[None, :]
        C = _tile(C_rows, pixel, sC_l, t_mask, n, sC_n, N, ACC)
        B = _tile(B_rows, pixel, sB_l, t_mask, n, sB_n, N, ACC)
        dC = _dot(dscores, B, ACC, PRECISION)
        dB = _dot(tl.trans(dscores), C, ACC, PRECISION)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            x = _tile(x_rows, pixel, sx_l, t_mask, p, sx_p, P, ACC)
            dy = _tile(dy_rows, pixel, sy_l, t_mask, p, sy_p, P, ACC)
            dC += _dot(dy * since_start[:, None], _tile(start_rows, p, N, p < P, n, 1, N, ACC), ACC, PRECISION)
            dB += _dot(x * (step * to_end)[:, None], _tile(end_rows, p, N, p < P, n, 1, N, ACC), ACC, PRECISION)
        tl.store(dC_ptr + out_rows * N + n[None, :], dC, mask=mask)
        tl.store(dB_ptr + out_rows * N + n[None, :], dB, mask=mask)


def _strides(**sequences: torch.Tensor | None) -> dict[str, int]:
    """Returns the strides of sequences as kernel arguments: {'sx_b': ..., 'sx_l': ...} of x, and so on."""
    strides = {}
    for name, x in sequences.items():
        axes = 'blgn' if name in 'BCm' else 'blmp'
        given = (0,) * 4 if x is None else x.stride()
        strides.update({f's{name}_{axis}': stride for axis, stride in zip(axes, given, strict=True)})
    return strides


class _Call:
    """What all kernels of a pass share: sizes, steps in scan order, options."""

    def __init__(
            self,
            x: torch.Tensor,
            dt: torch.Tensor,
            A: torch.Tensor,
            B: torch.Tensor,
            C: torch.Tensor,
            dt_bias: torch.Tensor | None,
            step_options: tuple[bool, float, float],
            reverse: bool,
            max_block: int,
    ) -> None:
        self.A, self.reverse = A, reverse
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups, self.state = B.shape[2:]
        size = chunk_length(self.length)
        self.chunks = triton.cdiv(self.length, size)
        # (B, M, L) in scan order
        self.step, self.slope = (self.in_order(t) for t in steps(dt.to(A.dtype), dt_bias, *step_options))
        self.log = self.step * A[:, None]
        padded = F.pad(self.log, (0, self.chunks * size - self.length)).unflatten(-1, (self.chunks, size))
        self.whole = padded.sum(-1).exp()
        block_p, block_n = (min(max(triton.next_power_of_2(n), 16), max_block) for n in (self.width, self.state))
        half = all(t.dtype in (torch.bfloat16, torch.float16) for t in (x, B, C))
        precision = 'ieee' if torch.version.hip or A.dtype == torch.float64 else 'tf32' if half else 'tf32x3'
        self.shared: dict[str, Any] = {
            'M': self.heads, 'per_group': self.heads // self.groups, 'L': self.length, 'Q': size, 'chunks': self.chunks,
            'P': self.width, 'N': self.state, 'BLOCK_Q': max(triton.next_power_of_2(size), 16),
            'BLOCK_P': block_p, 'BLOCK_N': block_n,
            'ACC': tl.float64 if A.dtype == torch.float64 else tl.float32, 'PRECISION': precision,
            'REVERSE': reverse, 'num_stages': 1}
        self.lanes = self.batch * self.heads * self.chunks
        self.blocks_p, self.blocks_n = -(-self.width // block_p), -(-self.state // block_n)

    def in_order(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, M) -> (B, M, L) in scan order, contiguous."""
        return (x.flip(1) if self.reverse else x).transpose(1, 2).contiguous()

    def by_position(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `in_order`."""
        x = x.transpose(1, 2)
        return x.flip(1) if self.reverse else x

    def states(
            self,
            v: torch.Tensor,
            matrix: torch.Tensor,
            first: torch.Tensor | None,
            adjoint: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what every chunk meets, (B, M, chunks, P, N), and what is left behind the last one, (B, M, P, N)."""
        states = self.A.new_empty(self.batch, self.heads, self.chunks, self.width, self.state)
        last = self.A.new_empty(self.batch, self.heads, self.width, self.state)
        _chunk_states_kernel[(self.lanes * self.blocks_p * self.blocks_n,)](
            v_ptr=v, m_ptr=matrix, step_ptr=self.step, log_ptr=self.log, state_ptr=states, blocks_p=self.blocks_p,
            blocks_n=self.blocks_n, ADJOINT=adjoint, num_warps=4, **_strides(v=v, m=matrix), **self.shared)
        size = self.width * self.state
        blocks = triton.cdiv(size, PASS_BLOCK)
        _pass_states_kernel[(self.batch * self.heads * blocks,)](
            state_ptr=states, whole_ptr=self.whole, first_ptr=None if first is None else first.contiguous(),
            last_ptr=last, chunks=self.chunks, blocks=blocks, SIZE=size, BLOCK=PASS_BLOCK, ACC=self.shared['ACC'],
            HAS_FIRST=first is not None, BACKWARDS=adjoint, num_warps=2, num_stages=1)
        return states, last


def forward(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        initial_states: torch.Tensor | None,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
        reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the scan; see `reference`."""
    # Triton starts kernels on the current device, whatever the device of their arguments
    with torch.cuda.device_of(x):
        call = _Call(x, dt, A, B, C, dt_bias, (dt_softplus, dt_min, dt_max), reverse, MAX_BLOCK)
        starts, final_states = call.states(x, B, initial_states, adjoint=False)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _output_kernel[(call.lanes * call.blocks_p,)](
            x_ptr=x, B_ptr=B, C_ptr=C, D_ptr=D, z_ptr=z, step_ptr=call.step, log_ptr=call.log, state_ptr=starts,
            out_ptr=out, blocks_p=call.blocks_p, HAS_D=D is not None, HAS_Z=z is not None, num_warps=8,
            **_strides(x=x, B=B, C=C, z=z), **call.shared)
    return out, final_states, starts


def backward(
        dout: torch.Tensor,
        dfinal_states: torch.Tensor | None,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        initial_states: torch.Tensor | None,
        starts: torch.Tensor,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
        reverse: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the scan; see `reference`."""
    with torch.cuda.device_of(x):
        call = _Call(x, dt, A, B, C, dt_bias, (dt_softplus, dt_min, dt_max), reverse, MAX_GRADIENT_BLOCK)
        dy = dout if z is None else dout.to(A.dtype) * F.silu(z.to(A.dtype))
        ends, dinitial_states = call.states(dy, C, dfinal_states, adjoint=True)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        y = None if z is None else A.new_empty(x.shape)
        dB, dC = (A.new_empty(*x.shape[:3], call.state) for _ in range(2))
        dD = None if D is None else D.new_empty(call.batch, call.heads, call.chunks, call.width)
        dstep, dlog = torch.empty_like(call.step), torch.empty_like(call.step)
        _gradient_kernel[(call.lanes,)](
            x_ptr=x, B_ptr=B, C_ptr=C, D_ptr=D, dy_ptr=dy, step_ptr=call.step, log_ptr=call.log, state_ptr=starts,
            dstate_ptr=ends, y_ptr=y, dx_ptr=dx, dB_ptr=dB, dC_ptr=dC, dD_ptr=dD, dstep_ptr=dstep, dlog_ptr=dlog,
            HAS_D=D is not None, HAS_Y=z is not None, num_warps=8, **_strides(x=x, B=B, C=C, y=dy), **call.shared)
    ddt = (dstep + dlog * A[:, None]) * call.slope
    dB, dC = (t.unflatten(2, (call.groups, -1)).sum(3) for t in (dB, dC))
    dz = None
    if z is not None:
        sigmoid = torch.sigmoid(z.to(A.dtype))
        dz = dout * y * sigmoid * (1 + z * (1 - sigmoid))
    return (dx, call.by_position(ddt), (dlog * call.step).sum((0, 2)), dB, dC, None if D is None else dD.sum((0, 2)),
            dz, None if dt_bias is None else ddt.sum((0, 2)), None if initial_states is None else dinitial_states)
