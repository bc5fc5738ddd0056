"""The skinny products that LoRA adds to a linear layer, for up to three sibling projections at once.

============  ======================================  ==========================================================
`down`        u_j = s_j (x * m_j) M_j^T                x A^T in the forward, dY B in the backward
`outer`       G_j = s_j u_j^T (x * m_j)                dA = (dY B)^T x and dB^T = (x A^T)^T dY
`expand`      y = sum_j s_j (u_j M_j) * m_j            (x A^T) B^T in the forward, (dY B) A in the backward
============  ======================================  ==========================================================

Each reads or writes one activation-sized tensor once and everything else is r wide, so all are bound by memory. There
are two ways to run them, and the measured choice (benchmarks/results/h200-notes.md) is:

* **Library GEMMs over packed adapters** where nothing drops out, all operands have one dtype and the device is the
  limit: `pack` rounds the adapters of a group to the compute dtype, side by side, in one launch, and cuBLAS does the
  rest (x A^T of q, k, v at 8192 x 4096: 27 us against 54).
* **Triton kernels** where masks are applied or dtypes mix, and for few tokens, where the host is the limit: they read
  adapters and activations in their own dtype and apply the masks in registers, so that neither masked nor cast copies
  of an activation are made and one launch does what takes two to four library calls.

``m_j`` are bit-packed keep masks (``ops/dropout.py``). Siblings either share x (q, k, v on one input) or own a column
range of it (the gradients of stacked outputs). u is [T, sum of slots]: sibling j owns ``rank_slots`` consecutive
columns, its rank rounded up to a power of two of at least 16 (a tensor-core tile), zero beyond the rank, so that no
kernel masks its columns. Accumulation is fp32 in a fixed order; sums over splits are a second pass, never atomics.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from ..device.dispatch import use_triton
from ..device.launch import device_limits, launch
from ._low_rank_kernels import down_kernel, expand_kernel, outer_kernel, pack_kernel
from .dropout import apply_dropout_bits

MAX_SLOTS = 128
# From this many tokens on the device is slower than the host: then the faster kernels count, below it fewer launches.
LIBRARY_TOKENS = 2048
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


def precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch's own TF32 setting (``tl.dot`` alone would default to TF32)."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def widened(t: torch.Tensor) -> torch.Tensor:
    """In the dtype of element-wise arithmetic: float32, or float64 for float64."""
    return t if t.dtype is torch.float64 else t.float()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _three(values, filler):
    """Exactly three kernel arguments from one to three values."""
    n = len(values)
    return values if n == 3 else (*values, filler, filler) if n == 1 else (*values, filler)


def _stages(x: torch.Tensor, width: int) -> int:
    """Pipeline depth. Three stages of the widest case take 182 KiB (sm_90, 100), of 64 slots 114 KiB (sm_80 too)."""
    smem = device_limits(x.get_device()).smem
    return 3 if smem >= 220 * 1024 or (smem >= 160 * 1024 and width <= 64) else 2


def _singly(siblings: Siblings) -> list[Siblings]:
    """Each sibling by itself: together they have more slots than a kernel's accumulators hold."""
    mats, scales, by_rows, starts, masks = siblings
    return [
        Siblings(
            (m,),
            (scale,),
            by_rows,
            None if starts is None else (starts[j],),
            None if masks is None else masks[j : j + 1],
        )
        for j, (m, scale) in enumerate(zip(mats, scales))
    ]


def _too_wide(layout: Layout) -> bool:
    return layout.width > MAX_SLOTS and max(layout.slots) <= MAX_SLOTS


def _fits_kernels(x: torch.Tensor, layout: Layout) -> bool:
    return use_triton(x) and layout.width <= MAX_SLOTS and x.stride(-1) == 1


def by_library(x: torch.Tensor, ranks: tuple[int, ...], masks: torch.Tensor | None, dtype: torch.dtype) -> bool:
    """Whether products with x [T, K] run as library GEMMs over packed adapters (else `down`, `outer` and `expand` do
    them).
    """
    if masks is not None or x.dtype is not dtype:
        return False
    return x.shape[0] >= LIBRARY_TOKENS or not use_triton(x) or layout_of(ranks).width > MAX_SLOTS


def pack(siblings: Siblings, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The scaled matrices in the compute dtype, padded to their slots with zeros, in one launch and one buffer.

    Returns:
        The buffer, and in it a matrix a sibling, one after another: [slots_j, K_j], or [K_j, slots_j] where they are
        ``by_rows``.
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
        blocks = sum([_ceil(size, _PACK_BLOCK) for size in sizes])
        args = (
            *_three(mats, mats[0]),
            out,
            *_three(scales, 0.0),
            *_three(sizes, 0),
            *_three(inner, 0),
            *_three(inner_out, 1),
        )
        launch(pack_kernel, (blocks,), args, (len(mats), _PACK_BLOCK))
        return out, shaped
    for m, scale, part, rank in zip(mats, scales, shaped, ranks):
        part.zero_()
        (part[:, :rank] if by_rows else part[:rank]).copy_(m * scale)
    return out, shaped


def mm_wide(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b`` with the result in ``dtype``; on CUDA an fp32 result of bf16 operands is not rounded on the way.

    One of fp16 operands is: a loss scaler finds its scale by what overflows in fp16, and must find stock's.
    """
    if dtype is a.dtype:
        return torch.mm(a, b)
    if dtype is torch.float32 and a.dtype is torch.bfloat16 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(dtype)


def down(x: torch.Tensor, siblings: Siblings, dtype: torch.dtype, u: torch.Tensor | None = None) -> torch.Tensor:
    """``u_j = scale_j (x * mask_j) M_j^T`` for all siblings.

    Args:
        x: [T, K] (rows may be strided).
        siblings: the matrices.
        dtype: compute dtype; x and the matrices are rounded to it, products accumulate in fp32, u is stored in it.
        u: where to write the result (rows may be strided).

    Returns:
        [T, sum of slots], zero in the columns beyond each rank.
    """
    mats, scales, by_rows, starts, masks = siblings
    ranks, widths = _ranks(siblings), _widths(siblings)
    layout = layout_of(ranks)
    tokens = x.shape[0]
    if u is None:
        u = torch.empty((tokens, layout.width), dtype=dtype, device=x.device)
    if tokens == 0:
        return u
    if use_triton(x) and _too_wide(layout):
        for one, at, n in zip(_singly(siblings), layout.starts, layout.slots):
            down(x, one, dtype, u[:, at : at + n])
        return u
    if not _fits_kernels(x, layout):
        return _down_reference(x, siblings, layout, u)
    masked = masks is not None
    # 32 rows with masks spill.
    block_t, block_k = (64 if tokens >= 4096 else 32 if tokens >= 2048 and not masked else 16), 128
    if dtype is torch.float32:  # larger blocks spill
        block_t, block_k = min(block_t, 32), 32
    args = (
        x, *_three(mats, mats[0]), masks if masks is not None else x, u, *_three(scales, 0.0), tokens, x.stride(0),
        u.stride(0), masks.shape[2] if masks is not None else 0, *_three(starts or (0,), 0), *_three(widths, 0),
    )  # fmt: skip
    consts = (
        len(mats), starts is None, by_rows, masked, *_three(ranks, 0), *_three(layout.slots, 16),
        precision(dtype), block_t, block_k,
    )  # fmt: skip
    launch(down_kernel, (_ceil(tokens, block_t),), args, consts, num_warps=4, num_stages=_stages(x, layout.width))
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
    if use_triton(x) and _too_wide(layout):
        parts = zip(_singly(siblings), layout.starts, layout.slots)
        return [g for one, at, n in parts for g in outer(x, u[:, at : at + n], one, dtype)]
    if tokens == 0 or not _fits_kernels(x, layout) or (starts is not None and len(set(layout.slots)) > 1):
        return _outer_reference(x, u, siblings, layout, dtype)
    block_k, block_t = (64, 32) if dtype is torch.float32 else (64, 64)
    blocks = _ceil(widths[0], block_k) if starts is None else sum([_ceil(w, block_k) for w in widths])
    splits = max(1, min(tokens // (4 * block_t), _ceil(4 * device_limits(x.get_device()).sm_count, blocks)))
    t_split = _ceil(_ceil(tokens, splits), block_t) * block_t if splits > 1 else tokens
    splits = _ceil(tokens, t_split)
    sizes = [w * n for w, n in zip(widths, layout.slots)]
    total = sum(sizes)
    # Siblings' gradients follow each other in g; within one, element (k, r) is at k * gk + r * gr.
    g = torch.empty((splits, total), dtype=torch.float32, device=x.device)
    masked = masks is not None
    gk, gr = (layout.slots[0], 1) if by_rows else (1, widths[0])
    args = (
        x, u, masks if masks is not None else x, g, *_three(scales, 0.0), tokens, t_split, x.stride(0), u.stride(0),
        masks.shape[2] if masks is not None else 0, *_three(starts or (0,), 0), *_three(widths, 0),
        total, sizes[0], sum(sizes[:2]), gk, gr,
    )  # fmt: skip
    consts = (len(mats), starts is None, masked, *_three(layout.slots, 16), precision(dtype), block_t, block_k)
    launch(outer_kernel, (blocks, splits), args, consts, num_warps=4, num_stages=_stages(x, layout.width))
    g = g[0] if splits == 1 else g.sum(0)
    if dtype is torch.float16:  # see mm_wide
        g = g.to(dtype)
    return [
        (part.view(width, -1)[:, :rank] if by_rows else part.view(-1, width)[:rank]).to(m.dtype).contiguous()
        for m, rank, width, part in zip(mats, ranks, widths, g.split(sizes))
    ]


def _outer_reference(x, u, siblings, layout, dtype):
    grads = []
    for j, (m, scale, at) in enumerate(zip(siblings.mats, siblings.scales, layout.starts)):
        rank, width = m.shape[::-1] if siblings.by_rows else m.shape
        u_j, x_j = u[:, at : at + rank].to(dtype), _columns(x, siblings, j, width).to(dtype)
        left, right = (x_j, u_j) if siblings.by_rows else (u_j, x_j)
        grads.append((widened(torch.mm(left.t(), right)) * scale).to(m.dtype))
    return grads


def expand(
    u: torch.Tensor, siblings: Siblings, dtype: torch.dtype, y: torch.Tensor, *, add: bool = False
) -> torch.Tensor:
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
    if use_triton(y) and _too_wide(layout):
        for j, (one, at, n) in enumerate(zip(_singly(siblings), layout.starts, layout.slots)):
            expand(u[:, at : at + n], one, dtype, y, add=add or j > 0)
        return y
    if not _fits_kernels(y, layout):
        return _expand_reference(u, siblings, layout, dtype, y, add)
    masked = masks is not None
    block_t, block_n = (64 if tokens >= 2048 else 32), 128
    if dtype is torch.float32:  # larger blocks spill
        block_t, block_n = 32, 64
    args = (
        u, *_three(mats, mats[0]), masks if masks is not None else y, y, *_three(scales, 0.0), tokens,
        y.stride(0), u.stride(0), masks.shape[2] if masks is not None else 0, width,
    )  # fmt: skip
    consts = (
        len(mats), by_rows, masked, add, *_three(ranks, 0), *_three(layout.slots, 16),
        precision(dtype), block_t, block_n,
    )  # fmt: skip
    grid = (_ceil(tokens, block_t), _ceil(width, block_n))
    launch(expand_kernel, grid, args, consts, num_warps=8 if masked or dtype is torch.float32 else 4, num_stages=2)
    return y


def _expand_reference(u, siblings, layout, dtype, y, add):
    total = widened(y) if add else 0.0
    for j, (m, scale, at) in enumerate(zip(siblings.mats, siblings.scales, layout.starts)):
        m = m.to(dtype).t() if siblings.by_rows else m.to(dtype)
        part = widened(torch.mm(u[:, at : at + m.shape[0]].to(dtype), m)) * scale
        total = total + (part if siblings.masks is None else apply_dropout_bits(part, siblings.masks[j]))
    return y.copy_(total)
