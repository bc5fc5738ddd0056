"""The three skinny products that LoRA adds to a linear layer, for up to three sibling projections in one launch.

========  =====================================  ==========================================================
`down`    u_j = s_j (x * m_j) M_j^T               x A^T in the forward, dY B in the backward
`outer`   G_j = s_j u_j^T (x * m_j)               dA = (dY B)^T x and dB^T = (x A^T)^T dY
`expand`  y = sum_j s_j (u_j M_j) * m_j           (x A^T) B^T in the forward, (dY B) A in the backward
========  =====================================  ==========================================================

Each reads or writes one activation-sized tensor once and everything else is r wide, so all three are bound by memory. Adapters
are read in their own dtype and rounded to the compute dtype in registers: no cast copies. ``m_j`` are optional bit-packed keep masks
(``ops/dropout.py``). Siblings either share x (q, k, v on one input) or own a column range of it (the gradients of stacked outputs).

u is [T, sum of padded ranks]: sibling j owns ``rank_slots`` consecutive columns, its rank rounded up to a power of two of at
least 16 (a tensor-core tile), zero beyond the rank, so that no kernel masks its columns.
Accumulation is fp32 in a fixed order; sums over splits are a second pass, never atomics.
Ranks whose slots exceed ``MAX_SLOTS`` in all run as library GEMMs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._dispatch import use_triton
from ._launch import device_limits, jit, launch, tl
from .dropout import apply_dropout_bits

MAX_SLOTS = 128


class Siblings(NamedTuple):
    """Up to three factor matrices of one product, all of one dtype; entries of absent adapters are left out.

    Args:
        mats: matrices [r_j, K_j] of any strides (``A``, or ``B.t()``).
        scales: one factor a matrix.
        starts: first column of x that belongs to each matrix; None: they share all of x.
        masks: int32 [J, T, words], or None.
    """

    mats: tuple[torch.Tensor, ...]
    scales: tuple[float, ...]
    starts: tuple[int, ...] | None = None
    masks: torch.Tensor | None = None


def rank_slots(rank: int) -> int:
    """Columns of u that an adapter of this rank occupies: the next power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def slot_starts(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """First column of each sibling in u, and the total width last."""
    starts = [0]
    for rank in ranks:
        starts.append(starts[-1] + rank_slots(rank))
    return tuple(starts)


@jit
def dropped(x, bits_ptr, rows, start, row_mask, K: tl.constexpr, WORDS: tl.constexpr, BLOCK_K: tl.constexpr):
    """x [BLOCK_T, BLOCK_K] with dropped elements zeroed; its columns begin at ``start``, a multiple of 32."""
    # Whole words are loaded and expanded: one load an element would fill shared memory with copies of the words.
    words = start // 32 + tl.arange(0, BLOCK_K // 32)
    at = bits_ptr + rows[:, None].to(tl.int64) * WORDS + words[None, :]
    kept = tl.load(at, mask=row_mask[:, None] & (words < WORDS)[None, :], other=0)
    kept = (kept[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.where(tl.reshape(kept, (x.shape[0], BLOCK_K)) != 0, x, 0.0)


@jit
def _down_one(acc, x, m_ptr, cols, K: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, SR: tl.constexpr, SK: tl.constexpr,
              PRECISION: tl.constexpr):
    ranks = tl.arange(0, SLOTS)
    m = tl.load(m_ptr + cols[:, None] * SK + ranks[None, :] * SR, mask=(cols < K)[:, None] & (ranks < R)[None, :], other=0.0)
    return tl.dot(x, m.to(x.dtype), acc, input_precision=PRECISION)


@jit
def _load_x(x_ptr, u_ptr, rows, cols, row_mask, stride, K: tl.constexpr):
    at = x_ptr + rows[:, None].to(tl.int64) * stride + cols[None, :]
    return tl.load(at, mask=row_mask[:, None] & (cols < K)[None, :], other=0.0).to(u_ptr.dtype.element_ty)


@jit(do_not_specialize=["T"])
def _down_kernel(
    x_ptr, m0_ptr, m1_ptr, m2_ptr, bits_ptr, u_ptr, s0, s1, s2, T,
    STRIDE: tl.constexpr, J: tl.constexpr, SHARED: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, SLOTS0: tl.constexpr, SLOTS1: tl.constexpr, SLOTS2: tl.constexpr,
    SR0: tl.constexpr, SR1: tl.constexpr, SR2: tl.constexpr, SK0: tl.constexpr, SK1: tl.constexpr, SK2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < T
    bits1_ptr = bits_ptr + T.to(tl.int64) * WORDS
    bits2_ptr = bits1_ptr + T.to(tl.int64) * WORDS
    acc0 = tl.zeros([BLOCK_T, SLOTS0], tl.float32)
    acc1 = tl.zeros([BLOCK_T, SLOTS1], tl.float32)
    acc2 = tl.zeros([BLOCK_T, SLOTS2], tl.float32)
    for k in range(0, K0, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        x = _load_x(x_ptr + C0, u_ptr, rows, cols, row_mask, STRIDE, K0)
        x0 = dropped(x, bits_ptr, rows, k, row_mask, K0, WORDS, BLOCK_K) if WORDS else x
        acc0 = _down_one(acc0, x0, m0_ptr, cols, K0, R0, SLOTS0, SR0, SK0, PRECISION)
        if SHARED and J > 1:
            x1 = dropped(x, bits1_ptr, rows, k, row_mask, K0, WORDS, BLOCK_K) if WORDS else x
            acc1 = _down_one(acc1, x1, m1_ptr, cols, K0, R1, SLOTS1, SR1, SK1, PRECISION)
        if SHARED and J > 2:
            x2 = dropped(x, bits2_ptr, rows, k, row_mask, K0, WORDS, BLOCK_K) if WORDS else x
            acc2 = _down_one(acc2, x2, m2_ptr, cols, K0, R2, SLOTS2, SR2, SK2, PRECISION)
    if not SHARED and J > 1:
        for k in range(0, K1, BLOCK_K):
            cols = k + tl.arange(0, BLOCK_K)
            x = _load_x(x_ptr + C1, u_ptr, rows, cols, row_mask, STRIDE, K1)
            acc1 = _down_one(acc1, x, m1_ptr, cols, K1, R1, SLOTS1, SR1, SK1, PRECISION)
    if not SHARED and J > 2:
        for k in range(0, K2, BLOCK_K):
            cols = k + tl.arange(0, BLOCK_K)
            x = _load_x(x_ptr + C2, u_ptr, rows, cols, row_mask, STRIDE, K2)
            acc2 = _down_one(acc2, x, m2_ptr, cols, K2, R2, SLOTS2, SR2, SK2, PRECISION)
    at = u_ptr + rows[:, None].to(tl.int64) * WIDTH
    tl.store(at + tl.arange(0, SLOTS0)[None, :], (acc0 * s0).to(u_ptr.dtype.element_ty), mask=row_mask[:, None])
    if J > 1:
        tl.store(at + (SLOTS0 + tl.arange(0, SLOTS1))[None, :], (acc1 * s1).to(u_ptr.dtype.element_ty), mask=row_mask[:, None])
    if J > 2:
        tl.store(at + (SLOTS0 + SLOTS1 + tl.arange(0, SLOTS2))[None, :], (acc2 * s2).to(u_ptr.dtype.element_ty), mask=row_mask[:, None])


@jit
def _outer_store(g_ptr, acc, cols, col_mask, first, SLOTS: tl.constexpr, GK: tl.constexpr, GR: tl.constexpr):
    at = g_ptr + cols[:, None].to(tl.int64) * GK + (first + tl.arange(0, SLOTS))[None, :] * GR
    tl.store(at, acc, mask=col_mask[:, None])


@jit(do_not_specialize=["T", "t_split"])
def _outer_kernel(
    x_ptr, u_ptr, bits_ptr, g_ptr, s0, s1, s2, T, t_split,
    STRIDE: tl.constexpr, J: tl.constexpr, SHARED: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    SLOTS0: tl.constexpr, SLOTS1: tl.constexpr, SLOTS2: tl.constexpr,
    G_SIZE: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, GK: tl.constexpr, GR: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Program (p, s): one block of columns, one range of rows. Column blocks of the siblings follow each other when each has its own.
    block = tl.program_id(0)
    split = tl.program_id(1)
    t_start = split * t_split
    t_end = tl.minimum(t_start + t_split, T)
    g_ptr += split.to(tl.int64) * G_SIZE
    BLOCKS0: tl.constexpr = (K0 + BLOCK_K - 1) // BLOCK_K
    BLOCKS1: tl.constexpr = (K1 + BLOCK_K - 1) // BLOCK_K
    if SHARED:
        cols = block * BLOCK_K + tl.arange(0, BLOCK_K)
        col_mask = cols < K0
        bits1_ptr = bits_ptr + T.to(tl.int64) * WORDS
        bits2_ptr = bits1_ptr + T.to(tl.int64) * WORDS
        acc0 = tl.zeros([BLOCK_K, SLOTS0], tl.float32)
        acc1 = tl.zeros([BLOCK_K, SLOTS1], tl.float32)
        acc2 = tl.zeros([BLOCK_K, SLOTS2], tl.float32)
        for t in range(t_start, t_end, BLOCK_T):
            rows = t + tl.arange(0, BLOCK_T)
            row_mask = rows < t_end
            x = _load_x(x_ptr + C0, u_ptr, rows, cols, row_mask, STRIDE, K0)
            u_at = u_ptr + rows[:, None].to(tl.int64) * WIDTH
            x0 = dropped(x, bits_ptr, rows, block * BLOCK_K, row_mask, K0, WORDS, BLOCK_K) if WORDS else x
            u = tl.load(u_at + tl.arange(0, SLOTS0)[None, :], mask=row_mask[:, None], other=0.0)
            acc0 = tl.dot(tl.trans(x0), u, acc0, input_precision=PRECISION)
            if J > 1:
                x1 = dropped(x, bits1_ptr, rows, block * BLOCK_K, row_mask, K0, WORDS, BLOCK_K) if WORDS else x
                u = tl.load(u_at + (SLOTS0 + tl.arange(0, SLOTS1))[None, :], mask=row_mask[:, None], other=0.0)
                acc1 = tl.dot(tl.trans(x1), u, acc1, input_precision=PRECISION)
            if J > 2:
                x2 = dropped(x, bits2_ptr, rows, block * BLOCK_K, row_mask, K0, WORDS, BLOCK_K) if WORDS else x
                u = tl.load(u_at + (SLOTS0 + SLOTS1 + tl.arange(0, SLOTS2))[None, :], mask=row_mask[:, None], other=0.0)
                acc2 = tl.dot(tl.trans(x2), u, acc2, input_precision=PRECISION)
        _outer_store(g_ptr, acc0 * s0, cols, col_mask, 0, SLOTS0, GK, GR)
        if J > 1:
            _outer_store(g_ptr + G1, acc1 * s1, cols, col_mask, 0, SLOTS1, GK, GR)
        if J > 2:
            _outer_store(g_ptr + G2, acc2 * s2, cols, col_mask, 0, SLOTS2, GK, GR)
    else:
        # All siblings have the same number of slots here (the host pads), so one accumulator serves whichever this block is.
        column, size, first, scale, g_at = C0, K0, 0, s0, 0
        if J > 1 and block >= BLOCKS0:
            block -= BLOCKS0
            column, size, first, scale, g_at = C1, K1, SLOTS0, s1, G1
            if J > 2 and block >= BLOCKS1:
                block -= BLOCKS1
                column, size, first, scale, g_at = C2, K2, SLOTS0 + SLOTS1, s2, G2
        cols = block * BLOCK_K + tl.arange(0, BLOCK_K)
        col_mask = cols < size
        acc = tl.zeros([BLOCK_K, SLOTS0], tl.float32)
        for t in range(t_start, t_end, BLOCK_T):
            rows = t + tl.arange(0, BLOCK_T)
            row_mask = rows < t_end
            at = x_ptr + column + rows[:, None].to(tl.int64) * STRIDE + cols[None, :]
            x = tl.load(at, mask=row_mask[:, None] & col_mask[None, :], other=0.0).to(u_ptr.dtype.element_ty)
            u_at = u_ptr + rows[:, None].to(tl.int64) * WIDTH + (first + tl.arange(0, SLOTS0))[None, :]
            u = tl.load(u_at, mask=row_mask[:, None], other=0.0)
            acc = tl.dot(tl.trans(x), u, acc, input_precision=PRECISION)
        _outer_store(g_ptr + g_at, acc * scale, cols, col_mask, 0, SLOTS0, GK, GR)


@jit
def _expand_one(u_at, m_ptr, cols, row_mask, N: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, SR: tl.constexpr,
                SN: tl.constexpr, PRECISION: tl.constexpr):
    ranks = tl.arange(0, SLOTS)
    u = tl.load(u_at + ranks[None, :], mask=row_mask[:, None], other=0.0)
    m = tl.load(m_ptr + ranks[:, None] * SR + cols[None, :] * SN, mask=(ranks < R)[:, None] & (cols < N)[None, :], other=0.0)
    return tl.dot(u, m.to(u.dtype), input_precision=PRECISION)


@jit(do_not_specialize=["T"])
def _expand_kernel(
    u_ptr, m0_ptr, m1_ptr, m2_ptr, bits_ptr, y_ptr, s0, s1, s2, T,
    STRIDE: tl.constexpr, J: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, SLOTS0: tl.constexpr, SLOTS1: tl.constexpr, SLOTS2: tl.constexpr,
    SR0: tl.constexpr, SR1: tl.constexpr, SR2: tl.constexpr, SN0: tl.constexpr, SN1: tl.constexpr, SN2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < T
    u_at = u_ptr + rows[:, None].to(tl.int64) * WIDTH
    y = _expand_one(u_at, m0_ptr, cols, row_mask, N, R0, SLOTS0, SR0, SN0, PRECISION) * s0
    if WORDS:
        y = dropped(y, bits_ptr, rows, tl.program_id(1) * BLOCK_N, row_mask, N, WORDS, BLOCK_N)
    if J > 1:
        y1 = _expand_one(u_at + SLOTS0, m1_ptr, cols, row_mask, N, R1, SLOTS1, SR1, SN1, PRECISION) * s1
        if WORDS:
            y1 = dropped(y1, bits_ptr + T.to(tl.int64) * WORDS, rows, tl.program_id(1) * BLOCK_N, row_mask, N, WORDS, BLOCK_N)
        y += y1
    if J > 2:
        y2 = _expand_one(u_at + SLOTS0 + SLOTS1, m2_ptr, cols, row_mask, N, R2, SLOTS2, SR2, SN2, PRECISION) * s2
        if WORDS:
            y2 = dropped(y2, bits_ptr + T.to(tl.int64) * 2 * WORDS, rows, tl.program_id(1) * BLOCK_N, row_mask, N, WORDS, BLOCK_N)
        y += y2
    at = y_ptr + rows[:, None].to(tl.int64) * STRIDE + cols[None, :]
    mask = row_mask[:, None] & (cols < N)[None, :]
    if ADD:
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)


def precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch's own TF32 setting (``tl.dot`` alone would default to TF32)."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def widened(t: torch.Tensor) -> torch.Tensor:
    """In the dtype of element-wise arithmetic: float32, or float64 for float64."""
    return t if t.dtype is torch.float64 else t.float()


def _three(values, filler):
    """Exactly three kernel arguments from one to three values."""
    return (*values, *(filler,) * (3 - len(values)))


def _stages(x: torch.Tensor) -> int:
    """Pipeline depth: three stages of the largest case (three masked siblings) need 108 KiB, which sm_86, 89 and 120 lack."""
    return 3 if device_limits(x.get_device()).smem >= 160 * 1024 else 2


def _fits_kernels(x: torch.Tensor, ranks: tuple[int, ...]) -> bool:
    return use_triton(x) and slot_starts(ranks)[-1] <= MAX_SLOTS and x.stride(-1) == 1


def down(x: torch.Tensor, siblings: Siblings, dtype: torch.dtype) -> torch.Tensor:
    """``u_j = scale_j (x * mask_j) M_j^T`` for all siblings.

    Args:
        x: [T, K] (rows may be strided).
        siblings: matrices [r_j, K_j].
        dtype: compute dtype; x and the matrices are rounded to it, products accumulate in fp32, u is stored in it.

    Returns:
        [T, sum of slots], zero in the columns beyond each rank.
    """
    mats, scales, starts, masks = siblings
    ranks = tuple(m.shape[0] for m in mats)
    slots = slot_starts(ranks)
    tokens = x.shape[0]
    if not _fits_kernels(x, ranks):
        return _down_library(x, siblings, slots, dtype)
    u = torch.empty((tokens, slots[-1]), dtype=dtype, device=x.device)
    if tokens == 0:
        return u
    block_t = 64 if tokens >= 4096 else 32 if tokens >= 2048 else 16
    args = (x, *_three(mats, mats[0]), x if masks is None else masks, u, *_three(scales, 0.0), tokens)
    consts = (
        x.stride(0), len(mats), starts is None, 0 if masks is None else masks.shape[2], slots[-1],
        *_three(starts or (0,), 0), *_three([m.shape[1] for m in mats], 0),
        *_three(ranks, 0), *_three([rank_slots(r) for r in ranks], 16),
        *_three([m.stride(0) for m in mats], 0), *_three([m.stride(1) for m in mats], 0),
        precision(dtype), block_t, 64 if dtype is torch.float32 else 128,
    )  # fmt: skip
    launch(_down_kernel, ((tokens + block_t - 1) // block_t,), args, consts, num_warps=4, num_stages=_stages(x))
    return u


def _columns(x: torch.Tensor, siblings: Siblings, j: int) -> torch.Tensor:
    """The part of x that sibling j reads, its mask applied."""
    if siblings.starts is not None:
        start = siblings.starts[j]
        return x[:, start : start + siblings.mats[j].shape[1]]
    return x if siblings.masks is None else apply_dropout_bits(x, siblings.masks[j])


def _down_library(x, siblings, slots, dtype):
    u = torch.zeros((x.shape[0], slots[-1]), dtype=dtype, device=x.device)
    for j, (m, scale) in enumerate(zip(siblings.mats, siblings.scales)):
        torch.mm(_columns(x, siblings, j).to(dtype), m.to(dtype).t(), out=(part := u.new_empty(x.shape[0], m.shape[0])))
        u[:, slots[j] : slots[j] + m.shape[0]] = part * scale
    return u


def outer(x: torch.Tensor, u: torch.Tensor, siblings: Siblings, dtype: torch.dtype, *, transposed: bool = False):
    """``G_j = scale_j u_j^T (x * mask_j)``: the gradient of each sibling's matrix, in that matrix' dtype.

    Args:
        x: [T, K].
        u: [T, sum of slots] as ``down`` lays it out.
        siblings: as for ``down``; the matrices give shapes and dtype only.
        dtype: compute dtype of the products; accumulation is fp32.
        transposed: return [K_j, r_j] (for dB) instead of [r_j, K_j] (for dA), contiguous either way.
    """
    mats, scales, starts, masks = siblings
    ranks = tuple(m.shape[0] for m in mats)
    slots = slot_starts(ranks)
    tokens = x.shape[0]
    same_slots = len({rank_slots(r) for r in ranks}) == 1
    if tokens == 0 or not _fits_kernels(x, ranks) or not (starts is None or same_slots):
        return _outer_library(x, u, siblings, slots, dtype, transposed)
    widths = [m.shape[1] for m in mats]
    block_k, block_t = (64, 32) if dtype is torch.float32 else (64, 64)
    blocks = (widths[0] + block_k - 1) // block_k if starts is None else sum((w + block_k - 1) // block_k for w in widths)
    splits = max(1, min((tokens + 4 * block_t - 1) // (4 * block_t), (4 * device_limits(x.get_device()).sm_count + blocks - 1) // blocks))
    t_split = -(-tokens // splits)
    t_split = -(-t_split // block_t) * block_t
    splits = -(-tokens // t_split)
    sizes = [w * rank_slots(r) for w, r in zip(widths, ranks)]
    total = sum(sizes)
    g = torch.empty((splits, total), dtype=torch.float32, device=x.device)
    # Siblings' gradients follow each other in g; within one, element (k, r) is at k * GK + r * GR.
    slot = rank_slots(ranks[0])
    uniform = len(set(widths)) == 1
    if transposed and same_slots:
        gk, gr = slot, 1
    elif not transposed and uniform:
        gk, gr = 1, widths[0]
    else:
        return _outer_library(x, u, siblings, slots, dtype, transposed)
    args = (x, u, x if masks is None else masks, g, *_three(scales, 0.0), tokens, t_split)
    consts = (
        x.stride(0), len(mats), starts is None, 0 if masks is None else masks.shape[2], u.stride(0),
        *_three(starts or (0,), 0), *_three(widths, 0), *_three([rank_slots(r) for r in ranks], 16),
        total, sizes[0], sum(sizes[:2]), gk, gr, precision(dtype), block_t, block_k,
    )  # fmt: skip
    launch(_outer_kernel, (blocks, splits), args, consts, num_warps=4, num_stages=_stages(x))
    g = g[0] if splits == 1 else g.sum(0)
    grads = []
    at = 0
    for m, rank, size, width in zip(mats, ranks, sizes, widths):
        part = g[at : at + size]
        part = part.view(width, -1)[:, :rank] if transposed else part.view(-1, width)[:rank]
        grads.append(part.to(m.dtype).contiguous())
        at += size
    return grads


def _outer_library(x, u, siblings, slots, dtype, transposed):
    grads = []
    for j, (m, scale) in enumerate(zip(siblings.mats, siblings.scales)):
        u_j = u[:, slots[j] : slots[j] + m.shape[0]].to(dtype)
        x_j = _columns(x, siblings, j).to(dtype)
        left, right = (x_j, u_j) if transposed else (u_j, x_j)
        grads.append((widened(torch.mm(left.t(), right)) * scale).to(m.dtype))
    return grads


def expand(u: torch.Tensor, siblings: Siblings, dtype: torch.dtype, y: torch.Tensor, *, add: bool = False) -> torch.Tensor:
    """``y (+)= sum_j scale_j (u_j M_j) * mask_j``, written into ``y`` [T, N] (rows may be strided).

    Args:
        u: [T, sum of slots].
        siblings: matrices [r_j, N], all of one N.
        dtype: compute dtype of the products; the sum is fp32, rounded once to y's dtype.
        add: add to what y holds instead of overwriting it.
    """
    mats, scales, _, masks = siblings
    ranks = tuple(m.shape[0] for m in mats)
    tokens, width = y.shape
    if tokens == 0:
        return y
    if not _fits_kernels(y, ranks):
        return _expand_library(u, siblings, slot_starts(ranks), dtype, y, add)
    block_t, block_n = (64, 128) if tokens >= 2048 else (32, 128)
    args = (u, *_three(mats, mats[0]), y if masks is None else masks, y, *_three(scales, 0.0), tokens)
    consts = (
        y.stride(0), len(mats), 0 if masks is None else masks.shape[2], u.stride(0), width, add,
        *_three(ranks, 0), *_three([rank_slots(r) for r in ranks], 16),
        *_three([m.stride(0) for m in mats], 0), *_three([m.stride(1) for m in mats], 0),
        precision(dtype), block_t, block_n,
    )  # fmt: skip
    grid = ((tokens + block_t - 1) // block_t, (width + block_n - 1) // block_n)
    launch(_expand_kernel, grid, args, consts, num_warps=4 if masks is None else 8, num_stages=2)
    return y


def _expand_library(u, siblings, slots, dtype, y, add):
    total = widened(y) if add else 0.0
    for j, (m, scale) in enumerate(zip(siblings.mats, siblings.scales)):
        part = widened(torch.mm(u[:, slots[j] : slots[j] + m.shape[0]].to(dtype), m.to(dtype))) * scale
        total = total + (part if siblings.masks is None else apply_dropout_bits(part, siblings.masks[j]))
    return y.copy_(total)
