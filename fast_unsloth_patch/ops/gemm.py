"""Large products with what LoRA needs around them in the epilogue, for GPUs with a tensor memory accelerator.

==============  =====================================================  ================================================
`gemm`          y_j = x W_j^T + u_j B_j^T (+ bias) (+ residual)        up to three siblings, side by side
`gemm_swiglu`   h = silu(x Wg^T + ug Bg^T) * (x Wu^T + uu Bu^T)        where gate and up are kept by nobody
`gemm_dx`       dx = sum_j dy_j W_j + du_j A_j (+ addend)              W_j read as it lies
==============  =====================================================  ================================================

A library GEMM followed by the same additions reads and writes its output once more for each of them. Here the low-rank
update is one more step onto the fp32 accumulator and the rest happens before the only rounding.

Descriptors are made on the device: made on the host, each launch would encode and bind them anew, in Python. The kernel
then needs a scratch buffer, which Triton takes from an allocator held in a context variable: backward runs in a thread
of its own, where nobody has set one, and elsewhere it may be somebody else's, so `_launch` sets it for its own call
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device.dispatch import use_triton
from ..device.launch import INTERPRETED, device_limits, launch, triton
from ..reference.gemm import Update, gemm_dx_ref, gemm_ref, gemm_swiglu_ref
from ._gemm_kernels import gemm_dx_kernel, gemm_fwd_kernel, gemm_swiglu_kernel
from .low_rank import rank_slots

# Below it the host is the limit, and tiles of this size leave processors idle.
MIN_TOKENS = 2048
MAX_SLOTS = 64


class Tile(NamedTuple):
    """How a product is cut up."""

    m: int
    n: int
    k: int
    group: int  # row blocks that are worked on together
    num_warps: int
    num_stages: int


# Measured on an H200 (benchmarks/results/h200-notes.md). sm_100 is not: Triton 3.6 and 3.9 fail to compile for it.
_CAPABILITY = 90
# The interpreter's bfloat16 is wrong, its float32 a good oracle.
_DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.bfloat16, torch.float16)
FORWARD = Tile(128, 256, 64, 16, 8, 3)
SWIGLU = Tile(128, 128, 64, 16, 8, 3)
BACKWARD = Tile(128, 256, 64, 16, 8, 3)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    # On the current device and stream, which are those of the launch. Torch aligns to 512 bytes.
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _with_scratch(kernel: Any, grid: tuple[int], args: tuple[Any, ...], consts: tuple[Any, ...], tile: Tile) -> None:
    triton.set_allocator(_scratch)
    launch(kernel, grid, args, consts, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _launch(
    kernel: Any, tokens: int, width: int, args: tuple[Any, ...], consts: tuple[Any, ...], like: Tensor, tile: Tile
) -> None:
    """Launches ``kernel`` on as many programs as run at once, for a result [tokens, width]."""
    tiles = -(-tokens // tile.m) * -(-width // tile.n)
    grid = (min(tiles, device_limits(like.get_device()).sm_count),)
    consts = (*consts, tile.m, tile.n, tile.k, tile.group)
    copy_context().run(_with_scratch, kernel, grid, args, consts, tile)


def _refusal(
    x: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor | None], ranks: Sequence[int], step: int
) -> str | None:
    """What the kernels want that these operands are not, or None. Siblings' widths are multiples of ``step``."""
    dtype, columns = x.dtype, weights[0].shape[1]
    if dtype not in _DTYPES:
        return "bfloat16 or float16"
    if not use_triton(x) or not (INTERPRETED or device_limits(x.get_device()).capability == _CAPABILITY):
        return "a GPU of compute capability 9.0"
    if len(weights) > 3 or max(ranks, default=0) > MAX_SLOTS:
        return f"at most three siblings, of ranks up to {MAX_SLOTS}"
    for weight in weights:
        n, k = weight.shape
        if weight.dtype is not dtype or weight.stride() != (k, 1) or weight.data_ptr() & 15 or k != columns:
            return "contiguous weights of the input's dtype and of one width, at multiples of 16 bytes"
        if n & 7 or k & 7 or (len(weights) > 1 and n % step):
            return f"widths that are multiples of 8, and of {step} where there are siblings"
    for t in (x, *others):
        if t is not None and (t.dtype is not dtype or t.stride(1) != 1 or t.stride(0) & 7 or t.data_ptr() & 15):
            return "rows of unit stride in the input's dtype, at multiples of 16 bytes"
    return None


def covers(x: Tensor, weights: Sequence[Tensor], ranks: Sequence[int] = (), residual: Tensor | None = None) -> bool:
    """Whether `gemm`, `gemm_swiglu` and `gemm_dx` take these operands and are meant to: else a library GEMM is used.

    Args:
        x: [T, K], or dy [T, sum of N_j].
        weights: [N_j, K] of one to three siblings.
        ranks: of their adapters.
        residual: [T, sum of N_j] or [T, K], what is to be added.

    True on compute capability 9.0 in bfloat16 or float16, for at least ``MIN_TOKENS`` tokens; for contiguous weights
    of x's dtype, row-major, with N_j and K divisible by 8 (by 256 N_j of siblings), all at addresses that tensor
    descriptors can hold (multiples of 16 bytes, as are the rows'); for ranks up to ``MAX_SLOTS``.
    """
    return x.shape[0] >= MIN_TOKENS and _refusal(x, weights, (residual,), ranks, FORWARD.n) is None


def _runs_kernels(
    x: Tensor,
    weights: Sequence[Tensor],
    others: Sequence[Tensor | None],
    update: Update | None,
    axis: int,
    step: int,
) -> bool:
    """True to launch the kernel, False to run the reference (on a CPU).

    Raises:
        ValueError: on a GPU, for operands that the kernels do not take.
    """
    ranks = [] if update is None else [f.shape[axis] for f in update.factors if f is not None]
    refusal = _refusal(x, weights, others, ranks, step)
    if refusal is None and update is not None and (update.u.dtype is not x.dtype or update.u.stride(1) != 1):
        refusal = "u with rows of unit stride in the input's dtype"
    if refusal is None or not (x.is_cuda or INTERPRETED):
        return refusal is None
    got = [(tuple(t.shape), t.stride(), t.dtype) for t in (x, *weights)]
    raise ValueError(f"the kernels take {refusal} (ask `covers` first); got {got}")


def _check_shapes(x: Tensor, columns: int, update: Update | None, shapes: Sequence[tuple[int, int]], axis: int) -> None:
    """x has ``columns`` columns; the factor of sibling j is ``shapes[j]`` but for the rank, its dimension ``axis``."""
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"expected [T, {columns}] for these weights, got {tuple(x.shape)}")
    if update is None:
        return
    if len(update.factors) != len(shapes) or len(update.starts) != len(shapes) or update.u.shape[0] != x.shape[0]:
        raise ValueError(
            f"expected {len(shapes)} factors and starts and u of {x.shape[0]} rows, got {len(update.factors)}, "
            f"{len(update.starts)} and {tuple(update.u.shape)}"
        )
    for factor, start, shape in zip(update.factors, update.starts, shapes):
        if factor is not None and (
            factor.shape[1 - axis] != shape[1 - axis] or start + factor.shape[axis] > update.u.shape[1]
        ):
            raise ValueError(
                f"factor {tuple(factor.shape)} at column {start} of u {tuple(update.u.shape)} does not fit a weight "
                f"{shape}"
            )


def _check_result(t: Tensor | None, rows: int, columns: int, name: str) -> None:
    if t is not None and t.shape != (rows, columns):
        raise ValueError(f"expected {name} [{rows}, {columns}], got {tuple(t.shape)}")


def _three(values: Sequence[Any], filler: Any) -> tuple[Any, ...]:
    return (*values, *(filler,) * (3 - len(values)))


def _update_arguments(update: Update | None, axis: int, filler: Tensor) -> tuple[Any, ...]:
    """u, three factors, the stride of u, the slots of the widest, the ranks and the first columns."""
    if update is None:
        return filler, (filler,) * 3, 0, 0, (0, 0, 0), (0, 0, 0)
    u, factors, starts = update
    present = [f.contiguous() for f in factors if f is not None]
    if len({f.dtype for f in present}) > 1:  # the kernel picks one of three pointers, so they are of one type
        present = [f.to(u.dtype) for f in present]
    if not present:
        return filler, (filler,) * 3, 0, 0, (0, 0, 0), (0, 0, 0)
    some = iter(present)
    ranks = [0 if f is None else f.shape[axis] for f in factors]
    mats = [present[0] if f is None else next(some) for f in factors]
    return (
        u, _three(mats, present[0]), u.stride(0), rank_slots(max(ranks)), _three(ranks, 0),
        _three([start if rank else 0 for start, rank in zip(starts, ranks)], 0),
    )  # fmt: skip


def gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    update: Update | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``y_j = x W_j^T + u_j B_j^T`` of up to three siblings side by side, plus bias and residual.

    Args:
        x: [T, K], bfloat16 or float16, rows of unit stride.
        weights: [N_j, K] each, of x's dtype.
        update: u [T, slots] in x's dtype and the ``B_j`` [N_j, r_j] in any.
        bias: [sum of N_j], any floating dtype.
        residual: [T, sum of N_j] in x's dtype.
        out: where to write [T, sum of N_j] (rows may be strided; may be the residual); None: a new tensor.
        tile: another tile than the measured one (tests, benchmarks).

    Returns:
        [T, sum of N_j] in x's dtype. All sums are fp32, rounded once. On a CPU the reference runs, in any dtype.

    Raises:
        ValueError: shapes that do not fit; on a GPU, operands that `covers` refuses.
    """
    shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
    tokens, width = x.shape[0], sum([n for n, _ in shapes])
    _check_shapes(x, shapes[0][1], update, shapes, 1)
    _check_result(residual, tokens, width, "residual")
    _check_result(out, tokens, width, "out")
    tile = tile or FORWARD
    if not _runs_kernels(x, weights, (residual, out), update, 1, tile.n):
        y = gemm_ref(x, weights, update=update, bias=bias, residual=residual)
        return y if out is None else out.copy_(y)
    y = torch.empty((tokens, width), dtype=x.dtype, device=x.device) if out is None else out
    if tokens:
        u, b, u_stride, slots, ranks, starts = _update_arguments(update, 1, x)
        args = (
            x, *_three(weights, weights[0]), u, *b, y if bias is None else bias.contiguous(),
            y if residual is None else residual, y, tokens, shapes[0][1], *_three([n for n, _ in shapes], 0),
            x.stride(0), u_stride, 0 if residual is None else residual.stride(0), y.stride(0),
        )  # fmt: skip
        consts = (len(weights), slots, *ranks, *starts, bias is not None, residual is not None)
        _launch(gemm_fwd_kernel, tokens, width, args, consts, x, tile)
    return y


def gemm_swiglu(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    update: Update | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``h = silu(x Wg^T + ug Bg^T) * (x Wu^T + uu Bu^T)``; gate and up themselves are never written.

    Args:
        x: [T, K], bfloat16 or float16, rows of unit stride.
        gate, up: weights [N, K] of x's dtype.
        update: u [T, slots] in x's dtype and ``(Bg, Bu)`` [N, r] in any.
        out: where to write [T, N] (rows may be strided); None: a new tensor.
        tile: another tile than the measured one (tests, benchmarks).

    Returns:
        [T, N] in x's dtype; gate and up are rounded to it too, as if they had been written. On a CPU the reference
        runs, in any dtype.

    Raises:
        ValueError: shapes that do not fit; on a GPU, operands that `covers` refuses.
    """
    tokens, (width, columns) = x.shape[0], gate.shape
    _check_shapes(x, columns, update, [(width, columns)] * 2, 1)
    _check_result(up, width, columns, "up")
    _check_result(out, tokens, width, "out")
    tile = tile or SWIGLU
    if not _runs_kernels(x, (gate, up), (out,), update, 1, 8):
        h = gemm_swiglu_ref(x, gate, up, update=update)
        return h if out is None else out.copy_(h)
    h = torch.empty((tokens, width), dtype=x.dtype, device=x.device) if out is None else out
    if tokens:
        u, b, u_stride, slots, ranks, starts = _update_arguments(update, 1, x)
        args = (x, gate, up, u, *b[:2], h, tokens, columns, width, x.stride(0), u_stride, h.stride(0))
        _launch(gemm_swiglu_kernel, tokens, width, args, (slots, *ranks[:2], *starts[:2]), x, tile)
    return h


def gemm_dx(
    dy: Tensor,
    weights: Sequence[Tensor],
    *,
    update: Update | None = None,
    addend: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``dx = sum_j dy_j W_j + du_j A_j + addend``, one accumulator for all siblings.

    Args:
        dy: [T, sum of N_j], the siblings' gradients side by side, bfloat16 or float16, rows of unit stride.
        weights: [N_j, K] each, of dy's dtype, read as they lie.
        update: du [T, slots] in dy's dtype and the ``A_j`` [r_j, K] in any.
        addend: [T, K] in dy's dtype.
        out: where to write [T, K] (rows may be strided; may be the addend); None: a new tensor.
        tile: another tile than the measured one (tests, benchmarks).

    Returns:
        [T, K] in dy's dtype. All sums are fp32, rounded once. On a CPU the reference runs, in any dtype.

    Raises:
        ValueError: shapes that do not fit; on a GPU, operands that `covers` refuses.
    """
    shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
    tokens, columns = dy.shape[0], shapes[0][1]
    _check_shapes(dy, sum([n for n, _ in shapes]), update, shapes, 0)
    _check_result(addend, tokens, columns, "addend")
    _check_result(out, tokens, columns, "out")
    tile = tile or BACKWARD
    if not _runs_kernels(dy, weights, (addend, out), update, 0, tile.k):
        dx = gemm_dx_ref(dy, weights, update=update, addend=addend)
        return dx if out is None else out.copy_(dx)
    dx = torch.empty((tokens, columns), dtype=dy.dtype, device=dy.device) if out is None else out
    if tokens:
        du, a, du_stride, slots, ranks, starts = _update_arguments(update, 0, dy)
        args = (
            dy, *_three(weights, weights[0]), du, *a, dx if addend is None else addend, dx,
            tokens, columns, *_three([n for n, _ in shapes], 0),
            dy.stride(0), du_stride, 0 if addend is None else addend.stride(0), dx.stride(0),
        )  # fmt: skip
        consts = (len(weights), slots, *ranks, *starts, addend is not None)
        _launch(gemm_dx_kernel, tokens, columns, args, consts, dy, tile)
    return dx
