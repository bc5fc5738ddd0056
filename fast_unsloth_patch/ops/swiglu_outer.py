"""SwiGLU's backward and the gradient of the down projection's lora_A in one pass.

``h = silu(gate) * up`` is what lora_A of the down projection multiplies: ``dA = du^T h``. Backward has to form h again
anyway, from gate and up, which SwiGLU's gradients need too. Here it stays in registers: neither written nor read.

A program owns a stripe of columns and a range of rows, and walks down its rows with its part of ``h^T du`` in
registers; parts, fp32, are summed by a second launch in a fixed order: no atomics, the same bits every time.

Measured slower on an H200 (benchmarks/results/h200-notes.md): the same for experts, whose rows change the matrix that
they belong to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import INTERPRETED, Config, Limits, device_limits, jit, launch, tl
from .down_outer import DTYPES, SUM_BLOCK, SUM_CHUNK, split_rows, sum_parts

# By slots: rows and columns of a block. Measured with 16 slots: 287 us for 8192 x 14336, of which 276 is the memory's.
BLOCKS = {
    16: (Config((16, 128), num_warps=4, num_stages=1, min_capability=90),),
    32: (Config((16, 128), num_warps=4, num_stages=1, min_capability=90),),
}
_INTERPRETED = Config((16, 64))
# Programs that a multiprocessor is given.
_PROGRAMS = 8


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


def _config(slots: int, limits: Limits) -> Config | None:
    if INTERPRETED and slots in BLOCKS:
        return _INTERPRETED
    return next((c for c in BLOCKS.get(slots, ()) if c.min_capability <= limits.capability), None)


def covers(dh: Tensor, slots: int) -> bool:
    """Whether there is a kernel for this: else SwiGLU's backward and the product with h are to be called."""
    if not use_triton(dh) or dh.dtype not in DTYPES or not dh.numel():
        return False
    return _config(slots, device_limits(dh.get_device())) is not None


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
    limits = device_limits(dh.get_device())
    (block_t, block_n), num_warps, num_stages, _, _ = _config(slots, limits)  # type: ignore[misc]
    stripes = -(-width // block_n)
    t_split = split_rows(tokens, stripes, block_t, limits.sm_count * _PROGRAMS)
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
