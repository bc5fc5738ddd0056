"""Both skinny products of one activation in one pass over it.

``d_j = s_j x_j M_j^T`` and ``G_j = u_j^T x_j``: what ``low_rank.down`` and ``low_rank.outer`` compute in two passes
that are bound by reading x. With x = dY and M = B^T they are ``dY B`` and ``dB``; with x the hidden activation of an
MLP and M = A they are ``u = h A^T`` and ``dA``.

A program owns a stripe of columns of x and a range of rows. Its tile of M stays in shared memory and its part of G in
registers while it walks down the rows; for each block of rows it leaves its part of d. The parts, fp32, are summed by a
second launch in a fixed order: no atomics, the same bits every time. Written and read, mostly from the L2 cache, the
parts of d are ``4 slots / stripe`` of the bytes of x: an eighth for 16 slots and 512 columns. So the stripe is as wide
as shared memory allows, and beyond 32 slots two passes cost less.
"""

from __future__ import annotations

from functools import cache

import torch

from ..device.dispatch import use_triton
from ..device.launch import INTERPRETED, Config, Limits, device_limits, jit, launch, tl
from .low_rank import Siblings, layout_of, rank_slots

# By slots: rows and columns of a block. The products need operands straight from shared memory (sm_90, sm_100): on
# other chips x would have to pass through registers twice, unpipelined. Per multiprocessor one program of the first.
STRIPES = {
    16: (Config((64, 512), num_warps=8, num_stages=3, smem=219 * 1024, min_capability=90),),
    32: (Config((64, 256), num_warps=4, num_stages=3, smem=133 * 1024, min_capability=90),),
}
# Exact, not fast: the interpreter's bfloat16 is wrong, its float32 a good oracle.
_INTERPRETED = Config((32, 64))
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.bfloat16, torch.float16)
# What a program costs beside its blocks of rows, in blocks: filling the pipeline, leaving its part of G.
_START = 2
SUM_BLOCK = 1024
SUM_CHUNK = 8


@jit(do_not_specialize=["T", "t_split"])
def _down_outer_kernel(
    x_ptr, u_ptr, m0_ptr, m1_ptr, m2_ptr, d_ptr, g_ptr, T, t_split, stride, u_stride, c0, c1, c2, k0, k1, k2,
    J: tl.constexpr, BY_ROWS: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stripe, split = tl.program_id(0), tl.program_id(1)
    stripes = tl.num_programs(0)
    m_ptr, rank, first, column, width, block = m0_ptr, R0, U0, c0, k0, stripe
    if J > 1:  # noqa: SIM102  (a constexpr and a run-time condition)
        if stripe >= tl.cdiv(k0, BLOCK_K):
            m_ptr, rank, first, column, width, block = m1_ptr, R1, U1, c1, k1, stripe - tl.cdiv(k0, BLOCK_K)
    if J > 2:  # noqa: SIM102
        if stripe >= tl.cdiv(k0, BLOCK_K) + tl.cdiv(k1, BLOCK_K):
            m_ptr, rank, first, column, width = m2_ptr, R2, U2, c2, k2
            block = stripe - tl.cdiv(k0, BLOCK_K) - tl.cdiv(k1, BLOCK_K)
    cols, ranks, lanes = block * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, SLOTS), tl.arange(0, BLOCK_T)
    col_mask, rank_mask = cols < width, ranks < rank
    at = cols[:, None] * rank + ranks[None, :] if BY_ROWS else ranks[None, :] * width + cols[:, None]
    m = tl.load(m_ptr + at, mask=col_mask[:, None] & rank_mask[None, :], other=0.0).to(x_ptr.dtype.element_ty)
    g = tl.zeros([BLOCK_K, SLOTS], tl.float32)
    x_at = lanes[:, None] * stride + (column + cols)[None, :]
    u_at = lanes[:, None] * u_stride + (first + ranks)[None, :]
    d_at = d_ptr + stripe.to(tl.int64) * T * SLOTS
    for t in range(split * t_split, tl.minimum(split * t_split + t_split, T), BLOCK_T):
        row_mask = t + lanes < T
        # Only what moves is 64 bits wide: offsets within a tile would take twice the registers.
        x_row, u_row = x_ptr + tl.cast(t, tl.int64) * stride, u_ptr + tl.cast(t, tl.int64) * u_stride
        x = tl.load(x_row + x_at, mask=row_mask[:, None] & col_mask[None, :], other=0.0)
        u = tl.load(u_row + u_at, mask=row_mask[:, None] & rank_mask[None, :], other=0.0)
        d = tl.dot(x, m, input_precision="ieee")
        g = tl.dot(tl.trans(x), u, g, input_precision="ieee")
        tl.store(d_at + (t + lanes)[:, None] * SLOTS + ranks[None, :], d, mask=row_mask[:, None])
    g_at = g_ptr + (split.to(tl.int64) * stripes + stripe) * BLOCK_K * SLOTS
    tl.store(g_at + tl.arange(0, BLOCK_K)[:, None] * SLOTS + ranks[None, :], g)


@jit
def sum_parts(ptr, parts, stride, offs, mask, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    # Several parts at once: one after another, each load would wait for the one before.
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, parts, CHUNK):
        part = first + tl.arange(0, CHUNK)
        at = ptr + part.to(tl.int64)[:, None] * stride + offs[None, :]
        total += tl.sum(tl.load(at, mask=(part < parts)[:, None] & mask[None, :], other=0.0), 0)
    return total


@jit
def _sum_d(
    parts, d_ptr, block, stripe, stripes, scale, first, slots, T, d_stride,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    offs = block * BLOCK + tl.arange(0, BLOCK)
    size = T.to(tl.int64) * SLOTS
    mask = offs < T * SLOTS
    d = sum_parts(parts + stripe * size, stripes, size, offs, mask, BLOCK, CHUNK) * scale
    row, slot = offs // SLOTS, offs % SLOTS
    at = d_ptr + row.to(tl.int64) * d_stride + first + slot
    tl.store(at, d.to(d_ptr.dtype.element_ty), mask=mask & (slot < slots))


@jit(do_not_specialize=["T", "splits"])
def _down_outer_sum_kernel(
    d_parts, g_parts, d_ptr, g_ptr, s0, s1, s2, T, splits, d_stride, k0, k1, k2,
    J: tl.constexpr, BY_ROWS: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, SLOTS: tl.constexpr, BLOCK_K: tl.constexpr,
    FP16: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    # The first stripe of the second and of the third sibling, and how many there are.
    second = tl.cdiv(k0, BLOCK_K)
    third = second + tl.cdiv(k1, BLOCK_K) if J > 1 else second
    stripes = third + tl.cdiv(k2, BLOCK_K) if J > 2 else third
    row_blocks = tl.cdiv(T * SLOTS, BLOCK)
    if block < J * row_blocks:
        j = block // row_blocks
        at, count, scale, first, slots = 0, second, s0, U0, SLOTS
        if J > 1:
            slots = U1
            if j == 1:
                at, count, scale, first, slots = second, third - second, s1, U1, (U2 if J > 2 else U1 + SLOTS) - U1
        if J > 2:  # noqa: SIM102  (a constexpr and a run-time condition)
            if j == 2:
                at, count, scale, first, slots = third, stripes - third, s2, U2, SLOTS
        # The last sibling's slots are not bounded by another's first column, but by the end of d.
        slots = min(slots, d_stride - first)
        _sum_d(d_parts, d_ptr, block % row_blocks, at, count, scale, first, slots, T, d_stride, SLOTS, BLOCK, CHUNK)
    else:
        block -= J * row_blocks
        offs = block * BLOCK + tl.arange(0, BLOCK)
        size = stripes * BLOCK_K * SLOTS
        g = sum_parts(g_parts, splits, size, offs, offs < size, BLOCK, CHUNK)
        # BLOCK divides BLOCK_K * SLOTS: a block lies within one stripe.
        stripe = block * BLOCK // (BLOCK_K * SLOTS)
        rank, width, before, start = R0, k0, 0, 0
        if J > 1:  # noqa: SIM102
            if stripe >= second:
                rank, width, before, start = R1, k1, k0 * R0, second
        if J > 2:  # noqa: SIM102
            if stripe >= third:
                rank, width, before, start = R2, k2, k0 * R0 + k1 * R1, third
        col, slot = offs // SLOTS - start * BLOCK_K, offs % SLOTS
        g_at = col * rank + slot if BY_ROWS else slot * width + col
        if FP16:  # what overflows there must: see low_rank.mm_wide
            g = g.to(tl.float16)
        tl.store(g_ptr + before + g_at, g.to(g_ptr.dtype.element_ty), mask=(col < width) & (slot < rank))


def stripe_of(slots: int, limits: Limits) -> Config | None:
    """The configuration for these slots on such a chip; None where two passes are the better way."""
    for stripe in STRIPES.get(slots, ()):
        if INTERPRETED:
            return _INTERPRETED
        if stripe.smem <= limits.smem and stripe.min_capability <= limits.capability:
            return stripe
    return None


def covers(x: torch.Tensor, siblings: Siblings, dtype: torch.dtype) -> bool:
    """Whether `down_outer` has a kernel for this: else `down` and `outer` (or library GEMMs) are to be called."""
    mats, _, by_rows, starts, masks = siblings
    slots = rank_slots(max([m.shape[1 if by_rows else 0] for m in mats]))
    return (
        use_triton(x)
        and masks is None
        and (starts is not None or len(mats) == 1)
        and x.dtype is dtype
        and dtype in DTYPES
        and x.stride(-1) == 1
        and x.shape[0] > 0
        and all([m.dtype is mats[0].dtype for m in mats])
        and stripe_of(slots, device_limits(x.get_device())) is not None
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@cache
def split_rows(tokens: int, stripes: int, block_t: int, programs: int) -> int:
    """Rows of one program, a multiple of ``block_t``: the least work of a chip that runs ``programs`` at once."""
    blocks = _ceil(tokens, block_t)

    def cost(rows: int) -> int:
        return _ceil(stripes * _ceil(blocks, rows), programs) * (rows + _START)

    return min(range(1, blocks + 1), key=lambda rows: (cost(rows), -rows)) * block_t


def down_outer(
    x: torch.Tensor, u: torch.Tensor, siblings: Siblings, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``d_j = scale_j x_j M_j^T`` and ``G_j = u_j^T x_j`` from one pass over x.

    Args:
        x: [T, K] in ``dtype`` (rows may be strided); sibling j reads the columns from ``starts[j]`` on.
        u: [T, sum of slots] in ``dtype``, as ``low_rank.down`` lays it out.
        siblings: the matrices, each with its own columns of x, without masks; ``scales`` are of d only.
        dtype: compute dtype; the matrices are rounded to it, products accumulate in fp32.

    Returns:
        d [T, sum of slots] in ``dtype``, zero beyond each rank; and the G_j in the shape and dtype of the matrices,
        views of one buffer.
    """
    mats, scales, by_rows, starts, _ = siblings
    axis = 1 if by_rows else 0
    ranks = tuple([m.shape[axis] for m in mats])
    layout = layout_of(ranks)
    if not covers(x, siblings, dtype):
        return _reference(x, u, siblings, layout, dtype)
    count, tokens = len(mats), x.shape[0]
    limits = device_limits(x.get_device())
    slots = max(layout.slots)
    (block_t, block_k), num_warps, num_stages, smem, _ = stripe_of(slots, limits)  # type: ignore[misc]
    widths = [m.shape[1 - axis] for m in mats]
    stripes = sum([_ceil(w, block_k) for w in widths])
    t_split = split_rows(tokens, stripes, block_t, limits.sm_count * (limits.smem // smem if smem else 1))
    splits = _ceil(tokens, t_split)
    d_size, g_size = stripes * tokens * slots, stripes * block_k * slots
    parts = torch.empty(d_size + splits * g_size, dtype=torch.float32, device=x.device)
    g_parts = parts[d_size:]
    d = torch.empty((tokens, layout.width), dtype=dtype, device=x.device)
    g = torch.empty(sum([m.numel() for m in mats]), dtype=mats[0].dtype, device=x.device)
    pad = 3 - count
    starts = (0,) if starts is None else starts
    cols, k, m = (*starts, *(0,) * pad), (*widths, *(0,) * pad), (*mats, *(mats[0],) * pad)
    of_ranks = (*ranks, *(0,) * pad, *layout.starts, *(0,) * pad, slots)
    args = (x, u, *m, parts, g_parts, tokens, t_split, x.stride(0), u.stride(0), *cols, *k)
    consts = (count, by_rows, *of_ranks, block_t, block_k)
    launch(_down_outer_kernel, (stripes, splits), args, consts, num_warps=num_warps, num_stages=num_stages)
    blocks = count * _ceil(tokens * slots, SUM_BLOCK) + g_size // SUM_BLOCK
    sums = (parts, g_parts, d, g, *scales, *(0.0,) * pad, tokens, splits, d.stride(0), *k)
    sum_consts = (count, by_rows, *of_ranks, block_k, dtype is torch.float16, SUM_BLOCK, SUM_CHUNK)
    launch(_down_outer_sum_kernel, (blocks,), sums, sum_consts)
    return d, [part.view(m.shape) for m, part in zip(mats, g.split([m.numel() for m in mats]))]


def _reference(x, u, siblings, layout, dtype):
    mats, scales, by_rows, starts, _ = siblings
    d = torch.zeros((x.shape[0], layout.width), dtype=dtype, device=x.device)
    grads = []
    for m, scale, start, at in zip(mats, scales, starts or (0,), layout.starts):
        m_j = m.to(dtype) if by_rows else m.to(dtype).t()
        width, rank = m_j.shape
        x_j, u_j = x[:, start : start + width].to(dtype), u[:, at : at + rank].to(dtype)
        d[:, at : at + rank] = torch.mm(x_j, m_j) * scale
        g = torch.mm(x_j.t(), u_j)
        grads.append((g if by_rows else g.t()).to(m.dtype).contiguous())
    return d, grads
