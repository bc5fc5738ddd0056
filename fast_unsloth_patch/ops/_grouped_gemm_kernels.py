"""The kernels of ``grouped_gemm``: persistent products of row blocks with the weight of the expert that they belong to.

As those of ``gemm`` (`_gemm_kernels`), but expert by expert, so that whoever works at one time reads the same weight.
How many row blocks an expert has is known on the device alone: each program reads it and takes every sm_count-th tile,
counted through all the experts. To the tensor descriptor their weights are one matrix [experts * N, K]. A tile at the
edge of N also multiplies rows of the next expert, but stores nothing of that.

Counting tiles through groups of different sizes: Triton's tutorial "Group GEMM" (MIT).
"""

from __future__ import annotations

from ..device.launch import jit, tl
from ._gemm_kernels import _add_update, _halves


@jit
def _first_block(ends_ptr, expert, BLOCK_M: tl.constexpr):
    return tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0) // BLOCK_M


@jit
def _first_tile(passed):
    # This program's first tile of an expert, after ``passed`` tiles of the experts before.
    programs = tl.num_programs(0)
    return (tl.program_id(0) + programs - passed % programs) % programs


@jit
def _place(tile, rows, cols, GROUP: tl.constexpr):
    # The row and column block of a tile: column by column within a group of row blocks. Groups of about one size: each
    # reads the whole weight, and one of a single row block would for little work.
    group = tl.cdiv(rows, tl.cdiv(rows, GROUP))
    in_group = group * cols
    first = tile // in_group * group
    size = min(rows - first, group)
    return first + (tile % in_group) % size, (tile % in_group) // size


@jit
def _store(desc, m, n, acc, M: tl.constexpr, N: tl.constexpr):
    # A wide tile by halves, as in `gemm`.
    if N > 128:
        left, right = _halves(acc, M, N // 2)
        desc.store([m, n], left.to(desc.dtype))
        desc.store([m, n + N // 2], right.to(desc.dtype))
    else:
        desc.store([m, n], acc.to(desc.dtype))


@jit(do_not_specialize=["R", "first", "last"])
def grouped_gemm_kernel(
    x_ptr, w_ptr, u_ptr, b_ptr, y_ptr, ends_ptr, R, K, N, first, last, x_stride, u_stride, y_stride,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Experts first to last (exclusive), whose weights are at w_ptr; ends and B are those of all experts.
    STORED: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 128 else BLOCK_N
    x_desc = tl.make_tensor_descriptor(x_ptr, [R, K], [x_stride, 1], [BLOCK_M, BLOCK_K])
    w_desc = tl.make_tensor_descriptor(w_ptr, [(last - first) * N, K], [K, 1], [BLOCK_N, BLOCK_K])
    y_desc = tl.make_tensor_descriptor(y_ptr, [R, N], [y_stride, 1], [BLOCK_M, STORED])
    cols, steps = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)
    block, passed = _first_block(ends_ptr, first, BLOCK_M), 0
    for expert in tl.range(first, last):
        end = tl.load(ends_ptr + expert) // BLOCK_M
        tiles = (end - block) * cols
        for tile in tl.range(_first_tile(passed), tiles, tl.num_programs(0)):
            row, col = _place(tile, end - block, cols, GROUP)
            m, n = (block + row) * BLOCK_M, col * BLOCK_N
            at = (expert - first) * N + n
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for step in tl.range(steps):
                x = x_desc.load([m, step * BLOCK_K])
                w = w_desc.load([at, step * BLOCK_K])
                acc = tl.dot(x, w.T, acc, input_precision="ieee")
            if SLOTS:
                b_at = b_ptr + tl.cast(expert, tl.int64) * N * SLOTS
                acc = _add_update(
                    acc, u_ptr, b_at, m, n, R, N, u_stride, 0, SLOTS, 1, SLOTS, SLOTS, BLOCK_M, BLOCK_N
                )  # fmt: skip
            _store(y_desc, m, n, acc, BLOCK_M, BLOCK_N)
        passed += tiles
        block = end


@jit(do_not_specialize=["R", "first", "last"])
def grouped_gemm_swiglu_kernel(
    x_ptr, w_ptr, u_ptr, b_ptr, h_ptr, ends_ptr, R, K, N, first, last, x_stride, u_stride, h_stride,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # h [R, N] from weights [2 N, K] of each expert: the rows of gate, then those of up.
    x_desc = tl.make_tensor_descriptor(x_ptr, [R, K], [x_stride, 1], [BLOCK_M, BLOCK_K])
    w_desc = tl.make_tensor_descriptor(w_ptr, [(last - first) * 2 * N, K], [K, 1], [BLOCK_N, BLOCK_K])
    h_desc = tl.make_tensor_descriptor(h_ptr, [R, N], [h_stride, 1], [BLOCK_M, BLOCK_N])
    cols, steps = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)
    block, passed = _first_block(ends_ptr, first, BLOCK_M), 0
    for expert in tl.range(first, last):
        end = tl.load(ends_ptr + expert) // BLOCK_M
        tiles = (end - block) * cols
        for tile in tl.range(_first_tile(passed), tiles, tl.num_programs(0)):
            row, col = _place(tile, end - block, cols, GROUP)
            m, n = (block + row) * BLOCK_M, col * BLOCK_N
            at = (expert - first) * 2 * N + n
            gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for step in tl.range(steps):
                x = x_desc.load([m, step * BLOCK_K])
                w0 = w_desc.load([at, step * BLOCK_K])
                w1 = w_desc.load([at + N, step * BLOCK_K])
                gate = tl.dot(x, w0.T, gate, input_precision="ieee")
                up = tl.dot(x, w1.T, up, input_precision="ieee")
            if SLOTS:
                b_at = b_ptr + tl.cast(expert, tl.int64) * 2 * N * SLOTS
                gate = _add_update(
                    gate, u_ptr, b_at, m, n, R, N, u_stride, 0, SLOTS, 1, SLOTS, SLOTS, BLOCK_M, BLOCK_N
                )  # fmt: skip
                up = _add_update(
                    up, u_ptr, b_at + N * SLOTS, m, n, R, N, u_stride, 0, SLOTS, 1, SLOTS, SLOTS, BLOCK_M, BLOCK_N
                )  # fmt: skip
            # Rounded as where they are written and read: a layer that is recomputed or kept has the same bits.
            gate, up = gate.to(h_desc.dtype).to(tl.float32), up.to(h_desc.dtype).to(tl.float32)
            h_desc.store([m, n], (gate * tl.sigmoid(gate) * up).to(h_desc.dtype))
        passed += tiles
        block = end


@jit(do_not_specialize=["R", "first", "last"])
def grouped_gemm_dx_kernel(
    dy_ptr, w_ptr, du_ptr, a_ptr, dx_ptr, ends_ptr, R, K, N, first, last, dy_stride, du_stride, dx_stride,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # BLOCK_N columns of dx [R, K]; the steps go along the N rows of the expert's weight, a multiple of BLOCK_K.
    STORED: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 128 else BLOCK_N
    dy_desc = tl.make_tensor_descriptor(dy_ptr, [R, N], [dy_stride, 1], [BLOCK_M, BLOCK_K])
    w_desc = tl.make_tensor_descriptor(w_ptr, [(last - first) * N, K], [K, 1], [BLOCK_K, BLOCK_N])
    dx_desc = tl.make_tensor_descriptor(dx_ptr, [R, K], [dx_stride, 1], [BLOCK_M, STORED])
    cols, steps = tl.cdiv(K, BLOCK_N), N // BLOCK_K
    tl.assume(steps > 0)
    block, passed = _first_block(ends_ptr, first, BLOCK_M), 0
    for expert in tl.range(first, last):
        end = tl.load(ends_ptr + expert) // BLOCK_M
        tiles = (end - block) * cols
        for tile in tl.range(_first_tile(passed), tiles, tl.num_programs(0)):
            row, col = _place(tile, end - block, cols, GROUP)
            m, k = (block + row) * BLOCK_M, col * BLOCK_N
            at = (expert - first) * N
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for step in tl.range(steps):
                dy = dy_desc.load([m, step * BLOCK_K])
                w = w_desc.load([at + step * BLOCK_K, k])
                acc = tl.dot(dy, w, acc, input_precision="ieee")
            if SLOTS:
                a_at = a_ptr + tl.cast(expert, tl.int64) * SLOTS * K
                acc = _add_update(
                    acc, du_ptr, a_at, m, k, R, K, du_stride, 0, SLOTS, K, 1, SLOTS, BLOCK_M, BLOCK_N
                )  # fmt: skip
            _store(dx_desc, m, k, acc, BLOCK_M, BLOCK_N)
        passed += tiles
        block = end


@jit
def grouped_outer_kernel(
    wide_ptr, narrow_ptr, out_ptr, ends_ptr, W, wide_stride, narrow_stride, along_w, along_s,
    SLOTS: tl.constexpr, ROUND: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # wide_e^T narrow_e, BLOCK_W columns of wide [R, W] and all SLOTS of narrow [R, SLOTS] in the rows of one expert, a
    # multiple of BLOCK_R. One program has the sum from the first row to the last.
    blocks = tl.cdiv(W, BLOCK_W)
    expert, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    cols, slots, rows = block * BLOCK_W + tl.arange(0, BLOCK_W), tl.arange(0, SLOTS), tl.arange(0, BLOCK_R)
    wide_at = wide_ptr + (start + rows).to(tl.int64)[:, None] * wide_stride + cols[None, :]
    narrow_at = narrow_ptr + (start + rows).to(tl.int64)[:, None] * narrow_stride + slots[None, :]
    inside = (cols < W)[None, :]
    acc = tl.zeros([BLOCK_W, SLOTS], tl.float32)
    for _ in tl.range((end - start) // BLOCK_R):
        wide = tl.load(wide_at, mask=inside, other=0.0)
        narrow = tl.load(narrow_at)
        acc = tl.dot(wide.T, narrow, acc, input_precision="ieee")
        wide_at += BLOCK_R * wide_stride
        narrow_at += BLOCK_R * narrow_stride
    if ROUND:
        acc = acc.to(tl.float16).to(tl.float32)
    at = out_ptr + tl.cast(expert, tl.int64) * W * SLOTS + cols[:, None] * along_w + slots[None, :] * along_s
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(cols < W)[:, None])
