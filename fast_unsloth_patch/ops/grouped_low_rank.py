"""The skinny products of expert adapters, each in one pass over the rows that it reads.

======================  =====================================================================================
`grouped_down`          d_r = x_r F_e        u = x A^T in the forward, du = dY B in the backward
`grouped_down_outer`    d_r = x_r F_e and G_e = x_e^T u_e, the gradient of B beside dY B
======================  =====================================================================================

What ``down_outer`` does for a dense layer, with a factor matrix F_e [K, slots] of the row's expert e. A program owns a
stripe of columns of x and a range of rows, in which it meets one expert after another: of each it holds the tile of F_e
and its part of G_e while it walks down that expert's rows. Each block of rows leaves its part of d, each expert in the
range its part of G. The parts, fp32, are summed by a second launch in a fixed order: no atomics, the same bits every
time. (range + expert) numbers the parts of G: along the rows either the range or the expert goes up by one.

Beyond 32 slots, and where a chip cannot feed both products from shared memory, it is two products of `grouped_gemm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import device_limits, jit, launch, tl
from .down_outer import DTYPES, SUM_BLOCK, SUM_CHUNK, split_rows, stripe_of, sum_parts
from .grouped_gemm import grouped_gemm, grouped_gemm_dx, grouped_outer
from .routing import Routing


@jit(do_not_specialize=["R", "experts", "t_split"])
def grouped_down_outer_kernel(
    x_ptr, u_ptr, f_ptr, d_ptr, g_ptr, ends_ptr, R, K, experts, t_split, x_stride, u_stride, along_k, along_s,
    OUTER: tl.constexpr, SLOTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stripe, split, stripes = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    cols, slots, lanes = tl.arange(0, BLOCK_K), tl.arange(0, SLOTS), tl.arange(0, BLOCK_T)
    col_mask = stripe * BLOCK_K + cols < K
    x_ptr += stripe * BLOCK_K
    f_at = (stripe * BLOCK_K + cols)[:, None] * along_k + slots[None, :] * along_s
    x_at = lanes[:, None] * x_stride + cols[None, :]
    u_at = lanes[:, None] * u_stride + slots[None, :]
    d_ptr += stripe.to(tl.int64) * R * SLOTS
    start = split * t_split
    stop = tl.minimum(start + t_split, R)
    for expert in tl.range(experts):
        end = tl.minimum(tl.load(ends_ptr + expert), stop)
        if start < end:
            f_expert = f_ptr + tl.cast(expert, tl.int64) * K * SLOTS
            f = tl.load(f_expert + f_at, mask=col_mask[:, None], other=0.0).to(x_ptr.dtype.element_ty)
            g = tl.zeros([BLOCK_K, SLOTS], tl.float32)
            for t in tl.range(start, end, BLOCK_T):
                # Only what moves is 64 bits wide: offsets within a tile would take twice the registers.
                x = tl.load(x_ptr + tl.cast(t, tl.int64) * x_stride + x_at, mask=col_mask[None, :], other=0.0)
                d = tl.dot(x, f, input_precision="ieee")
                if OUTER:
                    u = tl.load(u_ptr + tl.cast(t, tl.int64) * u_stride + u_at)
                    g = tl.dot(tl.trans(x), u, g, input_precision="ieee")
                tl.store(d_ptr + (t + lanes)[:, None] * SLOTS + slots[None, :], d)
            if OUTER:
                g_part = g_ptr + ((split + expert).to(tl.int64) * stripes + stripe) * BLOCK_K * SLOTS
                tl.store(g_part + cols[:, None] * SLOTS + slots[None, :], g)
            start = end


@jit(do_not_specialize=["R"])
def grouped_down_sum_kernel(d_parts, d_ptr, R, stripes, SLOTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < R * SLOTS
    d = sum_parts(d_parts, stripes, R.to(tl.int64) * SLOTS, offs, mask, BLOCK, CHUNK)
    tl.store(d_ptr + offs, d.to(d_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["t_split"])
def grouped_outer_sum_kernel(
    g_parts, g_ptr, ends_ptr, K, size, t_split,
    ROUND: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # A block of G of one expert. A part of G has ``size`` elements: K rounded up to whole stripes, times SLOTS.
    expert, offs = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    first = start // t_split
    # None for an expert without rows.
    parts = tl.where(start < end, tl.cdiv(end, t_split) - first, 0)
    mask = offs < K * SLOTS
    g = sum_parts(g_parts + (first + expert).to(tl.int64) * size, parts, size, offs, mask, BLOCK, CHUNK)
    if ROUND:
        g = g.to(tl.float16).to(tl.float32)
    at = g_ptr + tl.cast(expert, tl.int64) * K * SLOTS + offs
    tl.store(at, g.to(g_ptr.dtype.element_ty), mask=mask)


def _covers(x: Tensor, factor: Tensor, routing: Routing, slots: int) -> bool:
    """Whether the kernel takes rows of x and stacks of factors: one dtype of 16 bits, at most 32 slots, on sm_90 up."""
    stripe = stripe_of(slots, device_limits(x.get_device())) if use_triton(x) else None
    return (
        stripe is not None
        and x.dtype in DTYPES
        and x.stride(-1) == 1
        and x.shape[0] > 0
        and factor.is_contiguous()
        and routing.block % stripe.block[0] == 0
    )


def _run(
    x: Tensor, u: Tensor | None, factor: Tensor, by_rows: bool, routing: Routing, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """d, and G [E, K, slots] if u is given (else d again)."""
    rows, width = x.shape
    experts, slots = factor.shape[0], factor.shape[2 if by_rows else 1]
    limits = device_limits(x.get_device())
    (block_t, block_k), num_warps, num_stages, smem, _ = stripe_of(slots, limits)  # type: ignore[misc]
    stripes = -(-width // block_k)
    t_split = split_rows(rows, stripes, block_t, limits.sm_count * (limits.smem // smem if smem else 1))
    splits = -(-rows // t_split)
    d_size, g_size = stripes * rows * slots, stripes * block_k * slots
    g_sizes = 0 if u is None else (splits + experts - 1) * g_size
    parts = torch.empty(d_size + g_sizes, dtype=torch.float32, device=x.device)
    g_parts = parts[d_size:]
    d = torch.empty((rows, slots), dtype=x.dtype, device=x.device)
    narrow = x if u is None else u
    along = (slots, 1) if by_rows else (1, width)
    args = (
        x, narrow, factor, parts, g_parts, routing.ends, rows, width, experts, t_split, x.stride(0), narrow.stride(0),
        *along,
    )  # fmt: skip
    consts = (u is not None, slots, block_t, block_k)
    launch(grouped_down_outer_kernel, (stripes, splits), args, consts, num_warps=num_warps, num_stages=num_stages)
    sum_blocks = -(-rows * slots // SUM_BLOCK)
    launch(grouped_down_sum_kernel, (sum_blocks,), (parts, d, rows, stripes), (slots, SUM_BLOCK, SUM_CHUNK))
    if u is None:
        return d, d
    g = torch.empty((experts, width, slots), dtype=dtype, device=x.device)
    sums = (g_parts, g, routing.ends, width, g_size, t_split)
    sum_consts = (x.dtype is torch.float16, slots, SUM_BLOCK, SUM_CHUNK)
    launch(grouped_outer_sum_kernel, (-(-width * slots // SUM_BLOCK), experts), sums, sum_consts)
    return d, g


def grouped_down(x: Tensor, factor: Tensor, routing: Routing, *, by_rows: bool) -> Tensor:
    """``d_r = x_r F_e`` for the expert e of row r.

    Args:
        x: [R, K], the rows of `routing`.
        factor: B [E, K, slots] where ``by_rows``, else A [E, slots, K]; of x's dtype, as ``pack_a`` and ``pack_b`` make
            them.
        routing: where each expert's rows are.

    Returns:
        [R, slots] in x's dtype; sums are fp32. Rows that nobody uses hold anything.
    """
    if _covers(x, factor, routing, factor.shape[2 if by_rows else 1]):
        return _run(x, None, factor, by_rows, routing, x.dtype)[0]
    return grouped_gemm_dx(x, factor, routing) if by_rows else grouped_gemm(x, factor, routing)


def grouped_down_outer(
    x: Tensor, u: Tensor, factor: Tensor, routing: Routing, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``d_r = x_r B_e`` and ``G_e = x_e^T u_e`` for the expert e of row r.

    Args:
        x: [R, K], the rows of `routing`.
        u: [R, slots] of x's dtype; rows of padding zero.
        factor: B [E, K, slots] of x's dtype.
        routing: where each expert's rows are.
        dtype: of G.

    Returns:
        d [R, slots] in x's dtype, and G [E, K, slots] in ``dtype``, zero for an expert without rows. Sums are fp32;
        those of G are rounded to fp16 first where x is.
    """
    if u.shape[1] == factor.shape[2] and u.stride(1) == 1 and _covers(x, factor, routing, factor.shape[2]):
        return _run(x, u, factor, True, routing, dtype)
    return grouped_gemm_dx(x, factor, routing), grouped_outer(x, u, routing, dtype)
