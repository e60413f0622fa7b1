"""The non-causal SSD in Triton, forward and backward, as three kinds of products that make no copies.

`_sum_kernel`       S[n, p] = sum_l w_l Q[l, n] X[l, p]: the sum, and with Q = C and X = dy its gradient
`_read_kernel`      y[l, p] = sum_n Q[l, n] S[n, p]: the output, and with Q = B the gradient of the weighted input
`_contract_kernel`  q[l, n] = sum_mp w_lm X[l, m, p] S[m, n, p], over the heads m of a group: the gradients of B and C

Weights, casts, skip and the gradients of the weights happen in registers. Long sums over positions are cut into parts,
which the launcher adds up in a fixed order, so results are the same in every run. The meaning of arguments and results
stands in `reference`.
"""
# Triton reads annotations as types of kernel arguments: kernels carry only those that it needs
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl

from ..selective_scan.triton_impl import _strides

BLOCK = 32
"""Largest side of a tile: three tiles and their product in full precision then stay in registers."""
LEAST = 16
"""Smallest side of a tile: that of the matrix units."""
PART = 1024
"""Positions that one program of `_sum_kernel` adds up."""
LETTERS = {'x': ('x', 'blmp'), 'skip': ('s', 'blmp'), 'dt': ('t', 'blm'), 'q': ('q', 'blgn')}
"""Tensors of any strides -> their letter and axes in the names of the kernels' arguments."""


@triton.jit
def _weight(dt_ptrs, A_ptr, m, mask, SIGN: tl.constexpr, ACC: tl.constexpr):
    # The weights of some positions for head m; zero outside the sequence
    return tl.load(dt_ptrs, mask=mask, other=0.0).to(ACC) * (tl.load(A_ptr + m) * SIGN)


@triton.jit
def _sum_kernel(
        x_ptr, dt_ptr, A_ptr, q_ptr, state_ptr,
        parts, length, heads, size, groups, state, blocks_n, blocks_p,
        sx_b: tl.int64, sx_l: tl.int64, sx_m, sx_p, st_b: tl.int64, st_l: tl.int64, st_m,
        sq_b: tl.int64, sq_l: tl.int64, sq_g, sq_n,
        BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PART: tl.constexpr,
        SIGN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    p = pid % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    n = pid // blocks_p % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = pid // blocks_p // blocks_n % heads
    part = pid // blocks_p // blocks_n // heads % parts
    b = pid // blocks_p // blocks_n // heads // parts
    n_mask, p_mask = n < state, p < size
    x_ptrs = x_ptr + b * sx_b + m * sx_m + p[None, :] * sx_p
    q_ptrs = q_ptr + b * sq_b + m % groups * sq_g + n[:, None] * sq_n
    total = tl.zeros([BLOCK_N, BLOCK_P], dtype=ACC)
    start = part * PART
    end = tl.minimum(start + PART, length)
    while start < end:
        l = start + tl.arange(0, BLOCK_L)
        l_mask = l < end
        x = tl.load(x_ptrs + l[:, None] * sx_l, mask=l_mask[:, None] & p_mask[None, :], other=0.0).to(ACC)
        if SIGN != 0:
            x *= _weight(dt_ptr + b * st_b + l * st_l + m * st_m, A_ptr, m, l_mask, SIGN, ACC)[:, None]
        q = tl.load(q_ptrs + l[None, :] * sq_l, mask=n_mask[:, None] & l_mask[None, :], other=0.0).to(ACC)
        total += tl.dot(q, x, input_precision=PRECISION, out_dtype=ACC)
        start += BLOCK_L
    at = (((b * parts + part) * groups + m % groups) * state + n[:, None]) * (heads // groups * size)
    at += m // groups * size + p[None, :]
    tl.store(state_ptr + at, total, mask=n_mask[:, None] & p_mask[None, :])


@triton.jit
def _read_kernel(
        q_ptr, state_ptr, skip_ptr, D_ptr, x_ptr, dt_ptr, A_ptr, out_ptr, dweight_ptr,
        length, heads, size, groups, state, blocks_l,
        sq_b: tl.int64, sq_l: tl.int64, sq_g, sq_n, ss_b: tl.int64, ss_l: tl.int64, ss_m, ss_p,
        sx_b: tl.int64, sx_l: tl.int64, sx_m, sx_p, st_b: tl.int64, st_l: tl.int64, st_m,
        BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
        HAS_D: tl.constexpr, SIGN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    l = pid % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)
    m = pid // blocks_l % heads
    b = pid // blocks_l // heads
    l_mask = l < length
    q_ptrs = q_ptr + b * sq_b + l[:, None] * sq_l + m % groups * sq_g
    width = heads // groups * size
    state_ptrs = state_ptr + (b * groups + m % groups) * state * width + m // groups * size
    skip_ptrs = skip_ptr + b * ss_b + l[:, None] * ss_l + m * ss_m
    out_ptrs = out_ptr + ((b * length + l[:, None]) * heads + m) * size
    if SIGN != 0:
        x_ptrs = x_ptr + b * sx_b + l[:, None] * sx_l + m * sx_m
        weight = _weight(dt_ptr + b * st_b + l * st_l + m * st_m, A_ptr, m, l_mask, SIGN, ACC)
        dweight = tl.zeros([BLOCK_L], dtype=ACC)
    p0 = 0
    while p0 < size:
        p = p0 + tl.arange(0, BLOCK_P)
        mask = l_mask[:, None] & (p < size)[None, :]
        y = tl.zeros([BLOCK_L, BLOCK_P], dtype=ACC)
        n0 = 0
        while n0 < state:
            n = n0 + tl.arange(0, BLOCK_N)
            q = tl.load(q_ptrs + n[None, :] * sq_n, mask=l_mask[:, None] & (n < state)[None, :], other=0.0).to(ACC)
            s = tl.load(state_ptrs + n[:, None] * width + p[None, :],
                        mask=(n < state)[:, None] & (p < size)[None, :], other=0.0)
            y += tl.dot(q, s, input_precision=PRECISION, out_dtype=ACC)
            n0 += BLOCK_N
        if SIGN != 0:
            dweight += tl.sum(y * tl.load(x_ptrs + p[None, :] * sx_p, mask=mask, other=0.0).to(ACC), 1)
            y *= weight[:, None]
        if HAS_D:
            y += tl.load(D_ptr + m) * tl.load(skip_ptrs + p[None, :] * ss_p, mask=mask, other=0.0).to(ACC)
        tl.store(out_ptrs + p[None, :], y, mask=mask)
        p0 += BLOCK_P
    if SIGN != 0:
        tl.store(dweight_ptr + (b * length + l) * heads + m, dweight, mask=l_mask)


@triton.jit
def _contract_kernel(
        x_ptr, dt_ptr, A_ptr, state_ptr, out_ptr,
        length, heads, size, groups, state, blocks_l, blocks_n,
        sx_b: tl.int64, sx_l: tl.int64, sx_m, sx_p, st_b: tl.int64, st_l: tl.int64, st_m,
        BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
        SIGN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    l = pid // blocks_n % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)
    group = pid // blocks_n // blocks_l % groups
    b = pid // blocks_n // blocks_l // groups
    l_mask, n_mask = l < length, n < state
    total = tl.zeros([BLOCK_L, BLOCK_N], dtype=ACC)
    m = group
    while m < heads:
        x_ptrs = x_ptr + b * sx_b + l[:, None] * sx_l + m * sx_m
        state_ptrs = state_ptr + ((b * groups + group) * state + n[None, :]) * (heads // groups * size)
        state_ptrs += m // groups * size
        part = tl.zeros([BLOCK_L, BLOCK_N], dtype=ACC)
        p0 = 0
        while p0 < size:
            p = p0 + tl.arange(0, BLOCK_P)
            x = tl.load(x_ptrs + p[None, :] * sx_p, mask=l_mask[:, None] & (p < size)[None, :], other=0.0).to(ACC)
            s = tl.load(state_ptrs + p[:, None], mask=(p < size)[:, None] & n_mask[None, :], other=0.0)
            part += tl.dot(x, s, input_precision=PRECISION, out_dtype=ACC)
            p0 += BLOCK_P
        if SIGN != 0:
            part *= _weight(dt_ptr + b * st_b + l * st_l + m * st_m, A_ptr, m, l_mask, SIGN, ACC)[:, None]
        total += part
        m += groups
    at = ((b * length + l[:, None]) * groups + group) * state + n[None, :]
    tl.store(out_ptr + at, total, mask=l_mask[:, None] & n_mask[None, :])


class _Problem:
    """Sizes and types that all launches of one call share."""

    def __init__(self, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, positive: bool) -> None:
        self.batch, self.length, self.heads, self.size = x.shape
        self.groups, self.state = B.shape[2:]
        self.dt, self.A, self.sign = dt, A, -1 if positive else 1
        self.blocks = {f'BLOCK_{name}': min(BLOCK, max(LEAST, triton.next_power_of_2(extent))) for name, extent in (
            ('L', self.length), ('N', self.state), ('P', self.size))}

    def launch(
            self,
            kernel: triton.JITFunction,
            grid: tuple[int, ...],
            sign: int,
            pointers: dict[str, torch.Tensor | None],
            **more: Any,
    ) -> None:
        """Starts a kernel.

        Args:
            kernel: The kernel.
            grid: Extents of its program number; the product is the number of programs.
            sign: Sign of the weights; 0 for a product without weights.
            pointers: Tensors by name, without `_ptr`; those named in `LETTERS` bring their strides.
            more: Other arguments.
        """
        strides: dict[str, int] = {}
        for name, (letter, axes) in LETTERS.items():
            if name in pointers:
                strides.update(_strides(letter, axes, pointers[name]))
        # Triton starts kernels on the current device, whatever the device of their arguments
        with torch.cuda.device_of(self.A):
            kernel[(int(torch.Size(grid).numel()),)](
                **{f'{name}_ptr': tensor for name, tensor in pointers.items()}, **strides, **self.blocks,
                length=self.length, heads=self.heads, size=self.size, groups=self.groups, state=self.state,
                SIGN=sign, ACC=tl.float64 if self.A.dtype == torch.float64 else tl.float32, PRECISION='ieee',
                num_warps=4, num_stages=2, **more)

    def cuts(self, *names: str) -> tuple[int, ...]:
        """Returns the numbers of tiles along the axes 'L', 'N' and 'P'."""
        extents = {'L': self.length, 'N': self.state, 'P': self.size}
        return tuple(triton.cdiv(extents[name], self.blocks[f'BLOCK_{name}']) for name in names)

    def sum(self, q: torch.Tensor, x: torch.Tensor, sign: int) -> torch.Tensor:
        """Returns the sum over positions of the outer products of q (B, L, G, N) and x (B, L, M, P).

        It is (B, G, N, M / G * P), the heads of a group side by side.
        """
        parts = triton.cdiv(self.length, PART)
        blocks_n, blocks_p = self.cuts('N', 'P')
        state = self.A.new_empty(self.batch, parts, self.groups, self.state, self.heads // self.groups * self.size)
        self.launch(
            _sum_kernel, (self.batch, parts, self.heads, blocks_n, blocks_p), sign,
            {'x': x, 'dt': self.dt, 'A': self.A, 'q': q, 'state': state},
            parts=parts, blocks_n=blocks_n, blocks_p=blocks_p, PART=PART)
        return state[:, 0] if parts == 1 else state.sum(1)

    def read(
            self,
            q: torch.Tensor,
            state: torch.Tensor,
            skip: torch.Tensor,
            D: torch.Tensor | None,
            x: torch.Tensor,
            sign: int,
            dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns what positions read, (B, L, M, P): weighted, and with D times `skip` added.

        With weights also the gradient of these, (B, L, M), by what was read and `x`.
        """
        blocks_l, = self.cuts('L')
        out = self.A.new_empty(x.shape, dtype=dtype)
        dweights = self.A.new_empty(x.shape[:3]) if sign else None
        self.launch(
            _read_kernel, (self.batch, self.heads, blocks_l), sign,
            {'q': q, 'state': state, 'skip': skip, 'D': D, 'x': x, 'dt': self.dt, 'A': self.A, 'out': out,
             'dweight': dweights},
            blocks_l=blocks_l, HAS_D=D is not None)
        return out, dweights

    def contract(self, x: torch.Tensor, state: torch.Tensor, sign: int) -> torch.Tensor:
        """Returns (B, L, G, N): the products of x (B, L, M, P) and a state, summed over the heads of a group."""
        blocks_l, blocks_n = self.cuts('L', 'N')
        out = self.A.new_empty(self.batch, self.length, self.groups, self.state)
        self.launch(
            _contract_kernel, (self.batch, self.groups, blocks_l, blocks_n), sign,
            {'x': x, 'dt': self.dt, 'A': self.A, 'state': state, 'out': out}, blocks_l=blocks_l, blocks_n=blocks_n)
        return out


def forward(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        positive: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes all positions; see `reference`."""
    problem = _Problem(x, dt, A, B, positive)
    state = problem.sum(B, x, problem.sign)
    return problem.read(C, state, x, D, x, 0, x.dtype)[0], state


def backward(
        dout: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        state: torch.Tensor,
        positive: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients; see `reference`."""
    problem = _Problem(x, dt, A, B, positive)
    sign = problem.sign
    dstate = problem.sum(C, dout, 0)
    dx, dweights = problem.read(B, dstate, dout, D, x, sign, A.dtype)
    return (dx, dweights * (sign * A), sign * (dweights * dt).sum((0, 1)), problem.contract(x, dstate, sign),
            problem.contract(dout, state, 0),
            None if D is None else (dout.to(A.dtype) * x.to(A.dtype)).sum(3).sum((0, 1)))
