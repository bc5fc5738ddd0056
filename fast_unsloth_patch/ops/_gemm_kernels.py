"""The kernels of ``gemm``: persistent products with tensor descriptors.

Each program takes every sm_count-th tile, in an order that keeps a group of row blocks in the L2 cache; operands come
and results leave through tensor descriptors. The siblings' weights are parameters of their own, so each has its
descriptor, and a tile picks one. After Triton's tutorial "Persistent Matmul" (MIT); grouped order: its tutorial "Matrix
Multiplication".

Measured slower on an H200 (benchmarks/results/h200-notes.md): one loop over tiles and steps (the tutorial's flattened
form), by 15 %; SwiGLU's backward, or gate and up beside the activation, in the epilogue: nothing multiplies while an
epilogue moves bytes.
"""

from __future__ import annotations

from ..device.launch import jit, tl


@jit
def _place(tile, rows, cols, GROUP: tl.constexpr):
    # The row and column block of a tile: column by column within a group of row blocks.
    in_group = GROUP * cols
    first = tile // in_group * GROUP
    size = min(rows - first, GROUP)
    return first + (tile % in_group) % size, (tile % in_group) // size


@jit
def _halves(acc, M: tl.constexpr, HALF: tl.constexpr):
    # A result leaves through a buffer in shared memory; half a tile at a time leaves room for a pipeline stage.
    return tl.split(tl.permute(tl.reshape(acc, [M, 2, HALF]), [0, 2, 1]))


@jit
def _add_update(
    acc, u_ptr, b_ptr, m, n, T, width, u_stride, first, rank, along_rank, along_n,
    SLOTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # acc + u factor, for the factor element (r, n) at r * along_rank + n * along_n. Another sibling's columns of u are
    # not read: zero times infinity is not zero.
    rows, cols, ranks = m + tl.arange(0, M), n + tl.arange(0, N), tl.arange(0, SLOTS)
    u_at = u_ptr + rows.to(tl.int64)[:, None] * u_stride + (first + ranks)[None, :]
    u = tl.load(u_at, mask=(rows < T)[:, None] & (ranks < rank)[None, :], other=0.0)
    b_at = b_ptr + ranks[:, None] * along_rank + cols[None, :] * along_n
    b = tl.load(b_at, mask=(ranks < rank)[:, None] & (cols < width)[None, :], other=0.0)
    return tl.dot(u, b.to(u.dtype), acc, input_precision="ieee")


@jit
def _finish(value, m, n, width, y_desc, added_desc, bias_ptr, BIAS: tl.constexpr, ADDED: tl.constexpr, N: tl.constexpr):
    if BIAS:
        cols = n + tl.arange(0, N)
        value += tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    if ADDED:
        value += added_desc.load([m, n]).to(tl.float32)
    y_desc.store([m, n], value.to(y_desc.dtype))


@jit(do_not_specialize=["T"])
def gemm_fwd_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, u_ptr, b0_ptr, b1_ptr, b2_ptr, bias_ptr, residual_ptr, y_ptr,
    T, K, n0, n1, n2, x_stride, u_stride, residual_stride, y_stride,
    J: tl.constexpr, SLOTS: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_N // 2
    N = n0 + n1 + n2
    x_desc = tl.make_tensor_descriptor(x_ptr, [T, K], [x_stride, 1], [BLOCK_M, BLOCK_K])
    w0_desc = tl.make_tensor_descriptor(w0_ptr, [n0, K], [K, 1], [BLOCK_N, BLOCK_K])
    w1_desc, w2_desc = w0_desc, w0_desc
    if J > 1:
        w1_desc = tl.make_tensor_descriptor(w1_ptr, [n1, K], [K, 1], [BLOCK_N, BLOCK_K])
    if J > 2:
        w2_desc = tl.make_tensor_descriptor(w2_ptr, [n2, K], [K, 1], [BLOCK_N, BLOCK_K])
    y_desc = tl.make_tensor_descriptor(y_ptr, [T, N], [y_stride, 1], [BLOCK_M, HALF])
    residual_desc = y_desc
    if RESIDUAL:
        residual_desc = tl.make_tensor_descriptor(residual_ptr, [T, N], [residual_stride, 1], [BLOCK_M, HALF])
    rows, cols, steps = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)
    for tile in tl.range(tl.program_id(0), rows * cols, tl.num_programs(0)):
        row, col = _place(tile, rows, cols, GROUP)
        m, n = row * BLOCK_M, col * BLOCK_N
        w_desc, at, width, b_ptr, rank, first = w0_desc, n, n0, b0_ptr, R0, U0
        if J > 1:  # noqa: SIM102  (a constexpr and a run-time condition)
            if n >= n0:
                w_desc, at, width, b_ptr, rank, first = w1_desc, n - n0, n1, b1_ptr, R1, U1
        if J > 2:  # noqa: SIM102
            if n >= n0 + n1:
                w_desc, at, width, b_ptr, rank, first = w2_desc, n - n0 - n1, n2, b2_ptr, R2, U2
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in tl.range(steps):
            x = x_desc.load([m, step * BLOCK_K])
            w = w_desc.load([at, step * BLOCK_K])
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
        if SLOTS:
            acc = _add_update(
                acc, u_ptr, b_ptr, m, at, T, width, u_stride, first, rank, 1, rank, SLOTS, BLOCK_M, BLOCK_N
            )
        left, right = _halves(acc, BLOCK_M, HALF)
        _finish(left, m, n, N, y_desc, residual_desc, bias_ptr, BIAS, RESIDUAL, HALF)
        _finish(right, m, n + HALF, N, y_desc, residual_desc, bias_ptr, BIAS, RESIDUAL, HALF)


@jit(do_not_specialize=["T"])
def gemm_swiglu_kernel(
    x_ptr, gate_ptr, up_ptr, u_ptr, b0_ptr, b1_ptr, h_ptr, T, K, N, x_stride, u_stride, h_stride,
    SLOTS: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, U0: tl.constexpr, U1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    x_desc = tl.make_tensor_descriptor(x_ptr, [T, K], [x_stride, 1], [BLOCK_M, BLOCK_K])
    gate_desc = tl.make_tensor_descriptor(gate_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    up_desc = tl.make_tensor_descriptor(up_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    h_desc = tl.make_tensor_descriptor(h_ptr, [T, N], [h_stride, 1], [BLOCK_M, BLOCK_N])
    rows, cols, steps = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)
    for tile in tl.range(tl.program_id(0), rows * cols, tl.num_programs(0)):
        row, col = _place(tile, rows, cols, GROUP)
        m, n = row * BLOCK_M, col * BLOCK_N
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in tl.range(steps):
            x = x_desc.load([m, step * BLOCK_K])
            w0 = gate_desc.load([n, step * BLOCK_K])
            w1 = up_desc.load([n, step * BLOCK_K])
            gate = tl.dot(x, w0.T, gate, input_precision="ieee")
            up = tl.dot(x, w1.T, up, input_precision="ieee")
        if R0:
            gate = _add_update(gate, u_ptr, b0_ptr, m, n, T, N, u_stride, U0, R0, 1, R0, SLOTS, BLOCK_M, BLOCK_N)
        if R1:
            up = _add_update(up, u_ptr, b1_ptr, m, n, T, N, u_stride, U1, R1, 1, R1, SLOTS, BLOCK_M, BLOCK_N)
        # Rounded as where they are written and read: a layer that is recomputed or kept has the same bits.
        gate, up = gate.to(h_desc.dtype).to(tl.float32), up.to(h_desc.dtype).to(tl.float32)
        h_desc.store([m, n], (gate * tl.sigmoid(gate) * up).to(h_desc.dtype))


@jit(do_not_specialize=["T"])
def gemm_dx_kernel(
    dy_ptr, w0_ptr, w1_ptr, w2_ptr, du_ptr, a0_ptr, a1_ptr, a2_ptr, addend_ptr, dx_ptr,
    T, K, n0, n1, n2, dy_stride, du_stride, addend_stride, dx_stride,
    J: tl.constexpr, SLOTS: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    U0: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr, ADDEND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # BLOCK_N columns of dx [T, K]; the steps go along the siblings' rows, one sibling after another.
    HALF: tl.constexpr = BLOCK_N // 2
    dy_desc = tl.make_tensor_descriptor(dy_ptr, [T, n0 + n1 + n2], [dy_stride, 1], [BLOCK_M, BLOCK_K])
    w0_desc = tl.make_tensor_descriptor(w0_ptr, [n0, K], [K, 1], [BLOCK_K, BLOCK_N])
    w1_desc, w2_desc = w0_desc, w0_desc
    if J > 1:
        w1_desc = tl.make_tensor_descriptor(w1_ptr, [n1, K], [K, 1], [BLOCK_K, BLOCK_N])
    if J > 2:
        w2_desc = tl.make_tensor_descriptor(w2_ptr, [n2, K], [K, 1], [BLOCK_K, BLOCK_N])
    dx_desc = tl.make_tensor_descriptor(dx_ptr, [T, K], [dx_stride, 1], [BLOCK_M, HALF])
    addend_desc = dx_desc
    if ADDEND:
        addend_desc = tl.make_tensor_descriptor(addend_ptr, [T, K], [addend_stride, 1], [BLOCK_M, HALF])
    rows, cols, steps = tl.cdiv(T, BLOCK_M), tl.cdiv(K, BLOCK_N), tl.cdiv(n0 + n1 + n2, BLOCK_K)
    tl.assume(steps > 0)
    for tile in tl.range(tl.program_id(0), rows * cols, tl.num_programs(0)):
        row, col = _place(tile, rows, cols, GROUP)
        m, k = row * BLOCK_M, col * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in tl.range(steps):
            n = step * BLOCK_K
            w_desc, at = w0_desc, n
            if J > 1:  # noqa: SIM102
                if n >= n0:
                    w_desc, at = w1_desc, n - n0
            if J > 2:  # noqa: SIM102
                if n >= n0 + n1:
                    w_desc, at = w2_desc, n - n0 - n1
            dy = dy_desc.load([m, n])
            w = w_desc.load([at, k])
            acc = tl.dot(dy, w, acc, input_precision="ieee")
        if R0:
            acc = _add_update(acc, du_ptr, a0_ptr, m, k, T, K, du_stride, U0, R0, K, 1, SLOTS, BLOCK_M, BLOCK_N)
        if R1:
            acc = _add_update(acc, du_ptr, a1_ptr, m, k, T, K, du_stride, U1, R1, K, 1, SLOTS, BLOCK_M, BLOCK_N)
        if R2:
            acc = _add_update(acc, du_ptr, a2_ptr, m, k, T, K, du_stride, U2, R2, K, 1, SLOTS, BLOCK_M, BLOCK_N)
        left, right = _halves(acc, BLOCK_M, HALF)
        _finish(left, m, k, K, dx_desc, addend_desc, dx_ptr, False, ADDEND, HALF)
        _finish(right, m, k + HALF, K, dx_desc, addend_desc, dx_ptr, False, ADDEND, HALF)
