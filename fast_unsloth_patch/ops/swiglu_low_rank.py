"""SwiGLU with what it makes for the adapter of the down projection, in one pass each way.

``h = silu(gate) * up`` is both what the down projection multiplies and what its lora_A does. Forward, ``u = h A^T``: h
is written and not read again for u. A program owns a range of rows and walks along them with its part of u in
registers. Backward, ``dA = du^T h``: h has to be formed again anyway, from gate and up, which SwiGLU's gradients need
too; it stays in registers, neither written nor read. A program owns a stripe of columns and a range of rows, and walks
down its rows with its part of ``h^T du`` in registers; parts, fp32, are summed by a second launch in a fixed order: no
atomics, the same bits every time.

Measured slower on an H200 (benchmarks/results/h200-notes.md): the backward for experts, whose rows change the matrix
that they belong to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import INTERPRETED, Config, device_limits, jit, launch, tl
from .down_outer import DTYPES, SUM_BLOCK, SUM_CHUNK, split_rows, sum_parts

SLOTS = (16, 32)
_CAPABILITY = 90
# Rows and columns of a block. Measured with 16 slots on 8192 x 14336: 178 us forward (the memory alone: 166), 287
# backward (276).
_FORWARD = Config((16, 64)) if INTERPRETED else Config((32, 256), num_warps=8, num_stages=1)
_BACKWARD = Config((16, 64)) if INTERPRETED else Config((16, 128), num_warps=4, num_stages=1)
# Programs of the backward that a multiprocessor is given.
_PROGRAMS = 8


@jit
def _gated_tiles(x_row, a_ptr, n, at_x, at_a, cols, row_mask, N: tl.constexpr, GATED: tl.constexpr):
    # gate and up (or h, twice) and A of the columns from n on.
    col_mask = n + cols < N
    mask = row_mask[:, None] & col_mask[None, :]
    x = tl.load(x_row + n + at_x, mask=mask, other=0.0)
    up = x
    if GATED:
        up = tl.load(x_row + N + n + at_x, mask=mask, other=0.0)
    a = tl.load(a_ptr + n + at_a, mask=col_mask[None, :], other=0.0)
    return x, up, a


@jit(do_not_specialize=["T"])
def swiglu_down_kernel(
    x_ptr, a_ptr, h_ptr, u_ptr, T,
    N: tl.constexpr, GATED: tl.constexpr, SLOTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # From gate and up side by side, of which h is made and written, or from h itself.
    STRIDE: tl.constexpr = 2 * N if GATED else N
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    lanes, cols, slots = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N), tl.arange(0, SLOTS)
    row_mask = first + lanes < T
    at_x = lanes[:, None] * STRIDE + cols[None, :]
    at_h = lanes[:, None] * N + cols[None, :]
    at_a = slots[:, None] * N + cols[None, :]
    x_row, h_row = x_ptr + first * STRIDE, h_ptr + first * N
    u = tl.zeros([BLOCK_T, SLOTS], tl.float32)
    x, up, a = _gated_tiles(x_row, a_ptr, 0, at_x, at_a, cols, row_mask, N, GATED)
    for n in tl.range(0, N, BLOCK_N):
        # Asked for before these are used.
        next_x, next_up, next_a = _gated_tiles(x_row, a_ptr, n + BLOCK_N, at_x, at_a, cols, row_mask, N, GATED)
        h = x
        if GATED:
            gate = x.to(tl.float32)
            h = (gate * tl.sigmoid(gate) * up.to(tl.float32)).to(h_ptr.dtype.element_ty)
            tl.store(h_row + n + at_h, h, mask=row_mask[:, None] & (n + cols < N)[None, :])
        u = tl.dot(h, tl.trans(a), u, input_precision="ieee")
        x, up, a = next_x, next_up, next_a
    u_at = u_ptr + first * SLOTS + lanes[:, None] * SLOTS + slots[None, :]
    tl.store(u_at, u.to(u_ptr.dtype.element_ty), mask=row_mask[:, None])


@jit
def _tiles(dh_ptr, gu_ptr, t, end, at_dh, at_gu, lanes, col_mask, N: tl.constexpr):
    # dh, gate and up of the rows from t on, in their own dtype; only what moves is 64 bits wide.
    mask = (t + lanes < end)[:, None] & col_mask[None, :]
    row = tl.cast(t, tl.int64)
    dh = tl.load(dh_ptr + row * N + at_dh, mask=mask, other=0.0)
    gate = tl.load(gu_ptr + row * (2 * N) + at_gu, mask=mask, other=0.0)
    up = tl.load(gu_ptr + row * (2 * N) + N + at_gu, mask=mask, other=0.0)
    return dh, gate, up


@jit(do_not_specialize=["T", "t_split"])
def swiglu_outer_kernel(
    dh_ptr, gu_ptr, dgu_ptr, du_ptr, g_ptr, T, t_split, du_stride,
    N: tl.constexpr, SLOTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    stripe, split, stripes = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    cols, slots, lanes = tl.arange(0, BLOCK_N), tl.arange(0, SLOTS), tl.arange(0, BLOCK_T)
    first = stripe * BLOCK_N
    col_mask = first + cols < N
    at_dh = lanes[:, None] * N + first + cols[None, :]
    at_gu = lanes[:, None] * (2 * N) + first + cols[None, :]
    start = split * t_split
    end = tl.minimum(start + t_split, T)
    g = tl.zeros([BLOCK_N, SLOTS], tl.float32)
    dh, gate, up = _tiles(dh_ptr, gu_ptr, start, end, at_dh, at_gu, lanes, col_mask, N)
    for t in tl.range(start, end, BLOCK_T):
        # Asked for before this block's are used.
        next_dh, next_gate, next_up = _tiles(dh_ptr, gu_ptr, t + BLOCK_T, end, at_dh, at_gu, lanes, col_mask, N)
        row_mask = t + lanes < end
        mask = row_mask[:, None] & col_mask[None, :]
        du_at = du_ptr + tl.cast(t, tl.int64) * du_stride + lanes[:, None] * du_stride + slots[None, :]
        du = tl.load(du_at, mask=row_mask[:, None], other=0.0)
        grad, x = dh.to(tl.float32), gate.to(tl.float32)
        sig = tl.sigmoid(x)
        silu = x * sig
        other = up.to(tl.float32)
        h = (silu * other).to(dh_ptr.dtype.element_ty)
        g = tl.dot(tl.trans(h), du, g, input_precision="ieee")
        row_ptr = dgu_ptr + tl.cast(t, tl.int64) * (2 * N)
        dgate = grad * other * (sig + silu * (1.0 - sig))
        tl.store(row_ptr + at_gu, dgate.to(dgu_ptr.dtype.element_ty), mask=mask)
        tl.store(row_ptr + N + at_gu, (grad * silu).to(dgu_ptr.dtype.element_ty), mask=mask)
        dh, gate, up = next_dh, next_gate, next_up
    part = g_ptr + (split.to(tl.int64) * stripes + stripe) * BLOCK_N * SLOTS
    tl.store(part + cols[:, None] * SLOTS + slots[None, :], g)


@jit(do_not_specialize=["splits"])
def swiglu_outer_sum_kernel(
    g_parts, g_ptr, N, size, splits, rank,
    ROUND: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # A block of G^T, [rank, N]. A part has ``size`` elements, [N rounded up to whole stripes, SLOTS].
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col, slot = offs // SLOTS, offs % SLOTS
    g = sum_parts(g_parts, splits, size, offs, col < N, BLOCK, CHUNK)
    if ROUND:  # what overflows there must: see low_rank.mm_wide
        g = g.to(tl.float16).to(tl.float32)
    tl.store(g_ptr + slot * N + col, g.to(g_ptr.dtype.element_ty), mask=(col < N) & (slot < rank))


def covers(x: Tensor, slots: int) -> bool:
    """Whether there are kernels for this (x is gate and up, h or dh): else SwiGLU and the product are to be called."""
    if slots not in SLOTS or not use_triton(x) or x.dtype not in DTYPES or not x.numel():
        return False
    return INTERPRETED or device_limits(x.get_device()).capability >= _CAPABILITY


def swiglu_down(gu: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """``h = silu(gate) up`` and ``u = h A^T``.

    Args:
        gu: [T, 2 N] contiguous, gate and up, bfloat16 or float16.
        packed: [slots, N] contiguous, of gu's dtype: A scaled, zero beyond the rank (`low_rank.pack`); `covers` has
            been asked.

    Returns:
        h [T, N] and u [T, slots] in gu's dtype. u is of the rounded h, its sums are fp32.
    """
    h = gu.new_empty((gu.shape[0], packed.shape[1]))
    return h, _run(gu, packed, h)


def hidden_down(h: Tensor, packed: Tensor) -> Tensor:
    """The u of `swiglu_down`, to the bit, of an h [T, N] contiguous that is there already.

    So a layer whose gate and up are kept trains as one that is recomputed, where h comes from a product's epilogue.
    """
    return _run(h, packed, None)


def _run(x: Tensor, packed: Tensor, h: Tensor | None) -> Tensor:
    tokens, (slots, width) = x.shape[0], packed.shape
    (block_t, block_n), num_warps, num_stages, _, _ = _FORWARD
    u = x.new_empty((tokens, slots))
    args, consts = (x, packed, x if h is None else h, u, tokens), (width, h is not None, slots, block_t, block_n)
    launch(swiglu_down_kernel, (-(-tokens // block_t),), args, consts, num_warps=num_warps, num_stages=num_stages)
    return u


def swiglu_outer(dh: Tensor, gu: Tensor, dgu: Tensor, du: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """``dgate = dh up silu'(gate)``, ``dup = dh silu(gate)`` and ``G = du^T h`` with ``h = silu(gate) up``.

    Args:
        dh: [T, N] contiguous, bfloat16 or float16.
        gu: [T, 2 N] contiguous, gate and up, of dh's dtype.
        dgu: [T, 2 N], receives dgate and dup; may be gu.
        du: [T, slots] of dh's dtype; `covers` has been asked.
        rank: of the adapter, up to its slots.
        dtype: of G.

    Returns:
        G [rank, N]. h is rounded to dh's dtype, sums are fp32.
    """
    tokens, width = dh.shape
    slots = du.shape[1]
    (block_t, block_n), num_warps, num_stages, _, _ = _BACKWARD
    stripes = -(-width // block_n)
    t_split = split_rows(tokens, stripes, block_t, device_limits(dh.get_device()).sm_count * _PROGRAMS)
    splits = -(-tokens // t_split)
    size = stripes * block_n * slots
    parts = torch.empty(splits * size, dtype=torch.float32, device=dh.device)
    g = torch.empty((rank, width), dtype=dtype, device=dh.device)
    args = (dh, gu, dgu, du, parts, tokens, t_split, du.stride(0))
    consts = (width, slots, block_t, block_n)
    launch(swiglu_outer_kernel, (stripes, splits), args, consts, num_warps=num_warps, num_stages=num_stages)
    sums = (parts, g, width, size, splits, rank)
    sum_consts = (dh.dtype is torch.float16, slots, SUM_BLOCK, SUM_CHUNK)
    launch(swiglu_outer_sum_kernel, (-(-width * slots // SUM_BLOCK),), sums, sum_consts)
    return g
