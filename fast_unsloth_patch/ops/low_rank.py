"""The skinny products that LoRA adds to a linear layer, for up to three sibling projections at once.

============  ======================================  ==========================================================
`down`        u_j = s_j (x * m_j) M_j^T                x A^T in the forward, dY B in the backward
`outer`       G_j = s_j u_j^T (x * m_j)                dA = (dY B)^T x and dB^T = (x A^T)^T dY
`expand`      y = sum_j s_j (u_j M_j) * m_j            (x A^T) B^T in the forward, (dY B) A in the backward
============  ======================================  ==========================================================

Each reads or writes one activation-sized tensor once and everything else is r wide, so all are bound by memory. There are two ways
to run them, and the measured choice (benchmarks/results) is:

* **Library GEMMs over packed adapters** where nothing drops out and all operands have one dtype: `pack` rounds the adapters of a
  group to the compute dtype, side by side, in one launch, and cuBLAS does the rest (27 us for x A^T of q, k, v at 8192 x 4096).
* **Triton kernels** where masks are applied or dtypes mix: they read adapters and activations in their own dtype and apply the masks
  in registers, so that neither masked nor cast copies of an activation are made.

``m_j`` are bit-packed keep masks (``ops/dropout.py``). Siblings either share x (q, k, v on one input) or own a column range of it (the
gradients of stacked outputs). u is [T, sum of slots]: sibling j owns ``rank_slots`` consecutive columns, its rank rounded up to a power of
two of at least 16 (a tensor-core tile), zero beyond the rank, so that no kernel masks its columns.
Accumulation is fp32 in a fixed order; sums over splits are a second pass, never atomics.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from ._dispatch import use_triton
from ._launch import device_limits, jit, launch, tl
from .dropout import apply_dropout_bits

MAX_SLOTS = 128
_PACK_BLOCK = 1024


class Siblings(NamedTuple):
    """Up to three factor matrices of one product, contiguous and of one dtype; absent adapters are left out.

    Args:
        mats: matrices [r_j, K_j] (``A``); or [K_j, r_j] (``B``) where ``by_rows``.
        scales: one factor a matrix.
        by_rows: the matrices are stored transposed, a row of r_j for each of the K_j.
        starts: first column of x that belongs to each matrix; None: they share all of x.
        masks: int32 [J, T, words], or None.
    """

    mats: tuple[torch.Tensor, ...]
    scales: tuple[float, ...]
    by_rows: bool = False
    starts: tuple[int, ...] | None = None
    masks: torch.Tensor | None = None


class Layout(NamedTuple):
    """Where each sibling of given ranks is in u."""

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    width: int


@cache
def rank_slots(rank: int) -> int:
    """Columns of u that an adapter of this rank occupies: the next power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


@cache
def layout_of(ranks: tuple[int, ...]) -> Layout:
    """Slots, first columns and total width of siblings with these ranks."""
    slots = tuple(rank_slots(r) for r in ranks)
    return Layout(slots, tuple(sum(slots[:i]) for i in range(len(slots))), sum(slots))


def _ranks(siblings: Siblings) -> tuple[int, ...]:
    axis = 1 if siblings.by_rows else 0
    return tuple([m.shape[axis] for m in siblings.mats])


def _widths(siblings: Siblings) -> list[int]:
    axis = 0 if siblings.by_rows else 1
    return [m.shape[axis] for m in siblings.mats]


@jit
def dropped(x, bits_ptr, rows, start, row_mask, words, BLOCK_K: tl.constexpr):
    """x [BLOCK_T, BLOCK_K] with dropped elements zeroed; its columns begin at ``start``, a multiple of 32."""
    # Whole words are loaded and expanded: one load an element would fill shared memory with copies of the words.
    offs = start // 32 + tl.arange(0, BLOCK_K // 32)
    at = bits_ptr + rows[:, None].to(tl.int64) * words + offs[None, :]
    kept = tl.load(at, mask=row_mask[:, None] & (offs < words)[None, :], other=0)
    kept = (kept[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.where(tl.reshape(kept, (x.shape[0], BLOCK_K)) != 0, x, 0.0)


@jit
def _load_x(x_ptr, u_ptr, rows, cols, row_mask, stride, width):
    at = x_ptr + rows[:, None].to(tl.int64) * stride + cols[None, :]
    return tl.load(at, mask=row_mask[:, None] & (cols < width)[None, :], other=0.0).to(u_ptr.dtype.element_ty)


@jit
def load_factor(m_ptr, cols, width, R: tl.constexpr, SLOTS: tl.constexpr, BY_ROWS: tl.constexpr, RANKS_FIRST: tl.constexpr):
    """A tile of a factor matrix, [SLOTS, cols] or [cols, SLOTS], zero beyond the rank."""
    ranks = tl.arange(0, SLOTS)
    if RANKS_FIRST:
        at = ranks[:, None] + cols[None, :].to(tl.int64) * R if BY_ROWS else ranks[:, None].to(tl.int64) * width + cols[None, :]
        return tl.load(m_ptr + at, mask=(ranks < R)[:, None] & (cols < width)[None, :], other=0.0)
    else:
        at = ranks[None, :] + cols[:, None].to(tl.int64) * R if BY_ROWS else ranks[None, :].to(tl.int64) * width + cols[:, None]
        return tl.load(m_ptr + at, mask=(ranks < R)[None, :] & (cols < width)[:, None], other=0.0)


@jit(do_not_specialize=["T"])
def _down_kernel(
    x_ptr, m0_ptr, m1_ptr, m2_ptr, bits_ptr, u_ptr, s0, s1, s2, T, stride, words, c0, c1, c2, k0, k1, k2,
    J: tl.constexpr, SHARED: tl.constexpr, BY_ROWS: tl.constexpr, MASKED: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, SLOTS0: tl.constexpr, SLOTS1: tl.constexpr, SLOTS2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < T
    WIDTH: tl.constexpr = SLOTS0 + (SLOTS1 if J > 1 else 0) + (SLOTS2 if J > 2 else 0)
    bits1_ptr = bits_ptr + T.to(tl.int64) * words
    bits2_ptr = bits1_ptr + T.to(tl.int64) * words
    acc0 = tl.zeros([BLOCK_T, SLOTS0], tl.float32)
    acc1 = tl.zeros([BLOCK_T, SLOTS1], tl.float32)
    acc2 = tl.zeros([BLOCK_T, SLOTS2], tl.float32)
    for k in range(0, k0, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        x = _load_x(x_ptr + c0, u_ptr, rows, cols, row_mask, stride, k0)
        x0 = dropped(x, bits_ptr, rows, k, row_mask, words, BLOCK_K) if MASKED else x
        m = load_factor(m0_ptr, cols, k0, R0, SLOTS0, BY_ROWS, False)
        acc0 = tl.dot(x0, m.to(x.dtype), acc0, input_precision=PRECISION)
        if SHARED and J > 1:
            x1 = dropped(x, bits1_ptr, rows, k, row_mask, words, BLOCK_K) if MASKED else x
            m = load_factor(m1_ptr, cols, k0, R1, SLOTS1, BY_ROWS, False)
            acc1 = tl.dot(x1, m.to(x.dtype), acc1, input_precision=PRECISION)
        if SHARED and J > 2:
            x2 = dropped(x, bits2_ptr, rows, k, row_mask, words, BLOCK_K) if MASKED else x
            m = load_factor(m2_ptr, cols, k0, R2, SLOTS2, BY_ROWS, False)
            acc2 = tl.dot(x2, m.to(x.dtype), acc2, input_precision=PRECISION)
    if not SHARED and J > 1:
        for k in range(0, k1, BLOCK_K):
            cols = k + tl.arange(0, BLOCK_K)
            x = _load_x(x_ptr + c1, u_ptr, rows, cols, row_mask, stride, k1)
            m = load_factor(m1_ptr, cols, k1, R1, SLOTS1, BY_ROWS, False)
            acc1 = tl.dot(x, m.to(x.dtype), acc1, input_precision=PRECISION)
    if not SHARED and J > 2:
        for k in range(0, k2, BLOCK_K):
            cols = k + tl.arange(0, BLOCK_K)
            x = _load_x(x_ptr + c2, u_ptr, rows, cols, row_mask, stride, k2)
            m = load_factor(m2_ptr, cols, k2, R2, SLOTS2, BY_ROWS, False)
            acc2 = tl.dot(x, m.to(x.dtype), acc2, input_precision=PRECISION)
    at = u_ptr + rows[:, None].to(tl.int64) * WIDTH
    tl.store(at + tl.arange(0, SLOTS0)[None, :], (acc0 * s0).to(u_ptr.dtype.element_ty), mask=row_mask[:, None])
    if J > 1:
        tl.store(at + (SLOTS0 + tl.arange(0, SLOTS1))[None, :], (acc1 * s1).to(u_ptr.dtype.element_ty), mask=row_mask[:, None])
    if J > 2:
        at += SLOTS0 + SLOTS1
        tl.store(at + tl.arange(0, SLOTS2)[None, :], (acc2 * s2).to(u_ptr.dtype.element_ty), mask=row_mask[:, None])


@jit
def _outer_tile(x, u_ptr, bits_ptr, rows, start, row_mask, words, acc, u_stride, first, MASKED: tl.constexpr, SLOTS: tl.constexpr,
                PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    if MASKED:
        x = dropped(x, bits_ptr, rows, start, row_mask, words, BLOCK_K)
    at = u_ptr + rows[:, None].to(tl.int64) * u_stride + (first + tl.arange(0, SLOTS))[None, :]
    u = tl.load(at, mask=row_mask[:, None], other=0.0)
    return tl.dot(tl.trans(x), u, acc, input_precision=PRECISION)


@jit
def _outer_store(g_ptr, acc, cols, col_mask, SLOTS: tl.constexpr, gk, gr):
    at = g_ptr + cols[:, None].to(tl.int64) * gk + tl.arange(0, SLOTS)[None, :].to(tl.int64) * gr
    tl.store(at, acc, mask=col_mask[:, None])


@jit(do_not_specialize=["T", "t_split"])
def _outer_kernel(
    x_ptr, u_ptr, bits_ptr, g_ptr, s0, s1, s2, T, t_split, stride, u_stride, words, c0, c1, c2, k0, k1, k2, g_size, g1, g2, gk, gr,
    J: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    SLOTS0: tl.constexpr, SLOTS1: tl.constexpr, SLOTS2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Program (p, s): one block of columns, one range of rows. Column blocks of the siblings follow each other when each has its own.
    block = tl.program_id(0)
    split = tl.program_id(1)
    t_start = split * t_split
    t_end = tl.minimum(t_start + t_split, T)
    g_ptr += split.to(tl.int64) * g_size
    if SHARED:
        start = block * BLOCK_K
        cols = start + tl.arange(0, BLOCK_K)
        col_mask = cols < k0
        bits1_ptr = bits_ptr + T.to(tl.int64) * words
        bits2_ptr = bits1_ptr + T.to(tl.int64) * words
        acc0 = tl.zeros([BLOCK_K, SLOTS0], tl.float32)
        acc1 = tl.zeros([BLOCK_K, SLOTS1], tl.float32)
        acc2 = tl.zeros([BLOCK_K, SLOTS2], tl.float32)
        for t in range(t_start, t_end, BLOCK_T):
            rows = t + tl.arange(0, BLOCK_T)
            row_mask = rows < t_end
            x = _load_x(x_ptr + c0, u_ptr, rows, cols, row_mask, stride, k0)
            acc0 = _outer_tile(x, u_ptr, bits_ptr, rows, start, row_mask, words, acc0, u_stride, 0, MASKED, SLOTS0, PRECISION, BLOCK_K)
            if J > 1:
                acc1 = _outer_tile(x, u_ptr, bits1_ptr, rows, start, row_mask, words, acc1, u_stride, SLOTS0, MASKED, SLOTS1,
                                   PRECISION, BLOCK_K)  # fmt: skip
            if J > 2:
                acc2 = _outer_tile(x, u_ptr, bits2_ptr, rows, start, row_mask, words, acc2, u_stride, SLOTS0 + SLOTS1, MASKED, SLOTS2,
                                   PRECISION, BLOCK_K)  # fmt: skip
        _outer_store(g_ptr, acc0 * s0, cols, col_mask, SLOTS0, gk, gr)
        if J > 1:
            _outer_store(g_ptr + g1, acc1 * s1, cols, col_mask, SLOTS1, gk, gr)
        if J > 2:
            _outer_store(g_ptr + g2, acc2 * s2, cols, col_mask, SLOTS2, gk, gr)
    else:
        # All siblings have the same number of slots here (the host sees to it), so one accumulator serves whichever this block is.
        column, width, first, scale, g_at = c0, k0, 0, s0, 0
        blocks0 = tl.cdiv(k0, BLOCK_K)
        if J > 1 and block >= blocks0:
            block -= blocks0
            column, width, first, scale, g_at = c1, k1, SLOTS0, s1, g1
            blocks1 = tl.cdiv(k1, BLOCK_K)
            if J > 2 and block >= blocks1:
                block -= blocks1
                column, width, first, scale, g_at = c2, k2, SLOTS0 + SLOTS1, s2, g2
        start = block * BLOCK_K
        cols = start + tl.arange(0, BLOCK_K)
        acc = tl.zeros([BLOCK_K, SLOTS0], tl.float32)
        for t in range(t_start, t_end, BLOCK_T):
            rows = t + tl.arange(0, BLOCK_T)
            row_mask = rows < t_end
            x = _load_x(x_ptr + column, u_ptr, rows, cols, row_mask, stride, width)
            acc = _outer_tile(x, u_ptr, bits_ptr, rows, start, row_mask, words, acc, u_stride, first, False, SLOTS0, PRECISION, BLOCK_K)
        _outer_store(g_ptr + g_at, acc * scale, cols, cols < width, SLOTS0, gk, gr)


@jit
def _expand_one(u_at, m_ptr, cols, row_mask, width, R: tl.constexpr, SLOTS: tl.constexpr, BY_ROWS: tl.constexpr,
                PRECISION: tl.constexpr):
    u = tl.load(u_at + tl.arange(0, SLOTS)[None, :], mask=row_mask[:, None], other=0.0)
    m = load_factor(m_ptr, cols, width, R, SLOTS, BY_ROWS, True)
    return tl.dot(u, m.to(u.dtype), input_precision=PRECISION)


@jit(do_not_specialize=["T"])
def _expand_kernel(
    u_ptr, m0_ptr, m1_ptr, m2_ptr, bits_ptr, y_ptr, s0, s1, s2, T, stride, u_stride, words, width,
    J: tl.constexpr, BY_ROWS: tl.constexpr, MASKED: tl.constexpr, ADD: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, SLOTS0: tl.constexpr, SLOTS1: tl.constexpr, SLOTS2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = tl.program_id(1) * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    row_mask = rows < T
    u_at = u_ptr + rows[:, None].to(tl.int64) * u_stride
    y = _expand_one(u_at, m0_ptr, cols, row_mask, width, R0, SLOTS0, BY_ROWS, PRECISION) * s0
    if MASKED:
        y = dropped(y, bits_ptr, rows, start, row_mask, words, BLOCK_N)
    if J > 1:
        y1 = _expand_one(u_at + SLOTS0, m1_ptr, cols, row_mask, width, R1, SLOTS1, BY_ROWS, PRECISION) * s1
        if MASKED:
            y1 = dropped(y1, bits_ptr + T.to(tl.int64) * words, rows, start, row_mask, words, BLOCK_N)
        y += y1
    if J > 2:
        y2 = _expand_one(u_at + SLOTS0 + SLOTS1, m2_ptr, cols, row_mask, width, R2, SLOTS2, BY_ROWS, PRECISION) * s2
        if MASKED:
            y2 = dropped(y2, bits_ptr + T.to(tl.int64) * 2 * words, rows, start, row_mask, words, BLOCK_N)
        y += y2
    at = y_ptr + rows[:, None].to(tl.int64) * stride + cols[None, :]
    mask = row_mask[:, None] & (cols < width)[None, :]
    if ADD:
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _pack_piece(m_ptr, out_ptr, block, scale, size, inner, inner_out, BLOCK: tl.constexpr):
    # Rows of `inner` elements become rows of `inner_out`, the rest zero.
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = offs // inner_out, offs % inner_out
    value = tl.load(m_ptr + row * inner + col, mask=(offs < size) & (col < inner), other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=offs < size)


@jit
def _pack_kernel(
    m0_ptr, m1_ptr, m2_ptr, out_ptr, s0, s1, s2, size0, size1, size2, in0, in1, in2, out0, out1, out2,
    J: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    blocks0 = tl.cdiv(size0, BLOCK)
    if J == 1 or block < blocks0:
        _pack_piece(m0_ptr, out_ptr, block, s0, size0, in0, out0, BLOCK)
    else:
        blocks1 = tl.cdiv(size1, BLOCK)
        if J == 2 or block < blocks0 + blocks1:
            _pack_piece(m1_ptr, out_ptr + size0, block - blocks0, s1, size1, in1, out1, BLOCK)
        else:
            _pack_piece(m2_ptr, out_ptr + size0 + size1, block - blocks0 - blocks1, s2, size2, in2, out2, BLOCK)


def precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch's own TF32 setting (``tl.dot`` alone would default to TF32)."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def widened(t: torch.Tensor) -> torch.Tensor:
    """In the dtype of element-wise arithmetic: float32, or float64 for float64."""
    return t if t.dtype is torch.float64 else t.float()


def _three(values, filler):
    """Exactly three kernel arguments from one to three values."""
    n = len(values)
    return values if n == 3 else (*values, filler, filler) if n == 1 else (*values, filler)


def _stages(x: torch.Tensor) -> int:
    """Pipeline depth: three stages of the largest case (three masked siblings) need 108 KiB, which sm_86, 89 and 120 lack."""
    return 3 if device_limits(x.get_device()).smem >= 160 * 1024 else 2


def _fits_kernels(x: torch.Tensor, layout: Layout) -> bool:
    return use_triton(x) and layout.width <= MAX_SLOTS and x.stride(-1) == 1


def pack(siblings: Siblings, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The scaled matrices in the compute dtype, padded to their slots with zeros, in one launch and one buffer.

    Returns:
        The buffer, and in it a matrix a sibling, one after another: [slots_j, K_j], or [K_j, slots_j] where they are ``by_rows``.
    """
    mats, scales, by_rows, _, _ = siblings
    ranks, widths = _ranks(siblings), _widths(siblings)
    slots = layout_of(ranks).slots
    sizes = [w * n for w, n in zip(widths, slots)]
    out = torch.empty(sum(sizes), dtype=dtype, device=mats[0].device)
    shaped, at = [], 0
    for width, n, size in zip(widths, slots, sizes):
        shaped.append(out.as_strided((width, n), (n, 1), at) if by_rows else out.as_strided((n, width), (width, 1), at))
        at += size
    if use_triton(out):
        inner = ranks if by_rows else [m.numel() for m in mats]
        inner_out = slots if by_rows else sizes
        blocks = sum([-(-size // _PACK_BLOCK) for size in sizes])
        args = (*_three(mats, mats[0]), out, *_three(scales, 0.0), *_three(sizes, 0), *_three(inner, 0), *_three(inner_out, 1))
        launch(_pack_kernel, (blocks,), args, (len(mats), _PACK_BLOCK))
        return out, shaped
    for m, scale, part, rank in zip(mats, scales, shaped, ranks):
        part.zero_()
        (part[:, :rank] if by_rows else part[:rank]).copy_(m * scale)
    return out, shaped


def mm_wide(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b`` with the result in ``dtype``; on CUDA an fp32 result of half-precision operands is not rounded on the way."""
    if dtype is a.dtype:
        return torch.mm(a, b)
    if dtype is torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(dtype)


def down(x: torch.Tensor, siblings: Siblings, dtype: torch.dtype) -> torch.Tensor:
    """``u_j = scale_j (x * mask_j) M_j^T`` for all siblings.

    Args:
        x: [T, K] (rows may be strided).
        siblings: the matrices.
        dtype: compute dtype; x and the matrices are rounded to it, products accumulate in fp32, u is stored in it.

    Returns:
        [T, sum of slots], zero in the columns beyond each rank.
    """
    mats, scales, by_rows, starts, masks = siblings
    ranks, widths = _ranks(siblings), _widths(siblings)
    layout = layout_of(ranks)
    tokens = x.shape[0]
    u = torch.empty((tokens, layout.width), dtype=dtype, device=x.device)
    if tokens == 0:
        return u
    if not _fits_kernels(x, layout):
        return _down_reference(x, siblings, layout, u)
    masked = masks is not None
    block_t = 64 if tokens >= 4096 else 32 if tokens >= 2048 else 16
    args = (
        x, *_three(mats, mats[0]), masks if masked else x, u, *_three(scales, 0.0), tokens, x.stride(0),
        masks.shape[2] if masked else 0, *_three(starts or (0,), 0), *_three(widths, 0),
    )  # fmt: skip
    consts = (
        len(mats), starts is None, by_rows, masked, *_three(ranks, 0), *_three(layout.slots, 16),
        precision(dtype), block_t, 64 if dtype is torch.float32 else 128,
    )  # fmt: skip
    launch(_down_kernel, (-(-tokens // block_t),), args, consts, num_warps=4, num_stages=_stages(x))
    return u


def _columns(x: torch.Tensor, siblings: Siblings, j: int, width: int) -> torch.Tensor:
    """The part of x that sibling j reads, its mask applied."""
    if siblings.starts is not None:
        return x[:, siblings.starts[j] : siblings.starts[j] + width]
    return x if siblings.masks is None else apply_dropout_bits(x, siblings.masks[j])


def _down_reference(x, siblings, layout, u):
    u.zero_()
    for j, (m, scale, at) in enumerate(zip(siblings.mats, siblings.scales, layout.starts)):
        m = m.to(u.dtype) if siblings.by_rows else m.to(u.dtype).t()
        part = torch.mm(_columns(x, siblings, j, m.shape[0]).to(u.dtype), m)
        u[:, at : at + m.shape[1]] = part * scale
    return u


def outer(x: torch.Tensor, u: torch.Tensor, siblings: Siblings, dtype: torch.dtype) -> list[torch.Tensor]:
    """``G_j = scale_j u_j^T (x * mask_j)``: the gradient of each sibling's matrix, in that matrix' shape and dtype.

    Args:
        x: [T, K].
        u: [T, sum of slots] as ``down`` lays it out.
        siblings: as for ``down``; the matrices give shapes and dtype only.
        dtype: compute dtype of the products; accumulation is fp32.
    """
    mats, scales, by_rows, starts, masks = siblings
    ranks, widths = _ranks(siblings), _widths(siblings)
    layout = layout_of(ranks)
    tokens = x.shape[0]
    if tokens == 0 or not _fits_kernels(x, layout) or (starts is not None and len(set(layout.slots)) > 1):
        return _outer_reference(x, u, siblings, layout, dtype)
    block_k, block_t = (64, 32) if dtype is torch.float32 else (64, 64)
    blocks = -(-widths[0] // block_k) if starts is None else sum([-(-w // block_k) for w in widths])
    splits = max(1, min(tokens // (4 * block_t), -(-4 * device_limits(x.get_device()).sm_count // blocks)))
    t_split = -(--(-tokens // splits) // block_t) * block_t if splits > 1 else tokens
    splits = -(-tokens // t_split)
    sizes = [w * n for w, n in zip(widths, layout.slots)]
    total = sum(sizes)
    # Siblings' gradients follow each other in g; within one, element (k, r) is at k * gk + r * gr.
    g = torch.empty((splits, total), dtype=torch.float32, device=x.device)
    masked = masks is not None
    gk, gr = (layout.slots[0], 1) if by_rows else (1, widths[0])
    args = (
        x, u, masks if masked else x, g, *_three(scales, 0.0), tokens, t_split, x.stride(0), u.stride(0),
        masks.shape[2] if masked else 0, *_three(starts or (0,), 0), *_three(widths, 0), total, sizes[0], sum(sizes[:2]), gk, gr,
    )  # fmt: skip
    consts = (len(mats), starts is None, masked, *_three(layout.slots, 16), precision(dtype), block_t, block_k)
    launch(_outer_kernel, (blocks, splits), args, consts, num_warps=4, num_stages=_stages(x))
    g = g[0] if splits == 1 else g.sum(0)
    parts = zip(mats, ranks, widths, g.split(sizes))
    return [
        (part.view(width, -1)[:, :rank] if by_rows else part.view(-1, width)[:rank]).to(m.dtype).contiguous()
        for m, rank, width, part in parts
    ]


def _outer_reference(x, u, siblings, layout, dtype):
    grads = []
    for j, (m, scale, at) in enumerate(zip(siblings.mats, siblings.scales, layout.starts)):
        rank, width = m.shape[::-1] if siblings.by_rows else m.shape
        u_j, x_j = u[:, at : at + rank].to(dtype), _columns(x, siblings, j, width).to(dtype)
        left, right = (x_j, u_j) if siblings.by_rows else (u_j, x_j)
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
    mats, scales, by_rows, _, masks = siblings
    ranks = _ranks(siblings)
    layout = layout_of(ranks)
    tokens, width = y.shape
    if tokens == 0:
        return y
    if not _fits_kernels(y, layout):
        return _expand_reference(u, siblings, layout, dtype, y, add)
    masked = masks is not None
    block_t, block_n = (64, 128) if tokens >= 2048 else (32, 128)
    args = (
        u, *_three(mats, mats[0]), masks if masked else y, y, *_three(scales, 0.0), tokens, y.stride(0), u.stride(0),
        masks.shape[2] if masked else 0, width,
    )  # fmt: skip
    consts = (
        len(mats), by_rows, masked, add, *_three(ranks, 0), *_three(layout.slots, 16), precision(dtype), block_t, block_n,
    )  # fmt: skip
    grid = (-(-tokens // block_t), -(-width // block_n))
    launch(_expand_kernel, grid, args, consts, num_warps=8 if masked else 4, num_stages=2)
    return y


def _expand_reference(u, siblings, layout, dtype, y, add):
    total = widened(y) if add else 0.0
    for j, (m, scale, at) in enumerate(zip(siblings.mats, siblings.scales, layout.starts)):
        m = m.to(dtype).t() if siblings.by_rows else m.to(dtype)
        part = widened(torch.mm(u[:, at : at + m.shape[0]].to(dtype), m)) * scale
        total = total + (part if siblings.masks is None else apply_dropout_bits(part, siblings.masks[j]))
    return y.copy_(total)
