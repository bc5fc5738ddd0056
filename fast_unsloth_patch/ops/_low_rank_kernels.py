"""The Triton kernels of ``low_rank``; what they compute, and the layout of u, is described there."""

from __future__ import annotations

from ..device.launch import jit, tl


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
def load_factor(
    m_ptr, cols, width, R: tl.constexpr, SLOTS: tl.constexpr, BY_ROWS: tl.constexpr, RANKS_FIRST: tl.constexpr
):
    """A tile of a factor matrix, [SLOTS, cols] or [cols, SLOTS], zero beyond the rank."""
    ranks = tl.arange(0, SLOTS)
    if RANKS_FIRST:
        at = (
            ranks[:, None] + cols[None, :].to(tl.int64) * R
            if BY_ROWS
            else ranks[:, None].to(tl.int64) * width + cols[None, :]
        )
        return tl.load(m_ptr + at, mask=(ranks < R)[:, None] & (cols < width)[None, :], other=0.0)
    else:
        at = (
            ranks[None, :] + cols[:, None].to(tl.int64) * R
            if BY_ROWS
            else ranks[None, :].to(tl.int64) * width + cols[:, None]
        )
        return tl.load(m_ptr + at, mask=(ranks < R)[None, :] & (cols < width)[:, None], other=0.0)


@jit(do_not_specialize=["T"])
def down_kernel(
    x_ptr, m0_ptr, m1_ptr, m2_ptr, bits_ptr, u_ptr, s0, s1, s2, T, stride, u_stride, words, c0, c1, c2, k0, k1, k2,
    J: tl.constexpr, SHARED: tl.constexpr, BY_ROWS: tl.constexpr, MASKED: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    SLOTS0: tl.constexpr, SLOTS1: tl.constexpr, SLOTS2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < T
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
    at = u_ptr + rows[:, None].to(tl.int64) * u_stride
    tl.store(at + tl.arange(0, SLOTS0)[None, :], (acc0 * s0).to(u_ptr.dtype.element_ty), mask=row_mask[:, None])
    if J > 1:
        tl.store(
            at + (SLOTS0 + tl.arange(0, SLOTS1))[None, :],
            (acc1 * s1).to(u_ptr.dtype.element_ty),
            mask=row_mask[:, None],
        )
    if J > 2:
        at += SLOTS0 + SLOTS1
        tl.store(at + tl.arange(0, SLOTS2)[None, :], (acc2 * s2).to(u_ptr.dtype.element_ty), mask=row_mask[:, None])


@jit
def _outer_tile(
    x,
    u_ptr,
    bits_ptr,
    rows,
    start,
    row_mask,
    words,
    acc,
    u_stride,
    first,
    MASKED: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
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
def outer_kernel(
    x_ptr, u_ptr, bits_ptr, g_ptr, s0, s1, s2, T, t_split, stride, u_stride, words, c0, c1, c2, k0, k1, k2,
    g_size, g1, g2, gk, gr,
    J: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    SLOTS0: tl.constexpr, SLOTS1: tl.constexpr, SLOTS2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Program (p, s): one block of columns, one range of rows. Column blocks of the siblings follow each other when
    # each has its own.
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
            acc0 = _outer_tile(
                x, u_ptr, bits_ptr, rows, start, row_mask, words, acc0, u_stride, 0, MASKED, SLOTS0, PRECISION, BLOCK_K
            )
            if J > 1:
                acc1 = _outer_tile(x, u_ptr, bits1_ptr, rows, start, row_mask, words, acc1, u_stride, SLOTS0, MASKED,
                                   SLOTS1, PRECISION, BLOCK_K)  # fmt: skip
            if J > 2:
                acc2 = _outer_tile(x, u_ptr, bits2_ptr, rows, start, row_mask, words, acc2, u_stride, SLOTS0 + SLOTS1,
                                   MASKED, SLOTS2, PRECISION, BLOCK_K)  # fmt: skip
        _outer_store(g_ptr, acc0 * s0, cols, col_mask, SLOTS0, gk, gr)
        if J > 1:
            _outer_store(g_ptr + g1, acc1 * s1, cols, col_mask, SLOTS1, gk, gr)
        if J > 2:
            _outer_store(g_ptr + g2, acc2 * s2, cols, col_mask, SLOTS2, gk, gr)
    else:
        # All siblings have the same number of slots here (the host sees to it), so one accumulator serves whichever
        # this block is.
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
            acc = _outer_tile(
                x,
                u_ptr,
                bits_ptr,
                rows,
                start,
                row_mask,
                words,
                acc,
                u_stride,
                first,
                False,
                SLOTS0,
                PRECISION,
                BLOCK_K,
            )
        _outer_store(g_ptr + g_at, acc * scale, cols, cols < width, SLOTS0, gk, gr)


@jit
def _expand_one(
    u_at,
    m_ptr,
    cols,
    row_mask,
    width,
    R: tl.constexpr,
    SLOTS: tl.constexpr,
    BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    u = tl.load(u_at + tl.arange(0, SLOTS)[None, :], mask=row_mask[:, None], other=0.0)
    m = load_factor(m_ptr, cols, width, R, SLOTS, BY_ROWS, True)
    return tl.dot(u, m.to(u.dtype), input_precision=PRECISION)


@jit(do_not_specialize=["T"])
def expand_kernel(
    u_ptr, m0_ptr, m1_ptr, m2_ptr, bits_ptr, y_ptr, s0, s1, s2, T, stride, u_stride, words, width,
    J: tl.constexpr, BY_ROWS: tl.constexpr, MASKED: tl.constexpr, ADD: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    SLOTS0: tl.constexpr, SLOTS1: tl.constexpr, SLOTS2: tl.constexpr,
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
def pack_kernel(
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
